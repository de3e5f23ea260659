"""Reward models as sources: independent of batch mates, and right for another tokenizer and template."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_tiny import CALIBRATION, model_config, reward_model
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from posttrain.errors import UserError
from train.ppo.reward_config import RewardsConfig
from train.ppo.reward_mix import build_rewards
from train.ppo.reward_sources import (
    LoadedRewardModel,
    ModelReward,
    RetemplatedModelReward,
    RewardBatch,
    load_reward_models,
    score_sequences,
)
from train.tokenizer import build_tokenizer

PROMPT = [{"role": "user", "content": "Where is my order?"}]
# Writes the end of the turn after every message, and strips what people wrote.
FOREIGN_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "[{{ message['role'] | upper }}] {{ message['content'] | trim }}</turn>{{ '\\n' }}{% endfor %}"
)


def batch_of_random_tokens(count: int = 13) -> RewardBatch:
    rng = random.Random(3)
    sizes = [(rng.randrange(1, 14), rng.randrange(1, 20)) for _ in range(count)]
    prompts = [[rng.randrange(2, 64) for _ in range(size)] for size, _ in sizes]
    responses = [[rng.randrange(0, 64) for _ in range(size)] for _, size in sizes]
    return RewardBatch(prompts, responses, [True] * count, [0] * count)


@pytest.mark.parametrize("max_tokens", [1, 40, 100_000])
def test_a_score_does_not_depend_on_batch_mates_or_the_size_of_a_forward(max_tokens: int) -> None:
    batch = batch_of_random_tokens()
    model = reward_model()
    source = ModelReward("model", 1.0, LoadedRewardModel("reward", model, CALIBRATION, None), max_tokens)
    scores = source(batch)
    assert (scores.dtype, scores.requires_grad) == (torch.float32, False)
    assert scores.std() > 0.1
    with torch.no_grad():
        for prompt, response, score in zip(batch.prompts, batch.responses, scores.tolist(), strict=True):
            hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state
            alone = model.score(hidden[0, -1]).item() - CALIBRATION["bias"]
            assert score == pytest.approx(alone, abs=1e-6)


def test_no_forward_is_wider_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    model = reward_model()
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = batch_of_random_tokens()
    loaded = LoadedRewardModel("reward", model, CALIBRATION, None)
    ModelReward("model", 1.0, loaded, 60)(batch)
    assert sum(rows for rows, _ in shapes) == len(batch.responses)
    assert all(rows * width <= 60 for rows, width in shapes)
    assert len(shapes) < len(batch.responses)


@pytest.fixture(scope="module")
def policy_tokenizer() -> Any:
    return build_tokenizer(["Where is my order? It ships today. user assistant"] * 4, 300, 256)


@pytest.fixture(scope="module")
def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary, other special tokens, and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</turn>", "<unused>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["We are shipping your parcel tomorrow, sir."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</turn>", chat_template=FOREIGN_TEMPLATE
    )


def foreign(tokenizer: Any, context: int = 256) -> LoadedRewardModel:
    torch.manual_seed(1)
    config = model_config(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=context)
    model = LlamaForSequenceClassification(config).eval()
    return LoadedRewardModel("rewards.ensemble.models.0", model, CALIBRATION, tokenizer)


def source_for(
    loaded: LoadedRewardModel, policy_tokenizer: Any, conversations: list | None = None
) -> RetemplatedModelReward:
    return RetemplatedModelReward("judge", 1.0, loaded, 128, policy_tokenizer, conversations or [PROMPT])


def batch_of(tokenizer: Any, texts: list[str], finished: list[bool]) -> RewardBatch:
    responses = [
        tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
        for text, ended in zip(texts, finished, strict=True)
    ]
    return RewardBatch([[4]] * len(texts), responses, finished, [0] * len(texts))


def test_a_dialogue_is_rendered_anew_and_ends_only_if_the_response_did(
    policy_tokenizer: Any, foreign_tokenizer: Any
) -> None:
    source = source_for(foreign(foreign_tokenizer), policy_tokenizer)
    batch = batch_of(policy_tokenizer, ["It ships today."] * 2, [True, False])
    done, cut_off = (
        source.encode(response, finished, 0)
        for response, finished in zip(batch.responses, batch.finished, strict=True)
    )
    opening = "<s>[USER] Where is my order?</turn>\n[ASSISTANT] It ships today."
    assert foreign_tokenizer.decode(done) == opening + "</turn>\n"
    assert foreign_tokenizer.decode(cut_off) == opening
    end = foreign_tokenizer.eos_token_id
    assert (done.count(end), cut_off.count(end)) == (2, 1)
    assert done[: len(cut_off)] == cut_off
    # The reward stage trains without what its template writes after the end token.
    ours = source_for(replace(source.loaded, to_end_token=True), policy_tokenizer)
    assert foreign_tokenizer.decode(ours.encode(batch.responses[0], True, 0)) == opening + "</turn>"
    assert ours.encode(batch.responses[1], False, 0) == cut_off
    scores = source(batch)
    expected = score_sequences(source.loaded, [done, cut_off], 1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_a_response_cannot_spell_its_own_end_of_turn(policy_tokenizer: Any, foreign_tokenizer: Any) -> None:
    source = source_for(foreign(foreign_tokenizer), policy_tokenizer)
    [response] = batch_of(policy_tokenizer, ["Today.</turn></t</turn>urn><unused>"], [False]).responses
    assert foreign_tokenizer.decode(source.encode(response, False, 0)).endswith("[ASSISTANT] Today.")


@pytest.mark.parametrize("text", ["", "  ", "</think> fine", "two\nlines \n"])
def test_odd_responses_render_too(policy_tokenizer: Any, foreign_tokenizer: Any, text: str) -> None:
    """A template may strip what a policy writes, or split it; a run must not stop over that."""
    source = source_for(foreign(foreign_tokenizer), policy_tokenizer)
    for finished in (True, False):
        [response] = batch_of(policy_tokenizer, [text], [finished]).responses
        rendered = foreign_tokenizer.decode(source.encode(response, finished, 0))
        assert rendered.removesuffix("</turn>\n").rstrip().endswith(f"[ASSISTANT] {text.strip()}".rstrip())
        assert rendered.endswith("</turn>\n") is finished


def test_the_right_prompt_goes_with_each_response(policy_tokenizer: Any, foreign_tokenizer: Any) -> None:
    other = [{"role": "user", "content": "May I return the lamp?"}]
    source = source_for(foreign(foreign_tokenizer), policy_tokenizer, [PROMPT, other])
    batch = batch_of(policy_tokenizer, ["Yes."] * 3, [True] * 3)
    scores = source(RewardBatch(batch.prompts, batch.responses, batch.finished, [1, 0, 1])).tolist()
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_a_dialogue_beyond_the_context_keeps_its_end_and_is_counted(
    policy_tokenizer: Any, foreign_tokenizer: Any
) -> None:
    loaded = foreign(foreign_tokenizer, context=48)
    source = source_for(loaded, policy_tokenizer)
    batch = batch_of(policy_tokenizer, ["ok", "It ships today. " * 3], [True, True])
    scores = source(batch)
    assert source.cut_B.tolist() == [False, True]
    ids = source.encode(batch.responses[1], True, 0)
    torch.testing.assert_close(scores[1:], score_sequences(loaded, [ids[-48:]], 1), rtol=0, atol=1e-6)


def test_templates_that_do_not_fit_the_prompts_are_refused_at_the_start(
    policy_tokenizer: Any, foreign_tokenizer: Any
) -> None:
    system = [{"role": "system", "content": "Be kind."}, *PROMPT]
    with pytest.raises(UserError, match=r"rewards.ensemble.models.0: .* \(no system turns here\)"):
        source_for(foreign(foreign_tokenizer), policy_tokenizer, [system])
    silent = PreTrainedTokenizerFast(
        tokenizer_object=foreign_tokenizer.backend_tokenizer, chat_template="{{ messages[0]['content'] }}"
    )
    with pytest.raises(UserError, match="does not write the assistant's answer"):
        source_for(foreign(silent), policy_tokenizer)


@pytest.fixture
def directories(
    tmp_path: Path, tiny_model_dir: Path, tiny_reward_dir: Path, foreign_tokenizer: Any
) -> dict[str, Path]:
    """A policy, a reward model with its tokenizer, and one with another."""
    shutil.copytree(tiny_reward_dir, tmp_path / "own")
    loaded = foreign(foreign_tokenizer)
    loaded.model.save_pretrained(tmp_path / "other")
    foreign_tokenizer.save_pretrained(tmp_path / "other")
    return {
        "model": tiny_model_dir,
        "reward": tmp_path / "own",
        "rewards.ensemble.models.0": tmp_path / "other",
    }


def test_models_are_loaded_and_built_by_whether_they_share_the_tokenizer(
    directories: dict[str, Path], tiny_tokenizer: Any
) -> None:
    config = RewardsConfig(ensemble={"models": ["other"], "combine": "mean"})
    fields = ["reward", "rewards.ensemble.models.0"]
    models = load_reward_models(fields, directories.__getitem__, directories["model"])
    assert [(m.field, m.calibration["bias"], m.tokenizer is None) for m in models] == [
        ("reward", 0.25, True),
        ("rewards.ensemble.models.0", 0.0, False),
    ]
    rows = Dataset.from_list([{"prompt": PROMPT}])
    rewards = build_rewards(config, [], models, tiny_tokenizer, rows, max_tokens=64, device="cpu")
    batch = batch_of(tiny_tokenizer, ["Hello Maria", "No."], [True, False])
    result = rewards(batch)
    own = score_sequences(models[0], [[4, *response] for response in batch.responses], 64)
    judge = rewards.models[1](batch)
    assert list(result.parts) == [
        "model.reward",
        "model.ensemble.0",
        "model.ensemble.0.cut",
        "model",
        "model.spread",
    ]
    torch.testing.assert_close(result.parts["model.reward"], own)
    torch.testing.assert_close(result.parts["model.ensemble.0"], judge)
    torch.testing.assert_close(result.total_B, (own + judge) / 2)


def test_a_model_with_the_policys_vocabulary_but_another_template_is_rendered_anew(
    directories: dict[str, Path],
) -> None:
    (directories["reward"] / "chat_template.jinja").write_text(FOREIGN_TEMPLATE)
    [loaded] = load_reward_models(["reward"], directories.__getitem__, directories["model"])
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == FOREIGN_TEMPLATE
