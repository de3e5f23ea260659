"""What the documents, docstrings and comments name exists: tests, files, configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = ("posttrain", "configs", "data_prep", "train", "eval", "serving", "scripts")
FILE = re.compile(rf"\b(?:{'|'.join((*PACKAGES, 'tests'))})/[\w./-]*\w\.(?:py|yaml|sh)\b")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_test_and_file_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = [(file, name) for file, name in TEST.findall(text) if (ROOT / file).is_file()]
    gone = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    gone += [file for file in FILE.findall(text) if not (ROOT / file).is_file()]
    assert not gone


def test_every_configuration_that_the_code_names_exists() -> None:
    sources = [
        file for package in PACKAGES for file in (ROOT / package).rglob("*.*") if file.suffix != ".pyc"
    ]
    named = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in sources
        for name in re.findall(r"\bconfigs/[\w./-]+\.yaml\b", file.read_text(encoding="utf-8"))
    }
    assert named
    assert not {(file, name) for file, name in named if not (ROOT / name).is_file()}
