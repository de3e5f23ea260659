"""Two gloo ranks equal one on the same global batch: samples, whitening, losses, KL controller, weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks

HERE = Path(__file__).parent


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    output = tmp_path / "ranks.pt"
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(HERE / "two_ranks.py"), str(output)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = torch.load(output, weights_only=True)
    for name, layout in two_ranks.LAYOUTS.items():
        alone, together = two_ranks.run_case(layout), ranks[name]
        assert (alone["processes"], together["processes"]) == (1, 2)
        for one, two in zip(alone["rows"], together["rows"], strict=True):
            assert two == pytest.approx(one, abs=1e-5, rel=1e-4)
        for parameter, weight in alone["weights"].items():
            torch.testing.assert_close(together["weights"][parameter], weight, rtol=0, atol=1e-5)
