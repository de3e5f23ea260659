"""The checks of `posttrain parity` that need no server: what each finds, and what it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from posttrain.errors import UserError
from posttrain.models import load_causal_lm, load_tokenizer
from serving.client import Generation
from serving.golden import GoldenSet, greedy_answer, read_golden, write_golden
from serving.live_parity import first_prompts
from serving.parity import render, stop_tokens
from serving.parity_checks import (
    check_answers,
    check_template,
    check_tokenizer,
    compare_served,
    stop_string,
)

QUESTIONS = [[{"role": "user", "content": f"Where is order K{number}?"}] for number in (100, 101, 102)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def golden(tiny_model_dir, tokenizer):
    model = load_causal_lm(tiny_model_dir)
    prompts = []
    for messages in QUESTIONS:
        text = render(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append({"messages": messages, "text": text, "token_ids": ids})
    answers = [greedy_answer(model, tokenizer, prompt["token_ids"], 10) for prompt in prompts]
    other = [replace(answer, token_ids=[7, *answer.token_ids[1:]]) for answer in answers]
    columns = {"adapter": answers, "merged": answers}
    return GoldenSet("float32", 10, stop_tokens(model, tokenizer), prompts, {"": columns}, other)


def _served(golden, index=None, **changes):
    """What a faithful server answers, but for the changes to one answer."""
    generations = [
        Generation(a.text, a.token_ids, a.logprobs, a.finish_reason, len(prompt["token_ids"]), 0.1, 0.2)
        for a, prompt in zip(golden.served[""]["adapter"], golden.prompts, strict=True)
    ]
    if index is not None:
        generations[index] = replace(generations[index], **changes)
    return generations


def _check(golden, tokenizer, answers):
    comparisons = compare_served(golden, "", answers, 0.0)
    return check_answers(golden, "", answers, comparisons, 1e-3, tokenizer)


def test_a_faithful_server_passes(golden, tokenizer):
    check = _check(golden, tokenizer, _served(golden))
    assert (check.passed, check.details) == (True, [])
    assert check.summary.startswith("3/3 greedy answers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_input_tokens": 99}, "prompt 1: the server read 99 tokens"),
        ({"finish_reason": "stop"}, "ended for the reason 'stop', not 'length'"),
        ({"text": "other"}, "the same tokens are written 'other'"),
        ({"logprobs": [-0.1] * 10}, "weights or precision are not the same"),
        ({"token_ids": [5] * 10}, "prompt 1: first difference at token"),
    ],
)
def test_each_kind_of_difference_is_named(golden, tokenizer, changes, message):
    check = _check(golden, tokenizer, _served(golden, 1, **changes))
    assert not check.passed
    assert any(message in line for line in check.details), check.details


def test_answers_of_the_base_model_are_recognised(golden, tokenizer):
    answers = [
        replace(answer, token_ids=other.token_ids)
        for answer, other in zip(_served(golden), golden.base, strict=True)
    ]
    check = _check(golden, tokenizer, answers)
    assert "3/3 answers are those of the base model without the adapter" in check.details


def test_a_merge_that_computes_otherwise_is_no_pass_though_the_server_serves_it(golden, tokenizer):
    """adapter = served fails when adapter = merged does."""
    wrong = [replace(answer, token_ids=[5] * 10) for answer in golden.served[""]["adapter"]]
    broken = replace(golden, served={"": {"adapter": golden.served[""]["adapter"], "merged": wrong}})
    answers = [replace(answer, token_ids=[5] * 10) for answer in _served(golden)]
    first, second, third = compare_served(broken, "", answers, 0.0)
    assert (first.identical, second.identical, third.identical) == (0, 3, 0)
    assert not _check(broken, tokenizer, answers).passed


def test_a_template_is_compared_as_text_and_the_place_shown(golden, tokenizer, tiny_model_dir):
    assert check_template(golden, tokenizer).passed
    other = load_tokenizer(tiny_model_dir)
    other.chat_template = other.chat_template.replace("assistant\\n", "assistant ")
    check = check_template(golden, other)
    assert not check.passed
    assert check.summary.startswith("0/3")
    assert "assistant\\n" in check.details[1]
    assert "assistant '" in check.details[2]


def test_an_added_token_and_another_end_are_found(golden, tokenizer, tiny_model_dir, tmp_path):
    assert check_tokenizer(golden, tokenizer, tiny_model_dir).passed
    shutil.copytree(tiny_model_dir, tmp_path / "weights")
    file = tmp_path / "weights" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 1]}))
    check = check_tokenizer(golden, tokenizer, tmp_path / "weights")
    assert "answers end at [(1, '<|im_start|>'), (2, '<|im_end|>')]" in check.details[0]
    moved = replace(golden, prompts=[golden.prompts[0] | {"token_ids": [1, 2, 3]}, *golden.prompts[1:]])
    check = check_tokenizer(moved, tokenizer, tiny_model_dir)
    assert "in training 3 [1, 2, 3]" in check.details[0]


def test_a_stop_string_is_taken_from_the_middle():
    assert stop_string("Hello world") == " wo"
    assert stop_string("ab") is None
    assert stop_string("abc\ufffd\ufffd\ufffdd") is None


def test_a_golden_set_is_read_as_it_was_written(golden, tmp_path):
    write_golden(tmp_path, golden)
    assert read_golden(tmp_path) == golden
    assert read_golden(tmp_path / "none") is None
    cut = first_prompts(golden, 2)
    assert len(cut.prompts) == len(cut.base) == len(cut.served[""]["merged"]) == 2
    (tmp_path / "golden.json").write_text('{"schema_version": 9}')
    with pytest.raises(UserError, match="was not written by this version"):
        read_golden(tmp_path)
