"""The SFT benchmark runs, and both sides of it train the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smoke_benchmark_trains_the_same_on_both_sides(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_sft.py"), "--smoke"]
    command += ["--rungs", "trl", "same", "defaults", "trl-lora", "lora"]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| **posttrain, its own defaults** |" in done.stdout

    report = json.loads((tmp_path / "bench.json").read_text())
    runs = {run["rung"]: run for run in report["runs"]}
    assert list(runs) == ["trl", "same", "defaults", "trl-lora", "lora"]
    steps, warmup = report["settings"]["steps"], report["settings"]["warmup"]
    for run in runs.values():
        assert len(run["steps"]) == steps
        timed = run["steps"][warmup:]
        seconds = sum(step["seconds"] for step in timed)
        assert run["tokens_per_second_all"] * seconds == pytest.approx(sum(step["tokens"] for step in timed))
        assert 0 < run["supervised_tokens"] < run["tokens"]
        assert 0 < run["memory"]["peak"] < run["memory"]["absolute"]
        assert 0 < report["summary"][run["rung"]]["mfu"] < 1
    # With TRL's settings our stage sees the same rows in the same order, and ends with the same weights.
    for name in ("tokens", "supervised_tokens", "padding"):
        assert runs["same"][name] == runs["trl"][name]
    assert runs["same"]["held_out"] == pytest.approx(runs["trl"]["held_out"], rel=1e-5)
    assert runs["defaults"]["padding"] < 0.5 * runs["trl"]["padding"]
    for name in ("defaults", "lora"):
        peer = runs[name.replace("defaults", "trl").replace("lora", "trl-lora")]
        assert runs[name]["held_out"]["loss"] == pytest.approx(peer["held_out"]["loss"], rel=0.02)
