"""The preflight of grpo, rloo and of the other trainers on pairs: one broken configuration a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import command, write_stage

GROUPS = {"num_generations": 4, "max_completion_length": 8}


@pytest.fixture
def online_refused(refused, tiny_model_dir, tiny_reward_dir, prompt_data) -> Callable[..., str]:
    """As refused(kind, ...), for the tiny models and prompts."""

    def run(kind: str, key: str, *texts: str, **fields: Any) -> str:
        common = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data}
        trainer = GROUPS | fields.pop("trainer", {})
        return refused(kind, key, *texts, **(common | {"max_prompt_tokens": 64} | fields), trainer=trainer)

    return run


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_reward_model_without_a_score_head(kind, online_refused, tiny_model_dir):
    said = (f"{tiny_model_dir}: holds no score head", "train it with the reward stage")
    online_refused(kind, "reward", *said, reward=tiny_model_dir)


def test_reward_model_as_the_policy(online_refused, tiny_reward_dir):
    said = ("is a reward model, not the SFT model", "set model to the run of the sft or merge stage")
    online_refused("grpo", "model", *said, model=tiny_reward_dir)


def test_adapter_as_the_policy(online_refused, untrained_adapter_dir):
    online_refused("rloo", "model", "is a LoRA adapter", "stage: merge", model=untrained_adapter_dir)


def test_sequences_longer_than_the_models_positions(online_refused):
    said = ("max_prompt_tokens 64 + trainer.max_completion_length 250 = 314 tokens", "at most 256", "lower")
    online_refused("grpo", "max_prompt_tokens", *said, trainer={"max_completion_length": 250})


def test_prompts_that_do_not_fit(online_refused):
    online_refused("grpo", "max_prompt_tokens", "are longer than max_prompt_tokens=3", max_prompt_tokens=3)


def test_lora_names_that_match_nothing(online_refused):
    said = ("`q_prj` matches no module of the model", "did you mean q_proj")
    online_refused("grpo", "peft.target_modules", *said, peft={"target_modules": ["q_prj"]})


@pytest.mark.parametrize("kind", ["kto", "orpo", "cpo"])
def test_pairs_with_two_identical_sides(kind, refused, tiny_model_dir, dataset, make_rows):
    rows = [row | {"rejected": row["chosen"]} for row in make_rows["preference"](8, 0)]
    said = ("8 of 8 pairs (100.0%) have chosen equal to rejected once rendered", "Drop them")
    refused(kind, "data", *said, model=tiny_model_dir, data=dataset("preference", rows))


def test_what_is_trained_in_a_sound_kto_stage_is_shown(warned, tiny_model_dir, preference_data):
    error = warned("kto", "one example as the model sees it", model=tiny_model_dir, data=preference_data)
    assert ">>>" in error and "<|im_end|>" in error.rpartition(">>>")[2]


def test_prompts_for_less_than_one_generation(online_refused):
    said = ("256 answers a generation are 64 prompts x num_generations 4", "has 48 prompts that fit")
    trainer = {"per_device_train_batch_size": 256}
    error = online_refused("grpo", "trainer.per_device_train_batch_size", *said, trainer=trainer)
    assert "use at most 192 answers a generation" in error


def test_prompts_that_no_generation_reaches_are_a_warning(
    warned, tiny_model_dir, tiny_reward_dir, prompt_data
):
    fields = {
        "model": tiny_model_dir,
        "reward": tiny_reward_dir,
        "data": prompt_data,
        "max_prompt_tokens": 64,
    }
    trainer = GROUPS | {"generation_batch_size": 120, "save_steps": 120}
    said = (": trainer.generation_batch_size: ", "the last 18 of 48 prompts fill none and are never used")
    warned("rloo", *said, **fields, trainer=trainer)
    whole = warned("rloo", "one example", **fields, trainer=trainer | {"generation_batch_size": 96})
    assert "never used" not in whole


def test_groups_that_do_not_fill_a_generation(tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data):
    fields = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data}
    file = write_stage(tmp_path, "grpo", fields | {"trainer": {"num_generations": 3}})
    done = command("check", file)
    assert done.exit_code == 2
    assert ": trainer.per_device_train_batch_size: " in done.stderr
    assert "= 4 answers a generation, which is not a multiple of num_generations 3" in done.stderr
    assert "use 6, or num_generations 2 or 4" in done.stderr
