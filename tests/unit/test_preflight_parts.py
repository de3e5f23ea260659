"""The arithmetic of the preflight, and how an example is shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from posttrain.errors import PreflightError, Problem
from posttrain.preflight import Findings
from posttrain.preflight_report import print_findings, short
from train.config import SftConfig
from train.encode import IGNORED, Encoded, Fault
from train.preflight.dialogues import truncated
from train.preflight.disk import checkpoints, gigabytes
from train.preflight.rows import judge


def sft(**trainer: object) -> SftConfig:
    return SftConfig(model="m", data="d", trainer=trainer)


@pytest.mark.parametrize(
    ("trainer", "rows", "count"),
    [
        ({}, 100, 3),
        ({"save_total_limit": 5}, 100, 6),
        ({"save_strategy": "no"}, 100, 0),
        ({"save_total_limit": None, "max_steps": 1000, "save_steps": 100}, None, 11),
        ({"save_total_limit": None, "save_steps": 10, "num_train_epochs": 2}, 160, 5),
        ({"save_total_limit": None, "save_strategy": "epoch", "num_train_epochs": 4}, 160, 5),
    ],
)
def test_checkpoints_on_the_disk_at_once(trainer: dict[str, object], rows: int | None, count: int) -> None:
    """The default keeps 2. 160 rows in batches of 8 twice are 40 steps, which save 4 times."""
    assert checkpoints(sft(**trainer), rows) == count


def test_sizes_in_words() -> None:
    assert [gigabytes(n) for n in (1_500, 2_500_000, 84_000_000_000)] == ["1.5 kB", "2.5 MB", "84.0 GB"]


def test_truncation_that_takes_some_or_all_supervised_tokens() -> None:
    rows = [
        Encoded([1, 2, 3, 4], [IGNORED, 2, IGNORED, 4]),
        Encoded([1, 2, 3, 4], [IGNORED, IGNORED, IGNORED, 4]),
        Encoded([1, 2, 3, 4], [1, 2, 3, IGNORED]),
        Encoded([1, 2], [IGNORED, 2]),
    ]
    gone, cut = truncated(rows, ["a", "b", "c", "d"], 3, 4)
    assert gone is not None and gone.ids == ["b"]
    assert cut is not None and cut.ids == ["a"]
    assert cut.message.startswith("1 of 4 dialogues (25.0%) have their answer cut at trainer.max_length=3")
    assert truncated(rows, ["a", "b", "c", "d"], 4, 4) == (None, None)


@pytest.mark.parametrize(("count", "refused"), [(1, False), (2, True)])
def test_a_share_at_the_threshold_is_a_warning(count: int, refused: bool) -> None:
    findings = Findings()
    judge(findings, "data", "d", Fault(["x"] * count, 100, "rows", "are odd", "mend them"), 0.01)
    assert (len(findings.problems), len(findings.warnings)) == ((1, 0) if refused else (0, 1))


def test_examples_are_shortened_in_the_middle_and_keep_their_end() -> None:
    example = [(f"{n}", n % 2 == 1) for n in range(20)] + [("a" * 1000, True)]
    shown = short(example)
    assert len(shown) == 9
    assert shown[0] == ("... ", False)
    assert shown[-1] == ("a" * 120 + " ... " + "a" * 120, True)
    assert short([("a", True)]) == [("a", True)]


def test_an_example_is_coloured_on_a_terminal_and_marked_elsewhere() -> None:
    example = [("Question [b]?", False), ("Answer.", True)]
    plain, coloured = io.StringIO(), io.StringIO()
    print_findings("sft", [], ["a note"], example, Console(file=plain))
    print_findings(
        "sft", [], [], example, Console(file=coloured, force_terminal=True, color_system="standard")
    )
    assert "sft: a note\n" in plain.getvalue()
    assert plain.getvalue().endswith("Question [b]?>>>Answer.<<<\n")
    assert "\x1b[32mAnswer." in coloured.getvalue()
    assert "\x1b[2mQuestion [b]?" in coloured.getvalue()
    assert ">>>" not in coloured.getvalue()
    prompt = io.StringIO()
    print_findings("ppo", [], [], example[:1], Console(file=prompt))
    assert prompt.getvalue() == "ppo: one example as the model sees it\nQuestion [b]?\n"


def test_problems_are_counted_and_closed_with_a_remark() -> None:
    problem = Problem("sft.yaml:3: data", "d/train.parquet: has no rows", "curate it again")
    error = PreflightError([problem], "nothing was started")
    assert error.exit_code == 2
    assert str(error).splitlines() == [
        "the preflight found 1 problem:",
        "  sft.yaml:3: data: d/train.parquet: has no rows",
        "    curate it again",
        "nothing was started",
    ]
    assert str(PreflightError([problem, problem])).startswith("the preflight found 2 problems:\n")
