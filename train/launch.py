"""What the environment says about how this process was started, before torch.distributed believes it."""

from __future__ import annotations

import os

from posttrain.errors import Problem


def world_size() -> int:
    """WORLD_SIZE of the environment, which `launch_problems` has accepted; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_problems(where: str) -> list[Problem]:
    """A problem for a WORLD_SIZE that is no number of processes, or that no launcher has set."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        message = f"WORLD_SIZE in the environment is {text!r}, not a number of processes"
        return [Problem(where, message, "unset it, or start with torchrun, which sets it", here=True)]
    if int(text) > 1 and "RANK" not in os.environ:
        message = f"WORLD_SIZE is {text}, but RANK is not set: no launcher has started this process"
        remedy = f"start with torchrun --nproc-per-node {text}, or unset WORLD_SIZE"
        return [Problem(where, message, remedy, here=True)]
    return []
