"""Run directories: atomic files, the lock, the metrics log, and execute_stage's skip, resume and rerun."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import core_toy_stages
import pytest
from core_toy_stages import CALLS, INTERRUPT_AT, ToyConfig

from posttrain.errors import DataError, PosttrainError, StageFailedError, UserError
from posttrain.rundir import RunDir, atomic_write_text, metric_rows, read_manifest
from posttrain.stage import execute_stage


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    core_toy_stages.install(monkeypatch)


def visible(run: Path) -> set[str]:
    return {item.name for item in run.iterdir() if item.name not in (".lock", ".previous")}


FINISHED = {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "parts", "value.txt"}


def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "f.txt"
    atomic_write_text(target, "old")

    def refuse(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["f.txt"]


def test_metrics_truncation_and_a_line_cut_by_a_crash(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 2, 3]
    run.truncate_after(2)
    run.append_metrics({"step": 3, "again": True})
    assert metric_rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def hold(path: Path, ready: Any, release: Any) -> None:
    with RunDir(path).locked():
        ready.set()
        release.wait(30)


def test_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "r", ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match=f"written by process {holder.pid} on {socket.gethostname()}"):
            execute_stage("toy", ToyConfig(text="x"), tmp_path / "r")
    finally:
        release.set()
        holder.join()
    assert execute_stage("toy", ToyConfig(text="x"), tmp_path / "r").status == "completed"


def test_manifest_and_files_of_a_complete_run(tmp_path: Path) -> None:
    up = execute_stage("toy", ToyConfig(text="a"), tmp_path / "up")
    result = execute_stage("toy", ToyConfig(text="b", upstream=str(tmp_path / "up"), seed=4), tmp_path / "r")
    manifest = read_manifest(tmp_path / "r")
    assert manifest == result.manifest
    assert visible(tmp_path / "r") == FINISHED
    assert (tmp_path / "r" / "value.txt").read_text() == "a+b"
    assert manifest["status"] == "complete"
    assert manifest["parents"] == [
        {
            "field": "upstream",
            "ref": str(tmp_path / "up"),
            "stage": "toy",
            "run": "up",
            "content_hash": up.manifest["outputs_hash"],
        }
    ]
    assert manifest["seeds"] == {"stage": 4}
    assert set(manifest["timings"]) == {"import", "train", "total"}
    assert set(manifest["outputs"]["files"]) == {"value.txt", "parts/first.txt"}
    assert [(row["step"], row["loss"], row["bad"]) for row in metric_rows(tmp_path / "r")] == [
        (1, 1.0, None),
        (2, 0.5, None),
        (3, 1 / 3, None),
    ]


def test_same_seed_same_draw(tmp_path: Path) -> None:
    draws = [
        execute_stage("toy", ToyConfig(text="a", seed=seed), tmp_path / name).manifest["metrics"]["draw"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_complete_run_is_skipped_and_force_reruns_it(tmp_path: Path) -> None:
    config = ToyConfig(text="x")
    assert execute_stage("toy", config, tmp_path / "r").status == "completed"
    assert execute_stage("toy", config, tmp_path / "r").status == "skipped"
    assert execute_stage("toy", config, tmp_path / "r", force=True).plan.reason == "forced"
    assert CALLS == ["r", "r"]


def test_changed_configuration_reruns_and_keeps_the_previous_contents(tmp_path: Path) -> None:
    run = tmp_path / "r"
    execute_stage("toy", ToyConfig(text="x"), run)
    result = execute_stage("toy", ToyConfig(text="y", steps=1), run)
    assert (result.plan.action, result.plan.reason) == ("rerun", "the configuration changed")
    assert visible(run) == FINISHED
    assert [row["step"] for row in metric_rows(run)] == [1]
    assert (run / ".previous" / "value.txt").read_text() == "x"
    assert read_manifest(run / ".previous")["status"] == "complete"


def test_changed_input_reruns_and_an_equal_one_elsewhere_does_not(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("1")
    execute_stage("toy", ToyConfig(text="x", file=str(source)), tmp_path / "r")
    copy = tmp_path / "copy.txt"
    copy.write_text("1")
    assert execute_stage("toy", ToyConfig(text="x", file=str(copy)), tmp_path / "r").status == "skipped"
    source.write_text("2")
    result = execute_stage("toy", ToyConfig(text="x", file=str(source)), tmp_path / "r")
    assert (result.status, result.plan.reason) == ("completed", "input file changed")


def test_deleted_output_reruns(tmp_path: Path) -> None:
    execute_stage("toy", ToyConfig(text="x"), tmp_path / "r")
    (tmp_path / "r" / "value.txt").unlink()
    result = execute_stage("toy", ToyConfig(text="x"), tmp_path / "r")
    assert (result.status, result.plan.reason) == ("completed", "value.txt is missing or has changed")


def test_interrupted_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    run, config = tmp_path / "r", ToyConfig(text="x", steps=5)
    INTERRUPT_AT.append(3)
    with pytest.raises(KeyboardInterrupt):
        execute_stage("toy", config, run)
    manifest = read_manifest(run)
    assert manifest is not None
    assert manifest["status"] == "running"
    (run / ".staging-model-abc").mkdir()
    result = execute_stage("toy", config, run)
    assert result.plan.action == "resume"
    assert result.manifest["metrics"]["resumed_from"] == 2
    assert [row["step"] for row in metric_rows(run)] == [1, 2, 3, 4, 5]
    assert not any("half" in row for row in metric_rows(run))
    assert visible(run) == FINISHED


def test_interrupted_run_with_another_configuration_starts_over(tmp_path: Path) -> None:
    run = tmp_path / "r"
    INTERRUPT_AT.append(3)
    with pytest.raises(KeyboardInterrupt):
        execute_stage("toy", ToyConfig(text="x", steps=5), run)
    result = execute_stage("toy", ToyConfig(text="y", steps=5), run)
    assert result.manifest["metrics"]["resumed_from"] == 0
    assert not (run / ".previous").exists()


def test_crash_while_making_room_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "r"
    execute_stage("toy", ToyConfig(text="x"), run)

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            execute_stage("toy", ToyConfig(text="y"), run)
    assert read_manifest(run)["status"] == "failed"
    for text in ("x", "y"):
        assert execute_stage("toy", ToyConfig(text=text), run).plan.action == "rerun"
        assert (run / "value.txt").read_text() == text


def test_user_error_is_recorded_and_nothing_half_written_stays(tmp_path: Path) -> None:
    run = tmp_path / "r"
    with pytest.raises(DataError, match="nothing here"):
        execute_stage("toy", ToyConfig(text="x", fail="user"), run)
    manifest = read_manifest(run)
    assert (manifest["status"], manifest["error"]) == ("failed", "toy.jsonl:3: nothing here")
    assert visible(run) == {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints"}
    with pytest.raises(UserError, match=r"not complete \(status: failed\)"):
        execute_stage("toy", ToyConfig(text="z", upstream=str(run)), tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_unexpected_error_leaves_its_traceback(tmp_path: Path) -> None:
    run = tmp_path / "r"
    with pytest.raises(StageFailedError, match=r"the toy stage failed: KeyError: 'surprise'") as caught:
        execute_stage("toy", ToyConfig(text="x", fail="program"), run)
    assert caught.value.exit_code == 1
    assert "core_toy_stages.py" in (run / "error.log").read_text()
    assert read_manifest(run)["status"] == "failed"


def test_full_disk_says_how_much_is_free_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PosttrainError, match=r"no space left on the disk \([\d,]+ bytes free\)") as caught:
        execute_stage("toy", ToyConfig(text="x", fail="disk"), tmp_path / "r")
    assert caught.value.exit_code == 1
    assert "to resume" in str(caught.value)
    assert not list((tmp_path / "r").glob(".staging*"))


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is not a run directory \(it holds thesis.tex"):
        execute_stage("toy", ToyConfig(text="x"), tmp_path, force=True)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = execute_stage("toy", ToyConfig(text="x"), tmp_path / "r", dry_run=True)
    assert (result.status, result.plan.action) == ("planned", "run")
    assert not (tmp_path / "r").exists()


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="was not written by this version"):
        execute_stage("toy", ToyConfig(text="x"), tmp_path)
