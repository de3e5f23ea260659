"""scripts/published_numbers.py: published figures from the published data, and the table in the document."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from scripts.published_numbers import (
    BEGIN,
    END,
    Row,
    _is_a_draw,
    all_rows,
    main,
    pandalm,
    table,
    written,
)

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT / "../shared/data"))
needs_data = pytest.mark.skipif(
    not (SHARED / "alpaca_eval").is_dir(),
    reason="no published data here: set POSTTRAIN_SHARED_DATA to the folder of shared test data",
)


@needs_data
def test_every_published_figure_agrees_and_the_document_has_the_table() -> None:
    rows = all_rows(SHARED)
    assert [row.what for row in rows if not row.agrees] == []
    assert len([row for row in rows if row.source == "AlpacaEval"]) == 2 * 28
    counts = {row.what: (row.published, row.ours) for row in rows if row.source == "IFEval"}
    assert counts["strict verdicts, equal prompts"] == (540, 540)
    assert counts["strict verdicts, equal instructions"] == (832, 832)
    # Key 1122 alone: the official program drew that verdict at random.
    assert counts["loose verdicts, equal prompts"] == (540, 539)
    assert counts["loose verdicts, equal instructions"] == (832, 831)
    document = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert document == written(document, table(rows))


def test_pandalm_notices_another_label(tmp_path: Path) -> None:
    items = [{f"annotator{k}": label for k in (1, 2, 3)} for label in [0] * 105 + [1] * 422 + [2] * 472]
    items[0]["annotator1"] = items[0]["annotator2"] = 1
    (tmp_path / "testset-v1.json").write_text(json.dumps(items))
    rows = {row.what: row for row in pandalm(tmp_path)}
    assert rows["majority says tie"].ours == 104 and not rows["majority says tie"].agrees
    assert rows["majority says second better"].agrees
    assert rows["kappa of annotator1 and annotator2"].ours == 1.0
    assert not rows["kappa of annotator1 and annotator2"].agrees


@pytest.mark.parametrize(
    ("letter", "strict", "loose", "drawn"),
    [
        ("#", True, False, True),  # `e` occurs four times, `z` never
        ("e", True, False, False),  # a letter is counted, not drawn
        ("#", False, False, True),
    ],
)
def test_only_a_random_letter_excuses_a_verdict(letter: str, strict: bool, loose: bool, drawn: bool) -> None:
    given = {"let_relation": "at least", "letter": letter, "let_frequency": 4}
    prompt = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [given]}
    theirs = {"strict": [strict], "loose": [loose]}
    assert _is_a_draw("never ever", prompt, (True,), theirs) is drawn


def test_a_verdict_no_letter_can_give_is_not_excused() -> None:
    given = {"let_relation": "at least", "letter": "#", "let_frequency": 4}
    prompt = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [given]}
    assert not _is_a_draw("####", prompt, (True,), {"strict": [True], "loose": [False]})


def test_a_difference_shows_and_counts() -> None:
    row = Row("S", "f", 1.0, 1.5, 0.1, 1)
    assert not row.agrees
    assert row.line() == "| S | f | 1.0 | 1.5 | 0.5 |"


def test_only_what_is_between_the_markers_changes() -> None:
    assert written(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(UserError, match="no place for the table"):
        written("a", "new")


def test_missing_data_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["published_numbers.py", "--data", str(tmp_path)])
    assert main() == 2
    assert "no folder alpaca_eval" in capsys.readouterr().err
