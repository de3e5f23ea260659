"""Two gloo processes of a TRL trainer: one gets SIGTERM, they stop together, and end as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks_sft

from posttrain.rundir import metric_rows
from train.checkpoints import last_complete_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ROOT / "tests" / "integration" / "two_ranks_sft.py"
    finished = subprocess.run(
        [*command, str(program), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_stop_together_and_end_as_one(tmp_path, tiny_model_dir, conversation_data):
    """Step 3 lies between two log rows, so the running means of both are carried over too."""
    two, one = tmp_path / "two", tmp_path / "one"
    launch(tiny_model_dir, conversation_data, two, "3")
    assert [(two / f"place-{rank}").read_text() for rank in (0, 1)] == ["step 3 of 6"] * 2
    checkpoint = last_complete_checkpoint(two / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    launch(tiny_model_dir, conversation_data, two, "0")
    assert [(two / f"place-{rank}").read_text() for rank in (0, 1)] == ["the end"] * 2

    assert two_ranks_sft.train(tiny_model_dir, conversation_data, one, 1, 0, 0) == "the end"
    alone, together = (torch.load(path / "weights.pt", weights_only=True) for path in (one, two))
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=0, atol=1e-5)
    rows = [metric_rows(path / "rank-0") for path in (one, two)]
    assert [row["step"] for row in rows[1]] == [4, 6]
    for mine, theirs in zip(*rows, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert theirs["num_tokens"] == mine["num_tokens"]
