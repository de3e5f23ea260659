"""`posttrain data diff`: rows, sides, drops and settings that changed, and that nothing changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.diff import diff
from posttrain.errors import DataError
from tests.integration.conftest import command
from tests.integration.test_curate import config, curate, pairs, save


def made(tmp_path: Path, name: str, rows: list[dict[str, Any]], **block: Any) -> Path:
    curate(config("preference", save(tmp_path / "a.jsonl", rows), **block), tmp_path / name)
    return tmp_path / name


def test_equal_data_sets(tmp_path: Path) -> None:
    first, second = (made(tmp_path, name, pairs(60)) for name in ("one", "two"))
    found = diff(first, second)
    assert found.same_content
    assert (found.added, found.removed, found.changed, found.moved) == (0, 0, 0, {})
    assert (found.drops, found.settings, found.lengths, found.examples) == ({}, {}, {}, {})
    done = command("data", "diff", first, second)
    assert done.exit_code == 0, done.output
    assert "the same rows on the same sides" in done.stdout


def test_what_changed(tmp_path: Path) -> None:
    rows = [{**row, "key": f"k{n}"} for n, row in enumerate(pairs(60))]
    source = {"path": str(tmp_path / "a.jsonl"), "id_column": "key"}
    first = made(tmp_path, "one", rows, sources=[source])
    rows[3]["chosen"] = "Something else."
    rows = [*rows[:50], {**rows[3], "key": "new", "prompt": "A new one?"}]
    rows += [{**rows[0], "key": "copy"}]
    split = {"eval_fraction": 0.4}
    second = made(
        tmp_path, "two", rows, sources=[source], split=split, operations=[{"op": "preference_checks"}]
    )
    found = diff(first, second)
    assert not found.same_content
    assert (found.added, found.removed, found.changed) == (1, 10, 1)
    assert found.moved.keys() == {"train to eval"}
    assert found.rows["read"] == (60, 52)
    assert found.drops == {"duplicate": (None, 1)}
    assert found.settings["split.eval_fraction"] == (0.1, 0.4)
    assert found.settings["operations.1. preference_checks"] == (None, {})
    assert "operations" not in found.settings, "what has no operations has nothing to show"
    assert found.settings["sources.a.jsonl.rows"] == (60, 52)
    assert found.examples["added"] == ["new A new one?"]
    assert found.examples["changed"] == ["k3 Question 3?"]
    done = command("data", "diff", first, second, "--json")
    assert json.loads(done.stdout)["moved"] == found.moved
    said = command("data", "diff", first, second).stdout
    assert "1 added, 10 removed, 1 changed" in said
    assert "split.eval_fraction" in said


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first = made(tmp_path, "one", pairs(60))
    curate(config("prompt", str(tmp_path / "a.jsonl")), tmp_path / "two")
    with pytest.raises(DataError, match="preference rows and .* prompt rows"):
        diff(first, tmp_path / "two")
    (tmp_path / "empty").mkdir()
    done = command("data", "diff", first, tmp_path / "empty")
    assert done.exit_code == 2
    assert "has no dataset.json" in done.stderr
