"""The base stage: a tokenizer and a model from nothing."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

from posttrain.errors import RequeueError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stage import execute_stage
from train import base
from train.base_config import BaseConfig

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FIELDS = {
    "vocab_size": 320,
    "keep_whole": r"K\d{3}",
    "architecture": SIZE,
    "steps": 24,
    "batch_size": 8,
    "max_length": 96,
    "log_every": 5,
    "save_every": 8,
    "bf16": False,
}


def config(data, **overrides) -> BaseConfig:
    return BaseConfig(data=str(data), **(FIELDS | overrides))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, conversation_data):
    run_dir = tmp_path_factory.mktemp("base") / "run"
    execute_stage("base", config(conversation_data), run_dir)
    return run_dir


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def test_files_and_learning(whole_run):
    files = {path.name for path in whole_run.iterdir() if not path.name.startswith(".")}
    assert files >= {"config.yaml", "manifest.json", "metrics.jsonl", "model", "checkpoints"}
    rows = [row["loss"] for row in losses(whole_run) if "loss" in row]
    assert rows[-1] < 0.85 * math.log(320)
    assert rows[-1] < rows[0]


def test_tokenizer_keeps_identifiers_whole_and_round_trips(whole_run):
    tokenizer = load_tokenizer(whole_run / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "Hello Maria, order K123 and \u00e9\u4e2d\U0001f600!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    known = next(token for token in tokenizer.get_added_vocab() if token.startswith(" K"))
    assert len(tokenizer(f"order{known}")["input_ids"]) == 1 + len(tokenizer("order")["input_ids"])


def test_rendered_conversations_end_with_the_end_of_turn_token(whole_run):
    tokenizer = load_tokenizer(whole_run / "model")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rendered = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([i for i, bit in zip(ids, mask, strict=True) if bit]) == "Hello.<|im_end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("way", ["killed", "SIGTERM"])
def test_resumes_to_the_bit(way, whole_run, tmp_path, conversation_data, monkeypatch):
    """Stopped in the middle, started again: same weights, same metrics."""
    run_dir = tmp_path / "run"
    real_step, calls = base._step, []

    def stop_at_13(*args):
        calls.append(1)
        if len(calls) == 13 and way == "killed":
            raise KeyboardInterrupt
        if len(calls) == 13:
            signal.raise_signal(signal.SIGTERM)
        return real_step(*args)

    monkeypatch.setattr(base, "_step", stop_at_13)
    with pytest.raises(KeyboardInterrupt if way == "killed" else RequeueError):
        execute_stage("base", config(conversation_data), run_dir)
    monkeypatch.undo()
    assert not (run_dir / "model").exists()
    last = {"killed": "checkpoint-8", "SIGTERM": "checkpoint-13"}[way]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [last]
    execute_stage("base", config(conversation_data), run_dir)
    whole, resumed = (load_causal_lm(path / "model").state_dict() for path in (whole_run, run_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(run_dir) == losses(whole_run)


def test_prompt_tokens_weigh_what_is_configured(whole_run):
    from datasets import Dataset

    tokenizer = load_tokenizer(whole_run / "model")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    [sequence] = base.encode(tokenizer, Dataset.from_list([{"messages": turns}]), 96, 0.25)
    answer = len(tokenizer("Hello.<|im_end|>")["input_ids"])
    assert sequence.weights == [0.25] * (len(sequence.ids) - answer) + [1.0] * answer


def test_weighted_loss_is_the_mean_over_weights(whole_run):
    model = load_causal_lm(whole_run / "model")
    batch = base.collate(
        [base.Sequence([3, 4, 5], [1, 1, 1]), base.Sequence([6, 7, 8, 9], [1, 1, 0.5, 0])],
        model.config.pad_token_id,
    )
    with torch.no_grad():
        total, weight = base.weighted_loss(model, batch)
        by_hand = 0.0
        for ids, weights in (([3, 4, 5], [1, 1]), ([6, 7, 8, 9], [1, 0.5, 0])):
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            by_hand -= sum(
                w * logprobs[t, token].item()
                for t, (token, w) in enumerate(zip(ids[1:], weights, strict=True))
            )
    assert weight.item() == pytest.approx(3.5)
    assert total.item() == pytest.approx(by_hand, rel=1e-5)


def test_batches_cover_every_row_once_an_epoch_in_a_seeded_order():
    lengths = list(range(100))
    epoch = list(base.batches(lengths, 10, 10, seed=1))
    assert sorted(row for batch in epoch for row in batch) == lengths
    assert epoch == list(base.batches(lengths, 10, 10, seed=1))
    assert epoch != list(base.batches(lengths, 10, 10, seed=2))
