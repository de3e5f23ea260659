"""N updates, a checkpoint, a new process's worth of objects, N more: equal to 2N in one go, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppo_tiny import ppo_config, ppo_trainer, weights, without_timings
from torch import nn

from train.ppo.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from train.ppo.trainer import PpoTrainer

SETTINGS = {
    "num_mini_batches": 2,
    "whiten_rewards": True,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "kl_controller": {"type": "adaptive", "target": 0.5, "horizon": 16},
}


def trained(trainer: PpoTrainer) -> dict[str, nn.Parameter]:
    return trainer.updater.trained["policy"] | trainer.updater.trained["value"]


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, layout: dict[str, Any], stop: int) -> None:
    config = ppo_config(**layout, **SETTINGS)
    whole = ppo_trainer(config)
    expected = [without_timings(whole.run_update()) for _ in range(6)]

    first = ppo_trainer(config)
    rows = [without_timings(first.run_update()) for _ in range(stop)]
    save_checkpoint(tmp_path, stop, trained(first), first.state_dict(), first.accelerator, keep=2)
    first.run_update()  # lost work: it must leave no trace
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "weights.pt").write_bytes(b"cut short")

    for scramble in (random.seed, np.random.seed, torch.manual_seed):
        scramble(1234)
    second = ppo_trainer(config)
    checkpoint = complete_checkpoints(tmp_path)[-1]
    assert checkpoint.step == stop
    second.load_state_dict(load_checkpoint(checkpoint, trained(second), second.accelerator))
    rows += [without_timings(second.run_update()) for _ in range(6 - stop)]

    assert rows == expected
    assert len({row["kl_coef"] for row in rows}) > 3
    ours, theirs = weights(second), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    rows = [without_timings(ppo_trainer(ppo_config(seed=seed)).run_update()) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
