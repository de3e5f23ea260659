"""Which checkpoint may be resumed from.

transformers writes a checkpoint file by file: a process killed half-way leaves a ``checkpoint-9`` that looks
like the newest and cannot be loaded. Here the last thing written to a checkpoint is a file named COMPLETE,
which lists the others with their sizes; a directory without it, or that does not match it, does not exist for
the purpose of resuming.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from posttrain.rundir import fsync_path

MARKER = "COMPLETE"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name ``checkpoint-<step>``."""
    match = _NAME.match(checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of the checkpoint to disk, then write the marker, then flush the directory."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        fsync_path(path)
    partial = checkpoint / f".{MARKER}.partial"
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    partial.write_text(json.dumps(sizes), encoding="utf-8")
    fsync_path(partial)
    os.replace(partial, checkpoint / MARKER)
    fsync_path(checkpoint)
    fsync_path(checkpoint.parent)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it lists has the size it had."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return False
    sizes: dict[str, int] = json.loads(marker.read_text(encoding="utf-8"))
    paths = ((checkpoint / name, size) for name, size in sizes.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def last_complete_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint with the highest step under `root`, or None."""
    complete = [path for path in _checkpoints(root) if is_complete(path)]
    return max(complete, key=step_of, default=None)


def discard_incomplete(root: Path) -> list[Path]:
    """Delete the checkpoints that were not finished and return their paths."""
    partial = [path for path in _checkpoints(root) if not is_complete(path)]
    for path in partial:
        shutil.rmtree(path)
    return partial


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _NAME.match(path.name)]
