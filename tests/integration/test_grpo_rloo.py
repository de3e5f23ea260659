"""The grpo and rloo stages on the two-layer model: what rewards are given and score, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import online_rewards
import pytest
import torch

from data_prep.dataset import read_split
from posttrain.errors import PosttrainError, UserError
from posttrain.models import load_reward_model, load_tokenizer, score_ids
from tests.integration.conftest import file_names, load_adapter, read_rows
from train import online

END = 2
"""The id of the end-of-turn token of the fixture tokenizer."""
TRAINER = {
    "max_steps": 3,
    "logging_steps": 1,
    "save_steps": 3,
    "num_generations": 4,
    "max_completion_length": 6,
    "beta": 0.05,
    # A model with random weights hardly ever ends its answer: some do and some do not with this.
    "generation_kwargs": {"sequence_bias": [[[END], 4.0]]},
}
WATCH = {"function": "online_rewards:watch", "weight": 0.0, "arguments": {"factor": 2.0}}


@pytest.fixture(scope="module", params=["grpo", "rloo"])
def done(request, tmp_path_factory, run_stage, tiny_model_dir, tiny_reward_dir, prompt_data) -> Any:
    """One run of each kind with everything that passed through its reward function."""
    kind, run_dir, scored, prompts = request.param, tmp_path_factory.mktemp("runs") / request.param, [], []
    online_rewards.CALLS.clear()
    build = online.reward_function
    trainer_class = online.TRAINERS[type_of(kind)][1]
    tokenize = trainer_class._tokenize_prompts

    def recording(*arguments: Any) -> Any:
        function = build(*arguments)

        def total(**keywords: Any) -> list[float]:
            scores = function(**keywords)
            scored.append((keywords["row"], keywords["completion_ids"], scores))
            return scores

        return total

    def seen(trainer: Any, messages: list[Any]) -> Any:
        result = tokenize(trainer, messages)
        prompts.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "reward_function", recording)
        patch.setattr(trainer_class, "_tokenize_prompts", seen)
        metrics = run_stage(
            kind,
            run_dir,
            model=tiny_model_dir,
            reward=tiny_reward_dir,
            data=prompt_data,
            rewards={"functions": [WATCH]},
            max_prompt_tokens=100,
            trainer=TRAINER,
        )
    return SimpleNamespace(
        kind=kind,
        run_dir=run_dir,
        metrics=metrics,
        scored=scored,
        prompts=prompts,
        calls=list(online_rewards.CALLS),
        rows=read_split(prompt_data, "train", "prompt"),
    )


def type_of(kind: str) -> Any:
    return {name: config for config, (name, _) in online.TRAINERS.items()}[kind]


def test_writes_an_adapter_on_the_reference(done, tiny_model_dir):
    assert file_names(done.run_dir / "model") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in (done.run_dir / "checkpoints").iterdir()} == {"checkpoint-3"}
    settings = json.loads((done.run_dir / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert all(tensor.any() for name, tensor in load_adapter(done.run_dir).items() if "lora_B" in name)
    assert (done.metrics["prompts"], done.metrics["prompts_dropped"], done.metrics["steps"]) == (48, 0, 3)


def test_starts_at_the_reference(done):
    rows = read_rows(done.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6), "the reference is the adapter switched off"
    assert abs(rows[-1]["kl"]) > 1e-4
    assert rows[0].keys() >= {"loss", "reward", "reward_std", "reward/model", "reward/watch", "num_tokens"}
    assert "step_time" not in rows[0]


def test_the_reward_model_scores_the_sampled_ids_with_the_end_token(done, tiny_model_dir, tiny_reward_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    assert tokenizer.eos_token_id == END
    model, calibration = load_reward_model(tiny_reward_dir)
    ended = 0
    for (places, completions, scores), prompts in zip(done.scored, done.prompts, strict=True):
        assert len(places) == 8
        for place, prompt, completion, score in zip(places, prompts, completions, scores, strict=True):
            messages = done.rows[place]["prompt"]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert prompt == rendered, "the policy answered the prompt that is scored"
            assert END not in completion[:-1]
            ended += completion[-1] == END
            assert completion[-1] == END or len(completion) == TRAINER["max_completion_length"]
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                alone = score_ids(model, calibration, ids, torch.ones_like(ids)).item()
            assert score == pytest.approx(alone, abs=1e-5)
    assert 0 < ended < 24, "some answers end and some are cut off"
    first = sum(done.scored[0][2]) / 8
    assert read_rows(done.run_dir)[0]["reward/model"] == pytest.approx(first, abs=1e-5)
    assert read_rows(done.run_dir)[0]["reward"] == pytest.approx(first, abs=1e-5), "weight 0 is only watched"


def test_groups_are_answers_to_one_prompt(done):
    for places, _, _ in done.scored:
        assert [places[0]] * 4 + [places[4]] * 4 == places and places[0] != places[4]


def test_a_function_is_given_what_the_documentation_says(done, tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    assert len(done.calls) == len(done.scored) == 3
    for call, (places, completions, _) in zip(done.calls, done.scored, strict=True):
        assert call["completion_ids"] == completions and call["factor"] == 2.0
        assert call["finished"] == [ids[-1] == END for ids in completions]
        assert call["completions"] == tokenizer.batch_decode(completions, skip_special_tokens=True)
        assert call["prompts"] == [done.rows[place]["prompt"] for place in places]
        for prompt, meta in zip(call["prompts"], call["meta"], strict=True):
            assert json.loads(meta)["facts"]["code"] in prompt[0]["content"]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_constant_reward_teaches_nothing_and_does_not_finish(
    kind, run_stage, tmp_path, tiny_model_dir, prompt_data
):
    fields = {
        "model": tiny_model_dir,
        "data": prompt_data,
        "rewards": {"functions": [{"function": "online_rewards:constant"}]},
        "max_prompt_tokens": 100,
        "trainer": TRAINER | {"beta": 0.0, "max_steps": 1},
    }
    with pytest.raises(PosttrainError, match="training changed none"):
        run_stage(kind, tmp_path / "run", **fields)
    assert not (tmp_path / "run" / "model").exists()


def test_evaluates_on_held_out_prompts_and_replaces_what_did_not_end(
    run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data, monkeypatch
):
    scored: list[tuple[list[int], list[list[int]], list[float]]] = []
    build = online.reward_function

    def recording(*arguments: Any) -> Any:
        function = build(*arguments)

        def total(**keywords: Any) -> list[float]:
            scored.append((keywords["row"], keywords["completion_ids"], function(**keywords)))
            return scored[-1][2]

        return total

    monkeypatch.setattr(online, "reward_function", recording)
    metrics = run_stage(
        "grpo",
        tmp_path / "run",
        model=tiny_model_dir,
        reward=tiny_reward_dir,
        data=prompt_data,
        missing_eos={"mode": "replace", "value": -7.0},
        max_prompt_tokens=100,
        trainer=TRAINER | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    )
    assert "eval_reward/model" in metrics
    held_out = [places for places, _, _ in scored[1:]]
    assert {place for places in held_out for place in places} == set(range(48, 64)), "after the 48 trained on"
    for _, completions, scores in scored:
        cut = [ids[-1] != END for ids in completions]
        assert [score == -7.0 for score in scores] == cut


def test_full_training_loads_a_frozen_reference(
    run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data
):
    run_stage(
        "rloo",
        tmp_path / "run",
        model=tiny_model_dir,
        reward=tiny_reward_dir,
        data=prompt_data,
        max_prompt_tokens=100,
        peft=None,
        trainer=TRAINER | {"max_steps": 2, "learning_rate": 1e-3},
    )
    rows = read_rows(tmp_path / "run")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6) and abs(rows[1]["kl"]) > 1e-5
    assert {"model.safetensors", "generation_config.json"} <= file_names(tmp_path / "run" / "model")


@pytest.mark.parametrize("peft", [{"r": 4}, None])
def test_refuses_an_adapter_as_the_model(
    run_stage, tmp_path, sft_run, tiny_reward_dir, prompt_data: Path, peft
):
    fields = {"model": sft_run, "reward": tiny_reward_dir, "data": prompt_data, "peft": peft}
    with pytest.raises(UserError, match=r"(?s)LoRA adapter.*stage: merge"):
        run_stage("grpo", tmp_path / "run", trainer=TRAINER, **fields)


def test_refuses_answers_that_do_not_fit_the_model(
    run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data
):
    fields = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data}
    trainer = TRAINER | {"max_completion_length": 200}
    with pytest.raises(UserError, match=r"max_prompt_tokens 100 \+ trainer.max_completion_length 200 = 300"):
        run_stage("grpo", tmp_path / "run", max_prompt_tokens=100, trainer=trainer, **fields)
