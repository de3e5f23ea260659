"""Data: sources -> typed records -> exact dedup -> split -> dataset directory with its card.

Importing this package, or any module in it, never imports torch.
"""
