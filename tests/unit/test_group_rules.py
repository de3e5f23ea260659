"""Groups of answers of grpo and rloo: refused where TRL refuses them, with settings that would do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from posttrain.errors import Problem
from train.group_rules import group_rules
from train.online_config import GrpoConfig, RlooConfig
from train.trainer_args import build_args, check

ONLINE = {"grpo": GrpoConfig, "rloo": RlooConfig}


def make(kind: str, trainer: dict[str, Any]) -> GrpoConfig | RlooConfig:
    return ONLINE[kind](model="m", data="d", reward="r", trainer=trainer)


@pytest.mark.parametrize(
    ("kind", "block", "world", "field", "message", "remedy"),
    [
        (
            "grpo",
            {"num_generations": 3},
            1,
            "per_device_train_batch_size",
            "per_device_train_batch_size 8 x 1 process(es) x gradient_accumulation_steps 1 = 8 answers a "
            "generation, which is not a multiple of num_generations 3",
            "use 9, or num_generations 2 or 4",
        ),
        (
            "grpo",
            {"num_generations": 12, "per_device_train_batch_size": 2, "steps_per_generation": 3},
            2,
            "per_device_train_batch_size",
            "2 x 2 process(es) x steps_per_generation 3 = 12",
            None,
        ),
        (
            "rloo",
            {"num_generations": 8, "per_device_train_batch_size": 2, "steps_per_generation": 3},
            2,
            "per_device_train_batch_size",
            "2 x 2 process(es) x steps_per_generation 3 = 12 answers a generation",
            "use 4, or num_generations 4 or 6",
        ),
        ("rloo", {"generation_batch_size": 12}, 1, "generation_batch_size", "12 is not", "a multiple of 8"),
        (
            "rloo",
            {"generation_batch_size": 16, "num_generations": 3},
            1,
            "generation_batch_size",
            "16 is not a multiple of num_generations 3",
            "use 24, or num_generations 2 or 4",
        ),
        (
            "grpo",
            {"generation_batch_size": 16, "steps_per_generation": 2},
            1,
            "generation_batch_size",
            "says again",
            "remove one",
        ),
        (
            "grpo",
            {"eval_strategy": "steps", "per_device_eval_batch_size": 6},
            1,
            "per_device_eval_batch_size",
            "6 x 1 process(es) is not a multiple of the 8 answers",
            "use 8",
        ),
        ("rloo", {"num_generations": 1}, 1, "num_generations", "1: an answer is measured", "2 or more"),
        ("grpo", {"temperature": 0.0}, 1, "temperature", "all answers to a prompt would be", "1.0 is usual"),
        ("grpo", {"top_k": 1}, 1, "top_k", "every advantage 0", "more than 1"),
        ("rloo", {"generation_kwargs": {"do_sample": False}}, 1, "generation_kwargs", "the same", "remove"),
    ],
)
def test_groups_of_answers(kind, block, world, field, message, remedy, monkeypatch):
    """One problem of its own field; where TRL would refuse too, with what is advised it does not."""
    if world > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
    found = group_rules(make(kind, block))
    if remedy is None:
        assert found == []
        return
    [(where, what, advice)] = found
    assert where == field and message in what and remedy in advice
    if world == 1:
        assert check(make(kind, block), "run.yaml: stages.x") == [
            Problem(f"run.yaml: stages.x.trainer.{field}", what, advice)
        ]


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("per_device", [2, 6, 8])
@pytest.mark.parametrize("generations", [2, 3, 4, 5])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}, {"generation_batch_size": 24}])
def test_groups_are_refused_exactly_where_trl_refuses_them(kind, per_device, generations, more, tmp_path):
    block = {"per_device_train_batch_size": per_device, "num_generations": generations} | more
    found = group_rules(make(kind, block))
    try:
        build_args(make(kind, block), tmp_path)
    except ValueError:
        assert len(found) == 1
        field, _, advice = found[0]
        number = int(re.match(r"use (?:a multiple of )?(\d+)", advice).group(1))
        number *= generations if "multiple" in advice else 1
        build_args(make(kind, block | {field: number}), tmp_path)
    else:
        assert found == []
