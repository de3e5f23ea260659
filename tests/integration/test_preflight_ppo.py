"""The preflight of PPO: one broken configuration a test. Exit code 2; key, value and remedy in the message;
nothing written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import PEFT
from train.preflight import disk


@pytest.fixture
def ppo_refused(refused, tiny_model_dir, tiny_reward_dir, prompt_data) -> Callable[..., str]:
    """As refused("ppo", ...), for the tiny models and prompts."""

    def run(key: str, *texts: str, **fields: Any) -> str:
        common = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data, "peft": PEFT}
        sizes = {"batch_size": 8, "max_prompt_tokens": 64, "max_new_tokens": 8}
        return refused("ppo", key, *texts, **(common | sizes | fields))

    return run


def test_ppo_layout_that_the_reward_model_does_not_allow(ppo_refused):
    ppo_refused("layout", "shared is not possible", "is a full model", "Use layout: full", layout="shared")


def test_ppo_reward_model_on_another_base(ppo_refused, variant, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from posttrain.models import load_tokenizer

    other = variant()
    (other / "generation_config.json").unlink()
    base = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"], **PEFT)
    get_peft_model(base, lora).save_pretrained(tmp_path / "reward")
    load_tokenizer(other).save_pretrained(tmp_path / "reward")
    said = (f"the reward model's base ({other}) is not the policy's", "Use layout: full")
    ppo_refused("layout", *said, reward=tmp_path / "reward", layout="shared")


def test_ppo_adapter_under_a_second_one(ppo_refused, untrained_adapter_dir):
    ppo_refused(
        "model",
        f"{untrained_adapter_dir} is a LoRA adapter",
        "Merge it first",
        model=untrained_adapter_dir,
        layout="full",
    )


def test_ppo_lora_that_is_not_that_of_the_adapter_it_continues(ppo_refused, untrained_adapter_dir):
    said = ("peft asks for r 8 (the adapter has 4)", "Give peft the adapter's values")
    functions = {"functions": [{"function": "ppo_rewards:later_is_worse", "weight": 1.0}]}
    fields = {"model": untrained_adapter_dir, "peft": PEFT | {"r": 8}, "reward": None, "rewards": functions}
    ppo_refused("model", *said, **fields)


def test_ppo_reward_model_without_a_score_head(ppo_refused, tiny_model_dir):
    said = (f"{tiny_model_dir}: holds no score head", "train it with the reward stage")
    ppo_refused("reward", *said, reward=tiny_model_dir)


def test_ppo_reward_model_as_the_policy(ppo_refused, tiny_reward_dir):
    said = ("is a reward model, not the SFT model", "set model to the run of the sft or merge stage")
    ppo_refused("model", *said, model=tiny_reward_dir)


def test_ppo_reward_template_that_writes_no_answer(ppo_refused, variant, tiny_reward_dir):
    reward = variant("message['role'] == 'assistant'", "false", source=tiny_reward_dir)
    template = reward / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "''"))
    ppo_refused(
        "reward", "does not write the assistant's answer", "use a reward model whose template", reward=reward
    )


def test_ppo_prompts_that_do_not_fit(ppo_refused):
    said = (
        "all 48 are longer than max_prompt_tokens=3, the shortest has",
        "Raise it or curate shorter prompts",
    )
    ppo_refused("max_prompt_tokens", *said, max_prompt_tokens=3)


def test_ppo_prompts_most_of_which_do_not_fit(ppo_refused, dataset, make_rows):
    prompts = make_rows["prompt"](10, 0)
    for row in prompts[:6]:
        row["prompt"] = [{"role": "user", "content": "please " * 60}]
    said = (
        "6 of 10 prompts (60.0%) are longer than max_prompt_tokens=64",
        "up to 50%",
        "raise max_prompt_tokens",
    )
    ppo_refused("max_prompt_tokens", *said, data=dataset("prompt", prompts))


def test_ppo_sequences_longer_than_the_models_positions(ppo_refused):
    said = ("max_prompt_tokens 250 + max_new_tokens 20 = 270", "reads at most 256", "lower one of the two")
    ppo_refused("max_prompt_tokens", *said, max_prompt_tokens=250, max_new_tokens=20)


def test_ppo_batch_that_does_not_divide_among_the_processes(ppo_refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    ppo_refused("batch_size", "batch_size 8 is not divisible by 3 processes", "use a multiple of 3")


def test_ppo_without_room_on_the_disk(ppo_refused, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 100_000)
    ppo_refused(
        "save_total_limit", "4 checkpoints of", "100.0 kB free", "choose another disk", save_total_limit=3
    )


@pytest.mark.usefixtures("old_gpu")
def test_ppo_bf16_that_the_gpu_lacks(ppo_refused):
    ppo_refused("bf16", "true, but Tesla T4 does not compute in bfloat16", "set bf16: false", bf16=True)


@pytest.mark.usefixtures("old_gpu")
def test_more_processes_than_gpus(ppo_refused, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ppo_refused("", "2 processes on this machine share 1 GPU(s)", "torchrun --nproc-per-node 1")
