"""Operations of the curate stage: a list in the configuration, in any order, each a small class over records.

Two shapes (``base.py``): a map operation looks at one row at a time, a corpus operation at a small view of
every row. ``engine.py`` runs them in one process and keeps the ledger; ``config.py`` has their settings;
``build.py`` makes the one from the other. Nothing here imports torch at import.
"""
