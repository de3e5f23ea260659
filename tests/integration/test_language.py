"""Language identification on sentences of known languages (lingua's test data)."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.operations.language import Language
from tests.integration.test_curate import shared

MAJOR = "ar de en es fr hi id it ja ko nl pl pt ru zh".split()
SENTENCES = 100


def accuracy(codes: list[str], folder: Path) -> float:
    """Share of the first SENTENCES sentences of every language whose first guess is right."""
    operation = Language(min_confidence=0.0, min_letters=0)
    right = total = 0
    for code in codes:
        lines = (folder / f"{code}.txt").read_text(encoding="utf-8").splitlines()[:SENTENCES]
        total += len(lines)
        right += sum(operation.identify(line)[0] == code for line in lines)
    return right / total


def test_accuracy_on_major_and_on_all_languages() -> None:
    folder = Path(shared("lingua_langid/language-testdata/sentences/en.txt")).parent
    codes = sorted(file.stem for file in folder.glob("*.txt"))
    assert len(codes) == 75
    assert accuracy(MAJOR, folder) == pytest.approx(0.985, abs=0.01)
    assert accuracy(codes, folder) == pytest.approx(0.92, abs=0.02)
