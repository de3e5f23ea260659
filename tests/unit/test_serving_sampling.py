"""Sampling parameters: defaults, refusals, and the distribution a token is drawn from."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from serving.backends.vllm.drawing import draw
from serving.backends.vllm.sampling import RequestError, SamplingParams, parse


def test_defaults_are_those_of_vllm():
    assert parse("{}", 1024) == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16)
    assert parse("{}", 4).max_tokens == 4


def test_values_are_taken_over():
    text = json.dumps(
        {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": -1,
            "seed": 7,
            "max_tokens": 9,
            "stop": "\n",
            "stop_token_ids": [3],
            "ignore_eos": True,
            "logprobs": 2,
            "n": 1,
            "repetition_penalty": 1.0,
        }
    )
    assert parse(text, 16) == SamplingParams(0.0, 0.5, 0, 7, 9, ("\n",), (3,), True, 2)
    assert parse(text, 16).greedy
    assert parse('{"stop": ["a", "b"]}', 16).stop == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "must be a JSON object, not list"),
        ("null", "must be a JSON object, not NoneType"),
        ("[" * 100_000, "not valid JSON"),
        ('{"max_tokens": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"temperature": -0.1}', "temperature must be a number"),
        ('{"temperature": NaN}', "temperature must be a number"),
        ('{"temperature": Infinity}', "temperature must be a number"),
        ('{"temperature": "0"}', "temperature must be a number"),
        ('{"temperature": true}', "temperature must be a number"),
        ('{"temperature": null}', "temperature must be a number"),
        ('{"top_p": 0}', "top_p must be a number"),
        ('{"top_k": -2}', "top_k must be an integer"),
        ('{"max_tokens": 0}', "max_tokens must be an integer from 1 to 64"),
        ('{"max_tokens": 65}', "max_tokens must be an integer from 1 to 64"),
        ('{"max_tokens": 1.5}', "max_tokens must be an integer"),
        ('{"seed": 1e30}', "seed must be an integer"),
        ('{"stop": [""]}', "stop must be"),
        ('{"stop": [1]}', "stop must be"),
        ('{"stop_token_ids": [true]}', "stop_token_ids must be"),
        ('{"ignore_eos": 1}', "ignore_eos must be true or false"),
        ('{"logprobs": 21}', "logprobs must be an integer from 0 to 20"),
        ('{"temprature": 1}', "unknown sampling parameters: temprature"),
        ('{"n": 0}', "n must be an integer from 1 to 16"),
        ('{"n": 17}', "n must be an integer from 1 to 16"),
        ('{"n": 2, "best_of": 2}', "'best_of' is not supported"),
        ('{"repetition_penalty": 1.1}', "'repetition_penalty' is not supported"),
        ('{"lora_name": 3}', "lora_name must be a string"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(RequestError, match=message):
        parse(text, 64)


def _frequencies(logits, params, count=4000):
    generator = torch.Generator().manual_seed(0)
    rows = draw(logits.expand(count, -1), [params] * count, [generator] * count)
    return {token: number / count for token, number in Counter(rows).items()}


def test_greedy_takes_the_likeliest():
    assert draw(torch.tensor([[0.1, 3.0, 2.9]]), [SamplingParams(temperature=0.0)], [torch.Generator()]) == [
        1
    ]


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.softmax(logits / 2.0, dim=-1)
    seen = _frequencies(logits, SamplingParams(temperature=2.0))
    for token in range(3):
        assert abs(seen[token] - float(expected[token])) < 0.03


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.4]))
    assert set(_frequencies(logits, SamplingParams(top_k=2), 500)) == {1, 2}
    # The smallest set that reaches 0.6 needs the second token; 0.5 is reached by the first alone.
    assert set(_frequencies(logits, SamplingParams(top_p=0.6), 500)) == {1, 2}
    assert set(_frequencies(logits, SamplingParams(top_p=0.49), 500)) == {1}
    # top_p applies to what top_k leaves: 0.5 / 0.9 = 0.56 of it is the first token.
    assert set(_frequencies(logits, SamplingParams(top_k=2, top_p=0.55), 500)) == {1}


def _draws(logits, params, seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    return [draw(logits[None], [params], [generator])[0] for _ in range(count)]


def test_the_seed_decides():
    logits, params = torch.zeros(50), SamplingParams(temperature=1.0)
    assert _draws(logits, params, 1) == _draws(logits, params, 1)
    assert _draws(logits, params, 1) != _draws(logits, params, 2)


def test_what_is_drawn_does_not_depend_on_the_other_rows():
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5, top_p=0.8),
        SamplingParams(top_k=5),
        SamplingParams(temperature=2.0, top_p=0.99),
    ]
    logits = torch.randn(len(kinds), 300, generator=torch.Generator().manual_seed(0)) * 3
    together = draw(logits, kinds, [torch.Generator().manual_seed(seed) for seed in range(len(kinds))])
    alone = [
        _draws(row, params, seed, 1)[0] for seed, (row, params) in enumerate(zip(logits, kinds, strict=True))
    ]
    assert together == alone


def test_the_nucleus_of_a_large_vocabulary_is_the_same_when_few_tokens_are_sorted(monkeypatch):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 4
    params = SamplingParams(top_p=0.9)
    few = _draws(logits, params, 3, 50)
    monkeypatch.setattr("serving.backends.vllm.drawing.NUCLEUS_CANDIDATES", 5000)
    assert few == _draws(logits, params, 3, 50)
