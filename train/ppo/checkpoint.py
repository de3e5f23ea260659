"""Atomic checkpoints: `checkpoints/step-N/` holds trained weights, trainer state, the random state of every
process and, written last, COMPLETE, which lists the files and their sizes. A folder without it does not
exist for a resume.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.rundir import fsync_path

MARKER = "COMPLETE"
WEIGHTS, STATE = "weights.pt", "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def save_checkpoint(
    root: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    state: dict[str, Any],
    accelerator: Accelerator,
    keep: int,
    companions: Sequence[Path] = (),
) -> None:
    """Write step-N beside its final place, fsync, mark it complete, rename; then drop all but the last
    `keep`.

    companions: finished files that belong to it, taken in as they are now. Called by all processes. Raises
    OSError when the disk is full or not writable; what was there stays valid.
    """
    staging = root / f".step-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _write(staging / f"random-{accelerator.process_index}.pt", _random_state())
    if accelerator.is_main_process:
        _write(staging / WEIGHTS, _on_cpu(parameters))
        _write(staging / STATE, state)
        for companion in companions:
            share_file(companion, staging / companion.name)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        with open(staging / MARKER, "w", encoding="utf-8") as file:
            json.dump({"step": step, "processes": accelerator.num_processes, "files": sizes}, file)
            os.fsync(file.fileno())
        fsync_path(staging)
        final = root / f"step-{step}"
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        fsync_path(root)
        for old in complete_checkpoints(root)[:-keep]:
            shutil.rmtree(old.path)
    accelerator.wait_for_everyone()


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """Checkpoints whose marker is there and whose files have the sizes it lists, oldest first."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and _is_complete(path):
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def load_checkpoint(
    checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], accelerator: Accelerator
) -> dict[str, Any]:
    """Copy the weights into `parameters`, restore this process's random state, return the trainer state.

    Raises UserError when the checkpoint was written by another number of processes or for other parameters.
    """
    processes = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))["processes"]
    if processes != accelerator.num_processes:
        raise UserError(
            f"{checkpoint.path} was written by {processes} processes and this run has "
            f"{accelerator.num_processes}: start it with the same number, or delete the "
            "checkpoints folder to begin again"
        )
    read_weights(checkpoint.path / WEIGHTS, parameters)
    _restore_random_state(_read(checkpoint.path / f"random-{accelerator.process_index}.pt"))
    return _read(checkpoint.path / STATE)


def write_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Write the weights beside `file` and rename: there is never half a file of this name."""
    partial = file.with_suffix(".partial")
    _write(partial, _on_cpu(parameters))
    partial.replace(file)
    fsync_path(file.parent)


def share_file(source: Path, target: Path) -> None:
    """Make `target` what `source` is now, by a hard link where the file system has them, else by a copy.

    Files here are replaced and never written to, so neither sees what becomes of the other.
    """
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        fsync_path(partial)
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming one link of a file to another does nothing
    fsync_path(target.parent)


def read_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Copy the weights in `file` into `parameters`. Raises UserError when their names differ."""
    weights: dict[str, Tensor] = _read(file)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise UserError(
            f"{file} does not fit this model: {len(odd)} parameters are in one and not in the other, the "
            f"first is {odd[0]}. Delete the checkpoints folder to begin again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _on_cpu(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in parameters.items()}


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    if not marker.is_file():
        return False
    sizes = json.loads(marker.read_text(encoding="utf-8"))["files"]
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items()
    )


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
