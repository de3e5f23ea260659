"""The PPO benchmark runs, and its numbers are of the run it describes.

The peer takes part where it is installed (`python scripts/bench_ppo.py --quick` installs it).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEER = ROOT / "build" / "trl-1.12.0"


@pytest.mark.slow
def test_quick_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    sides = ["ours", "peer"] if (PEER / "trl").is_dir() else ["ours"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_ppo.py"), "--quick", "--threads", "1"]
    command += ["--sides", *sides, "--peer-path", str(PEER)]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| episodes/s |" in done.stdout

    report = json.loads((tmp_path / "bench.json").read_text())
    settings = report["settings"]
    assert [run["side"] for run in report["runs"]] == sides
    for run in report["runs"]:
        assert len(run["updates"]) == settings["warmup"] + settings["updates"]
    for side in sides:
        summary = report["summary"][side]
        assert summary["episodes_per_second"] == pytest.approx(settings["batch_size"] / summary["seconds"])
        # Expected is half the cap, 8; the mean of 16 responses of standard deviation about 5.5.
        assert 3 < summary["response_length"] < 13
        assert 0 < summary["seconds_rollout"] + summary["seconds_update"] <= summary["seconds"]
        assert 0 < summary["memory"] < summary["memory_absolute"]
    assert report["summary"]["ours"]["floor_seconds"] > 0
