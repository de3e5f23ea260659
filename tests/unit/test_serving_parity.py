"""What counts as identical, and what the user reads when it is not."""

from __future__ import annotations

import json
import math

import pytest

from posttrain.models import load_causal_lm, load_tokenizer
from serving.client import Generation
from serving.parity import ParityReport, compare_all, first_difference, reference_answer, render

QUESTIONS = [[{"role": "user", "content": f"Where is order K{number}?"}] for number in (100, 101)]


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_causal_lm(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def references(model, tokenizer):
    return [reference_answer(model, tokenizer, messages, 12) for messages in QUESTIONS]


def _served(model, reference, **changes):
    """The answer a faithful server would give, with log-probabilities taken token by token."""
    import torch

    logprobs, ids = [], list(reference.prompt_ids)
    for token in changes.get("token_ids", reference.ids):
        with torch.no_grad():
            logprobs.append(float(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token]))
        ids.append(token)
    values = {
        "text": reference.text,
        "token_ids": reference.ids,
        "logprobs": logprobs,
        "finish_reason": "length",
        "num_input_tokens": len(reference.prompt_ids),
        "first_token_s": 0.1,
        "total_s": 0.2,
    }
    return Generation(**(values | changes))


def _report(model, references, second, prompts=None) -> ParityReport:
    prompts = prompts or [reference.prompt for reference in references]
    return compare_all(model, references, prompts, [_served(model, references[0]), second], 1e-3)


def test_a_faithful_server_passes(model, tokenizer, references):
    report = _report(model, references, _served(model, references[1]))
    assert report.passed
    assert report.identical == 2
    assert report.max_logprob_delta < 1e-4
    assert report.explain(tokenizer) == "2/2 prompts are answered as the trained model answers them"


def test_another_token_is_shown_where_it_is(model, tokenizer, references):
    ids = [*references[1].ids[:4], 65, *references[1].ids[5:]]
    assert ids != references[1].ids
    report = _report(model, references, _served(model, references[1], token_ids=ids))
    assert not report.passed
    assert report.within_bound
    text = report.explain(tokenizer)
    assert "1/2 prompts" in text
    assert "prompt 1:" in text
    assert "first difference at token 4 (of 12 trained, 12 served)" in text
    assert repr(tokenizer.decode([65])) in text
    assert "prefers its own token there by" in text


def test_an_answer_that_goes_on_is_a_difference(model, tokenizer, references):
    report = _report(model, references, _served(model, references[1], token_ids=[*references[1].ids, 65]))
    assert report.identical == 1
    assert "first difference at token 12 (of 12 trained, 13 served)" in report.explain(tokenizer)


def test_another_rendering_is_a_difference_even_if_the_answer_is_not(model, tokenizer, references):
    prompts = [references[0].prompt, references[1].prompt + " "]
    report = _report(model, references, _served(model, references[1]), prompts)
    assert not report.passed
    assert "exported chat template renders another prompt" in report.explain(tokenizer)


def test_an_added_token_is_a_difference(model, tokenizer, references):
    count = len(references[1].prompt_ids) + 1
    report = _report(model, references, _served(model, references[1], num_input_tokens=count))
    assert not report.passed
    assert f"the server read {count} prompt tokens" in report.explain(tokenizer)


@pytest.mark.parametrize("shift", [0.01, math.nan])
def test_shifted_logprobs_fail_though_the_tokens_agree(model, tokenizer, references, shift):
    answer = _served(model, references[1])
    moved = [value + shift for value in answer.logprobs]
    report = _report(model, references, _served(model, references[1], logprobs=moved))
    assert report.identical == 2
    assert not report.passed
    assert "weights or precision are not the trained ones" in report.explain(tokenizer)
    json.dumps(report.to_json(), allow_nan=False)


def test_the_reference_depends_on_no_file_but_weights_and_tokenizer(
    tiny_model_dir, model, tokenizer, references
):
    """A sampling default left in generation_config.json must not reach the reference."""
    other = load_causal_lm(tiny_model_dir)
    other.generation_config.update(do_sample=True, temperature=9.0, max_new_tokens=3, repetition_penalty=2.0)
    assert reference_answer(other, tokenizer, QUESTIONS[0], 12) == references[0]
    assert other.generation_config.temperature == 9.0
    assert references[0].prompt == render(tokenizer, QUESTIONS[0])
