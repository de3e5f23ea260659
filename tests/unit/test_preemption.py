"""SIGTERM: the flag, agreement between processes, and a real process that stops with 75 and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from posttrain.errors import PosttrainError, RequeueError
from posttrain.preemption import PreemptionFlag, agree
from posttrain.rundir import metric_rows, read_manifest

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = """\
name: demo
output_dir: {root}
report: false
stages:
  first: {{stage: patient, steps: 2}}
  second: {{stage: patient, steps: 5}}
"""


def test_flag_remembers_sigterm_and_puts_the_handler_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with PreemptionFlag() as flag:
            assert not flag.requested
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                assert flag.requested
            assert seen == []
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with PreemptionFlag() as again:
            assert not again.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handler_is_put_back_when_the_stage_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stage() -> None:
        with PreemptionFlag():
            assert signal.getsignal(signal.SIGTERM) != before
            raise RequeueError("step 1 of 2")

    with pytest.raises(RequeueError):
        stage()
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_leaves_the_process_as_it_is() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def enter() -> None:
        with PreemptionFlag() as flag:
            found.extend([signal.getsignal(signal.SIGTERM), flag.requested])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before, False]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("requests", "stops"), [((0, 0, 0), False), ((0, 1, 0), True), ((1, 1, 1), True)])
@pytest.mark.parametrize("reduction", [max, sum])
def test_all_processes_come_to_the_same_answer(
    requests: tuple[int, ...], stops: bool, reduction: object
) -> None:
    assert callable(reduction)
    for rank, mine in enumerate(requests):
        others = requests[:rank] + requests[rank + 1 :]
        assert agree(bool(mine), lambda value, others=others: reduction([value, *others])) is stops


def test_the_error_says_what_to_do() -> None:
    error = RequeueError("update 12 of 64")
    assert isinstance(error, PosttrainError)
    assert (error.exit_code, error.place) == (75, "update 12 of 64")
    assert str(error) == (
        "stopped at update 12 of 64 after SIGTERM, with the work up to there saved\n"
        "    the same command resumes from there (exit code 75 asks a scheduler to run it again)"
    )


def start(pipeline: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'unit'}", **variables}
    command = [sys.executable, "-m", "core_patient_stage", "run", str(pipeline)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=pipeline.parent
    )


def test_sigterm_to_a_running_pipeline_exits_75_and_the_same_command_resumes(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipe.yaml"
    pipeline.write_text(PIPELINE.format(root=tmp_path))
    run = tmp_path / "demo" / "second"
    with start(pipeline, PAUSE_AT="3") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "in step 3\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 75, errors
    assert errors.endswith(f"{RequeueError('step 3 of 5')}\n")
    assert "error:" not in errors
    manifest = read_manifest(run)
    assert manifest is not None
    assert (manifest["status"], manifest["outputs_hash"]) == ("interrupted", None)
    assert manifest["error"] == "stopped at step 3 of 5 after SIGTERM, with the work up to there saved"
    assert set(manifest["timings"]) == {"import", "train", "total"}
    assert not (run / "error.log").exists()
    record = json.loads((tmp_path / "demo" / "pipeline.json").read_text())
    assert (record["status"], record["current"]) == ("interrupted", "second")
    assert {name: row["status"] for name, row in record["details"].items()} == {
        "first": "complete",
        "second": "interrupted",
    }

    with start(pipeline) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "first: skipped (complete, same inputs)" in errors
    assert "second: resume (the last attempt was interrupted)" in errors
    done = read_manifest(run)
    assert done is not None
    assert (done["status"], done["metrics"], done["error"]) == ("complete", {"resumed_from": 3}, None)
    assert done["timings"]["total"] > manifest["timings"]["total"]
    assert [row["step"] for row in metric_rows(run)] == [1, 2, 3, 4, 5]
