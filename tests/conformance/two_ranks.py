"""One process of the two-rank test: run a few updates, let the first one write metrics and weights.

torchrun --nproc-per-node 2 two_ranks.py OUTPUT.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ppo_tiny import LAYOUTS, ppo_config, ppo_trainer, weights, without_timings

UPDATES = 3


def run_case(layout: dict[str, Any]) -> dict[str, Any]:
    """Metrics rows and final weights of a short run with every statistic that crosses processes."""
    config = ppo_config(
        **layout,
        batch_size=16,
        micro_batch_size=3,
        num_mini_batches=2,
        whiten_rewards=True,
        max_grad_norm=0.5,
        kl_controller={"type": "adaptive", "target": 0.5, "horizon": 64},
    )
    trainer = ppo_trainer(config)
    rows = [without_timings(trainer.run_update()) for _ in range(UPDATES)]
    return {"rows": rows, "weights": weights(trainer), "processes": trainer.accelerator.num_processes}


if __name__ == "__main__":
    results = {name: run_case(layout) for name, layout in LAYOUTS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
