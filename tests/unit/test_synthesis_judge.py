"""The judge against a real HTTP server that fails in every way an endpoint can."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
from judging_endpoint import KEY, Reply, endpoint

from posttrain.errors import PosttrainError, UserError
from train.synthesis.config import JudgeConfig
from train.synthesis.judge import NO_VERDICT, Judge
from train.synthesis.sampling import Drawn, Prompt

__all__ = ["endpoint"]


@pytest.fixture
def judge(endpoint, tmp_path, monkeypatch) -> Callable[..., Judge]:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def make(n: int, **settings: Any) -> Judge:
        file = tmp_path / "prompt.txt"
        two = settings.get("mode") == "pairwise"
        file.write_text(
            "{prompt}\nA: {answer_a}\nB: {answer_b}" if two else "{prompt} > {answer}", encoding="utf-8"
        )
        address = f"http://127.0.0.1:{endpoint.server_address[1]}/v1"
        common = {"base_url": address, "model": "j", "prompt": str(file), "api_key_env": "JUDGE_KEY"}
        config = JudgeConfig(**common, **({"max_retries": 2} | settings))
        return Judge(config, file, n, unfinished=False)

    return make


def drawn(*texts: str, unfinished: tuple[int, ...] = ()) -> Drawn:
    prompt = Prompt("train", 1, {"id": "a", "prompt": [{"role": "user", "content": "Why?"}]}, [1], 0)
    finished = [index not in unfinished for index in range(len(texts))]
    return Drawn([prompt] * len(texts), [[1]] * len(texts), list(texts), finished)


def test_scores_and_the_key_in_the_header_alone(endpoint, judge):
    endpoint.answer = lambda text, count: (200, f"I say [[{len(text.split()) + 1}]]")
    scores = [score for score, _, _ in judge(3)(drawn("one", "one two", "one"))]
    assert scores == [4.0, 5.0, 4.0]
    assert len(endpoint.seen) == 2
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers in endpoint.seen)
    assert not any(KEY in text for text, _ in endpoint.seen)


def test_the_organisation_of_the_environment_is_not_told_to_strangers(endpoint, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-planted")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-planted")
    judge(1)(drawn("one"))
    _, headers = endpoint.seen[0]
    assert not {"org-planted", "proj-planted"} & set(headers.values())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(endpoint, judge, status):
    endpoint.answer = lambda text, count: (status, "") if count < 3 else (200, "[[9]]")
    assert judge(1)(drawn("one")) == [(9.0, None, {})]
    assert len(endpoint.seen) == 3


def test_a_reply_that_comes_too_late_is_asked_for_again(endpoint, judge):
    def late_once(text: str, count: int) -> Reply:
        if count == 1:
            endpoint.go_on.wait(10)
        return 200, "[[9]]"

    endpoint.answer = late_once
    assert judge(1, timeout=0.2)(drawn("one")) == [(9.0, None, {})]


@pytest.mark.parametrize("reply", [(200, "a fine answer"), (200, "[[0]]"), (200, ""), (400, "")])
def test_a_reply_without_a_verdict_is_no_score(endpoint, judge, reply):
    endpoint.answer = lambda text, count: reply if "bad" in text else (200, "[[1]]")
    scores = judge(2)(drawn("bad", "good"))
    assert scores == [(None, NO_VERDICT, {}), (1.0, None, {})]
    assert sum("bad" in text for text, _ in endpoint.seen) == 3


def test_a_malformed_reply_can_be_followed_by_a_good_one(endpoint, judge):
    endpoint.answer = lambda text, count: (200, "hm" if count < 3 else "[[8]]")
    assert judge(1)(drawn("one")) == [(8.0, None, {})]


@pytest.mark.parametrize("status", [429, 500])
def test_an_endpoint_that_stays_away_stops_the_stage(endpoint, judge, status):
    endpoint.answer = lambda text, count: (status, "")
    with pytest.raises(PosttrainError, match=f"status {status}, after up to 3 attempts") as caught:
        judge(1)(drawn("one"))
    assert caught.value.exit_code == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the key"), (404, "does not know the model")])
def test_a_refused_key_is_the_users_to_correct(endpoint, judge, status, words):
    endpoint.answer = lambda text, count: (status, "")
    with pytest.raises(UserError, match=words) as caught:
        judge(1)(drawn("one"))
    assert KEY not in str(caught.value)
    assert len(endpoint.seen) == 1


def test_nobody_at_the_address(judge, endpoint):
    asked = judge(1, max_retries=0)
    asked.client = asked.client.with_options(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(PosttrainError, match="cannot be reached"):
        asked(drawn("one"))


def test_pairwise_asks_both_orders_and_not_about_equal_or_unfinished_answers(endpoint, judge):
    """The judge prefers the longer answer, and the first of equal lengths."""

    def longer(text: str, count: int) -> Reply:
        a, b = (part.split("\n")[0] for part in text.split(": ")[1:])
        return 200, "[[A]]" if len(a) >= len(b) else "[[B]]"

    endpoint.answer = longer
    given = drawn("a", "long", "mid", "mid", "the longest", unfinished=(4,))
    scores = judge(5, mode="pairwise")(given)
    assert [score for score, _, _ in scores] == [0.0, 1.0, pytest.approx(0.5), pytest.approx(0.5), None]
    assert len(endpoint.seen) == 2 * 3
    assert not any("longest" in text for text, _ in endpoint.seen)


def test_the_key_is_in_nothing_that_a_failure_prints(endpoint, judge, caplog):
    caplog.set_level("DEBUG")
    endpoint.answer = lambda text, count: (500, "")
    with pytest.raises(PosttrainError) as caught:
        judge(1)(drawn("one"))
    printed = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert KEY not in printed
