"""How greedy answers are compared: tokens, ties, log-probabilities, and what a reader is shown."""

from __future__ import annotations

import math

import pytest

from serving.columns import compare_columns, explain, table
from serving.golden import Answer


def _answer(ids, logprobs=None, top=None):
    logprobs = logprobs or [-0.5] * len(ids)
    top = top or [[[token, value], [90, value - 1.0]] for token, value in zip(ids, logprobs, strict=True)]
    return Answer(ids, logprobs, "", "length", top)


def _compare(ours, theirs, tie=0.0):
    return compare_columns("adapter", [ours], "served", [theirs], tie=tie)


def test_the_same_answer_passes():
    compared = _compare(_answer([1, 2, 3]), _answer([1, 2, 3], [-0.5, -0.5, -0.4999]))
    assert (compared.identical, compared.ties, compared.differences) == (1, 0, [])
    assert compared.max_logprob_delta == pytest.approx(1e-4)
    assert compared.passed(1e-3)
    assert not compared.passed(1e-5)


def test_the_margin_is_what_the_reference_says_about_the_other_token():
    compared = _compare(_answer([1, 2, 3]), _answer([1, 90, 3]))
    (difference,) = compared.differences
    assert (difference.at, difference.margin, difference.at_least) == (1, pytest.approx(1.0), False)
    assert not compared.passed(1e-3)
    unlikely = _compare(_answer([1, 2, 3]), _answer([1, 77, 3])).differences[0]
    assert (unlikely.margin, unlikely.at_least) == (pytest.approx(1.0), True)


def test_a_tie_counts_only_if_the_reference_is_near_it_and_within_what_is_allowed():
    close = _answer([1, 2], top=[[[1, -0.5]], [[2, -0.70], [3, -0.75]]])
    assert _compare(close, _answer([1, 3]), tie=0.1).passed(1e-3)
    assert _compare(close, _answer([1, 3]), tie=0.1).ties == 1
    assert not _compare(close, _answer([1, 3]), tie=0.01).passed(1e-3)
    assert not _compare(close, _answer([1, 4]), tie=0.1).passed(1e-3), "4 is nowhere near"
    assert not _compare(close, _answer([1]), tie=9.0).passed(1e-3), "an end is no tie"


def test_logprobs_after_a_difference_do_not_count_and_those_before_do():
    after = _compare(_answer([1, 2, 3]), _answer([1, 90, 3], [-0.5, -9.0, -9.0]), tie=2.0)
    assert after.max_logprob_delta == 0.0
    before = _compare(_answer([1, 2, 3]), _answer([1, 90, 3], [-0.7, -9.0, -9.0]), tie=2.0)
    assert before.max_logprob_delta == pytest.approx(0.2)


@pytest.mark.parametrize("logprobs", [[math.nan, -0.5, -0.5], [-0.5]])
def test_missing_and_undefined_logprobs_never_pass(logprobs):
    compared = _compare(_answer([1, 2, 3]), Answer([1, 2, 3], logprobs, "", "length", []))
    assert compared.identical == 1
    assert compared.max_logprob_delta is None
    assert not compared.passed(1.0)


def test_a_reader_sees_the_tokens_and_the_verdict():
    ours, theirs = _answer([1, 2, 3]), _answer([1, 90, 3])
    compared = _compare(ours, theirs)
    text = "\n".join(explain(compared, [ours], [theirs], lambda token: f"t{token}"))
    assert "prompt 0: first difference at token 1 (adapter has 3, served 3)" in text
    assert "'t1' 't90' 't3'" in text
    assert "adapter prefers its own token there by 1 nats" in text
    (_, row) = table("desk", [compared], 1e-3)
    assert "adapter = served" in row
    assert "0/1" in row
    assert row.endswith("FAILED")
