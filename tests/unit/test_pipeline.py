"""Pipelines of toy stages: order, skipping, reruns downstream, resume, selection, record and report."""

from __future__ import annotations

import json
from pathlib import Path

import core_toy_stages
import pytest
from core_toy_stages import CALLS, INTERRUPT_AT

from posttrain import pipeline_run
from posttrain.errors import ConfigError, DataError, UserError
from posttrain.pipeline import load_pipeline
from posttrain.pipeline_run import plan_pipeline, run_pipeline
from posttrain.planning import Plan
from posttrain.rundir import read_manifest

PIPELINE = """\
name: demo
output_dir: {root}
stages:
  c: {{stage: toy, text: c, upstream: ["${{stage:a}}", "${{stage:b}}"]}}
  a: {{stage: toy, text: a, file: {root}/in.txt}}
  b: {{stage: toy, text: b, steps: 4}}
  d: {{stage: toy, text: d, upstream: "${{stage:b}}"}}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    core_toy_stages.install(monkeypatch)
    monkeypatch.setattr(pipeline_run, "REPORT", "core_toy_stages:write_report")
    (tmp_path / "in.txt").write_text("1")
    file = tmp_path / "demo.yaml"
    file.write_text(PIPELINE.format(root=tmp_path))
    return file


def run(path: Path, *overrides: str, **options: object) -> list[str]:
    CALLS.clear()
    run_pipeline(load_pipeline(path, overrides), **options)  # type: ignore[arg-type]
    return list(CALLS)


def plans(path: Path, *overrides: str) -> dict[str, Plan]:
    pipeline = load_pipeline(path, overrides)
    return plan_pipeline(pipeline, pipeline.select())


def actions(path: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    return {name: (plan.action, plan.reason) for name, plan in plans(path, *overrides).items()}


def test_runs_in_order_then_skips_everything(path: Path) -> None:
    assert run(path) == ["a", "b", "c", "d", "report"]
    directory = path.parent / "demo"
    assert (directory / "c" / "value.txt").read_text() == "a+b+c"
    record = json.loads((directory / "pipeline.json").read_text())
    assert (record["status"], record["stages"]) == ("complete", ["a", "b", "c", "d"])
    assert record["details"]["c"] == {"stage": "toy", "status": "complete", "depends": ["a", "b"]}
    before = (directory / "pipeline.json").read_bytes()
    assert run(path) == []
    assert (directory / "pipeline.json").read_bytes() == before
    (directory / "report.html").unlink()
    assert run(path) == ["report"]


def test_plan_of_a_fresh_pipeline(path: Path) -> None:
    assert actions(path) == {
        "a": ("run", "not run yet"),
        "b": ("run", "not run yet"),
        "c": ("run", "after a, b"),
        "d": ("run", "after b"),
    }
    assert not (path.parent / "demo").exists()


def test_changed_input_reruns_what_depends_on_it_only(path: Path) -> None:
    run(path)
    (path.parent / "in.txt").write_text("2")
    assert actions(path)["c"] == ("rerun", "after a")
    assert actions(path)["d"] == ("skip", "complete, same inputs")
    # a writes the same value as before, so its outputs are the same and c has nothing new to read
    assert run(path) == ["a", "report"]
    assert run(path, "stages.b.text=B") == ["b", "c", "d", "report"]
    assert (path.parent / "demo" / "c" / "value.txt").read_text() == "a+B+c"


def test_stage_version_is_part_of_the_inputs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from posttrain import registry

    run(path)
    monkeypatch.setitem(registry.STAGES, "toy", replace(registry.STAGES["toy"], version=2))
    assert actions(path)["a"] == ("rerun", "the configuration changed")


def test_moved_pipeline_is_still_complete(path: Path) -> None:
    run(path)
    (path.parent / "elsewhere").mkdir()
    (path.parent / "demo").rename(path.parent / "elsewhere" / "demo")
    assert run(path, f"output_dir={path.parent}/elsewhere") == []


def test_interrupted_pipeline_resumes_where_it_was(path: Path) -> None:
    pipeline = load_pipeline(path)
    INTERRUPT_AT.append(4)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline)
    assert CALLS == ["a", "b"]
    assert json.loads((path.parent / "demo" / "pipeline.json").read_text())["status"] == "failed"
    assert actions(path)["b"] == ("resume", "the last attempt was interrupted")
    assert run(path) == ["b", "c", "d", "report"]
    assert read_manifest(path.parent / "demo" / "b")["metrics"]["resumed_from"] == 3


def test_only_and_until(path: Path) -> None:
    assert run(path, until="d") == ["b", "d"]
    assert json.loads((path.parent / "demo" / "pipeline.json").read_text())["status"] == "partial"
    with pytest.raises(UserError, match=r"c: needs a, which is not complete\n    leave out --only"):
        run(path, only=["c"])
    assert run(path, only=["a"]) == ["a"]
    assert run(path, only=["c"]) == ["c", "report"]
    assert run(path, only=["b"], force=True) == ["b", "report"]
    with pytest.raises(UserError, match=r"there is no stage 'e'\n    stages are a, b, c, d"):
        run(path, until="e")


def test_failing_stage_stops_the_pipeline_and_is_recorded(path: Path) -> None:
    with pytest.raises(DataError):
        run(path, "stages.b.fail=user")
    assert CALLS == ["a", "b"]
    record = json.loads((path.parent / "demo" / "pipeline.json").read_text())
    assert (record["status"], record["current"], record["details"]["b"]["status"]) == (
        "failed",
        "b",
        "failed",
    )


def test_mistakes_of_late_stages_stop_it_before_the_first_one_starts(path: Path) -> None:
    with pytest.raises(UserError, match=r"d: input file: .*nothing.txt: no such file"):
        run(path, f"stages.d.file={path.parent}/nothing.txt")
    with pytest.raises(ConfigError, match=r"stages.c.trainer.learning_rate: is above 1"):
        run(path, "stages.c.trainer.learning_rate=9.0")
    assert CALLS == []
    assert not (path.parent / "demo").exists()


def test_report_can_be_switched_off(path: Path) -> None:
    assert run(path, "report=false") == ["a", "b", "c", "d"]
