"""What besides configuration and files decides the rows: the code that makes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from data_prep.config import CurateConfig
from data_prep.operations.config import ToxicityConfig
from posttrain.environment import installed, package_versions
from posttrain.hashing import hash_file, hash_json

PACKAGES = ("ftfy", "presidio-analyzer", "py3langid", "sentence-transformers", "spacy")
"""Of the optional libraries: those that decide what an operation finds."""


def code_hash(config: CurateConfig) -> str:
    """Hash of this package's files, of the modules of scorers, and of the versions of the libraries."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    files += [
        file for at in config.operations if isinstance(at, ToxicityConfig) for file in _module(at.scorer)
    ]
    return hash_json([[hash_file(file) for file in files], package_versions(), installed(PACKAGES)])


def _module(scorer: str) -> list[Path]:
    """The file that a scorer, module:function, is in; none for a module without one."""
    found = importlib.util.find_spec(scorer.partition(":")[0])
    file = Path(found.origin) if found is not None and found.origin is not None else None
    return [file] if file is not None and file.is_file() else []
