"""The load test runs, and every side gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import triton_environment

ROOT = Path(__file__).parents[2]
SIDES = ["generate", "engine", "triton", "gateway", "batcher", "transformers"]


@pytest.mark.slow
@pytest.mark.skipif(
    triton_environment() is None, reason="no Triton environment; make one with `make triton-env`"
)
def test_every_side_answers_the_same_requests_with_the_same_text(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_serve.py"), "--quick", "--repeats", "2"]
    command += ["--triton-env", str(triton_environment()), "--work", str(tmp_path / "work")]
    command += ["--output", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| **Triton and the gateway, HTTP** | 4 |" in done.stdout

    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["skipped"] == {}
    assert list(report["summary"]) == SIDES
    tokens: dict[str, set[int]] = {}
    for run in report["runs"]:
        assert run["errors"] == 0
        same, compared = run["same_text"]
        assert same == compared
        tokens.setdefault(str(run["concurrency"]), set()).add(run["tokens"])
        assert all(seconds >= 0 for seconds in run["cpu_seconds"].values())
        if run["side"] != "batcher":
            assert run["events_per_token"] == 1
    assert all(len(found) == 1 for found in tokens.values()), "lengths differ between sides"
    assert {row["tokens"] for row in report["short_behind_long"]} == {4}
    assert {row["long_tokens"] for row in report["short_behind_long"]} == {128}
    soak = report["soak"]
    assert (soak["requests"], soak["errors"]) == (400, 0)
    assert list(soak["processes"]) == ["gateway", "stub", "tritonserver"]
    memory = report["peak_resident_bytes"]["gateway"]
    assert all(memory[name] > 2**20 for name in ("gateway", "stub", "tritonserver"))
