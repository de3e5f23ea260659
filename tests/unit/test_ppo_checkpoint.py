"""Atomic checkpoints: what counts as complete, what is kept, what is restored."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from posttrain.errors import PosttrainError
from train.ppo.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from train.ppo.held_out import Best


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def parameters() -> dict[str, nn.Parameter]:
    return {"weight": nn.Parameter(torch.arange(3.0)), "bias": nn.Parameter(torch.ones(1))}


def steps(root: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(root)]


def test_round_trip_restores_weights_state_and_random_numbers(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    save_checkpoint(tmp_path, 3, parameters(), {"step": 3, "kl_coef": 0.1}, accelerator, keep=2)
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    other = {name: nn.Parameter(torch.zeros_like(p)) for name, p in parameters().items()}
    state = load_checkpoint(complete_checkpoints(tmp_path)[-1], other, accelerator)
    assert state == {"step": 3, "kl_coef": 0.1}
    assert torch.equal(other["weight"], torch.arange(3.0))
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_the_best_weights_go_back_with_the_checkpoint(tmp_path: Path, accelerator: Accelerator) -> None:
    """A run killed after a better evaluation than the checkpoint knows of resumes with the checkpoint's."""
    best = Best(tmp_path / "best.pt", max_kl=None)
    known, later = {"weight": nn.Parameter(torch.ones(2))}, {"weight": nn.Parameter(torch.zeros(2))}
    assert best.offer(1, {"held_out_score": 0.5, "held_out_kl": 0.0})
    best.save(known)
    state = {"best": best.state_dict()}
    save_checkpoint(tmp_path, 2, parameters(), state, accelerator, keep=2, companions=best.files)
    assert best.offer(3, {"held_out_score": 0.9, "held_out_kl": 0.0})
    best.save(later)

    checkpoint = complete_checkpoints(tmp_path)[-1]
    for _ in range(2):
        resumed = Best(tmp_path / "best.pt", max_kl=None)
        resumed.load_state_dict(load_checkpoint(checkpoint, parameters(), accelerator)["best"])
        resumed.recall(checkpoint.path)
        found = {"weight": nn.Parameter(torch.full((2,), 7.0))}
        resumed.restore(found)
        assert (resumed.step, found["weight"].tolist()) == (1, [1.0, 1.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-2"]


def test_a_checkpoint_that_knows_no_best_leaves_none(tmp_path: Path, accelerator: Accelerator) -> None:
    best = Best(tmp_path / "best.pt", max_kl=None)
    save_checkpoint(tmp_path, 2, parameters(), {}, accelerator, keep=2, companions=best.files)
    best.save({"weight": nn.Parameter(torch.zeros(2))})
    best.recall(complete_checkpoints(tmp_path)[-1].path)
    assert best.files == []


def test_keeps_the_last_ones_by_number(tmp_path: Path, accelerator: Accelerator) -> None:
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, parameters(), {}, accelerator, keep=2)
    assert steps(tmp_path) == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_folders_without_marker_and_shortened_files_do_not_count(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, parameters(), {}, accelerator, keep=5)
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-9" / "weights.pt").write_bytes(b"half")
    (tmp_path / ".step-10.partial").mkdir()
    with open(tmp_path / "step-3" / "weights.pt", "r+b") as file:
        file.truncate(10)
    (tmp_path / "step-2" / "state.pt").unlink()
    assert steps(tmp_path) == [1]


def test_saves_over_the_remains_of_an_interrupted_save(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / ".step-4.partial").mkdir(parents=True)
    (tmp_path / ".step-4.partial" / "left-over").write_text("x")
    (tmp_path / "step-4").mkdir()
    save_checkpoint(tmp_path, 4, parameters(), {}, accelerator, keep=1)
    assert steps(tmp_path) == [4]
    assert not (tmp_path / "step-4" / "left-over").exists()


def test_another_model_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    save_checkpoint(tmp_path, 1, parameters(), {}, accelerator, keep=1)
    with pytest.raises(PosttrainError, match="does not fit this model.*other"):
        load_checkpoint(
            complete_checkpoints(tmp_path)[-1],
            parameters() | {"other": nn.Parameter(torch.ones(1))},
            accelerator,
        )


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "missing") == []
