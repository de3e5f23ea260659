"""Architectures in one batch, and the text of answers as tokens arrive."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.models import load_tokenizer
from serving.backends.vllm.batching import PagedBatch
from serving.backends.vllm.detokenise import MAX_WINDOW_TOKENS, AnswerText
from serving.backends.vllm.support import choose_batching
from serving.backends.vllm.turns import Turns

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
OLD_SIZES = {"vocab_size": 96, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
COUNT = 12
ARCHITECTURES = {
    "qwen2, one layer of two windowed": (Qwen2ForCausalLM, Qwen2Config, SIZES | WINDOWED, PagedBatch),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SIZES, PagedBatch),
    "mistral, windowed": (MistralForCausalLM, MistralConfig, SIZES | {"sliding_window": 8}, PagedBatch),
    "gpt2": (GPT2LMHeadModel, GPT2Config, OLD_SIZES | {"n_embd": 32, "n_positions": 128}, PagedBatch),
    "gemma2, capped attention": (Gemma2ForCausalLM, Gemma2Config, SIZES | {"sliding_window": 8}, Turns),
    "bloom, biased attention": (BloomForCausalLM, BloomConfig, OLD_SIZES | {"hidden_size": 32}, Turns),
}


def _generate(model, ids):
    ids_1T = torch.tensor([ids])
    output = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


@torch.inference_mode()
def _generate_together(batch, prompts):
    """One prompt more in each step; returns the greedy answers."""
    waiting = {str(number): ids for number, ids in enumerate(prompts)}
    answers = {key: [] for key in waiting}
    left = len(waiting)
    while left:
        if waiting:
            key = next(iter(waiting))
            assert batch.add(key, waiting.pop(key), COUNT, None)
        keys, logits_RV = batch.step()
        for key, token in zip(keys, logits_RV.argmax(-1).tolist(), strict=True):
            answers[key].append(token)
            if len(answers[key]) == COUNT:
                batch.remove(key)
                left -= 1
            else:
                batch.extend(key, token)
    return list(answers.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_answers_as_generate_does(name, caplog, monkeypatch):
    monkeypatch.setattr("serving.backends.vllm.batching.MAX_BATCH_TOKENS", 16)
    model_class, config_class, settings, expected_batch = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**settings, bos_token_id=1, eos_token_id=2)).eval()
    prompts = [[(7 * number + 3 * at) % 96 for at in range(3 + 9 * number)] for number in range(5)]
    expected = [_generate(model, ids) for ids in prompts]
    batch = choose_batching(model, None, 64, 5)()
    assert type(batch) is expected_batch
    assert ("requests take turns" in caplog.text) == (expected_batch is Turns)
    assert _generate_together(batch, prompts) == expected


class _Counting:
    """A tokenizer that remembers how many tokens it was ever asked to decode at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids, **options):
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_tokens_make_the_whole_text(tiny_model_dir, seed):
    """Random tokens, most of them bytes that are no characters, and long runs of multi-byte characters."""
    tokenizer = _Counting(load_tokenizer(tiny_model_dir))
    random.seed(seed)
    ids = []
    for _ in range(12):
        ids += [random.randrange(tokenizer.tokenizer.vocab_size) for _ in range(random.randrange(60))]
        ids += tokenizer.tokenizer(random.choice(["日本語", "🙂🙃", "é è", "plain words", " a"]) * 5)[
            "input_ids"
        ]
    prompt_ids = tokenizer.tokenizer("hello there")["input_ids"]
    text = AnswerText(tokenizer, prompt_ids, ())
    pieces = [text.add(token, last=at == len(ids) - 1)[0] for at, token in enumerate(ids)]
    whole = tokenizer.tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    assert "hello there" + "".join(pieces) == whole
    assert tokenizer.longest <= MAX_WINDOW_TOKENS


def test_a_stop_string_is_found_across_tokens_and_its_beginning_never_sent(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    ids = tokenizer("one two STOP three")["input_ids"]
    text, sent = AnswerText(tokenizer, [], ("STOP", "never")), []
    for token in ids:
        piece, stopped = text.add(token, last=False)
        sent.append(piece)
        if stopped:
            break
    assert stopped
    assert "".join(sent) == "one two "
