"""POST /v1/votes: what is kept, and what is refused."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.hostile import JSON, KEY, MALFORMED, ask, explains, post

PATH = "/v1/votes"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is my order?"}]
GOOD = {
    "model": "support",
    "messages": ASKED,
    "version_a": "support@stable",
    "version_b": "long@only",
    "answer_a": "On its way.",
    "answer_b": "",
    "choice": "a",
    "sampling": {"temperature": 0.7, "seed": 5, "max_tokens": 40},
    "comment": "Naïve, but <b>kind</b>'; DROP TABLE votes; --",
}


def rows(database: Path) -> list[dict[str, Any]]:
    """The votes, oldest first, read by another connection."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM votes ORDER BY time, rowid")]


def test_a_vote_is_on_the_disk_before_it_is_answered(gateway, database):
    before = rows(database)
    status, _, body = post(gateway, GOOD, PATH)
    assert status == 200
    added = rows(database)[len(before) :]
    assert [row["id"] for row in added] == [json.loads(body)["id"]]
    row = added[0]
    assert json.loads(row["messages"]) == ASKED
    assert json.loads(row["sampling"]) == GOOD["sampling"]
    names = ("model", "version_a", "version_b", "answer_a", "answer_b", "choice", "comment")
    assert {name: row[name] for name in names} == {name: GOOD[name] for name in names}
    assert row["key"] == "alice"


def test_a_vote_needs_no_comment_and_no_sampling(gateway, database):
    bare = {name: value for name, value in GOOD.items() if name not in ("comment", "sampling")}
    parts = [{"role": "user", "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "?"}]}]
    body = bare | {"model": "support@stable", "messages": parts, "choice": "both_bad"}
    assert post(gateway, body, PATH)[0] == 200
    row = rows(database)[-1]
    assert (row["model"], row["choice"], row["comment"]) == ("support", "both_bad", None)
    assert json.loads(row["messages"]) == [{"role": "user", "content": "Where\n?"}]
    assert row["sampling"] == "{}"


def vote(**fields: Any) -> dict[str, Any]:
    return GOOD | fields


WRONG = {
    "model is null": (vote(model=None), 400, "model"),
    "model is not there": (vote(model="nope"), 404, "model"),
    "version_a is missing": ({k: v for k, v in GOOD.items() if k != "version_a"}, 400, "version_a"),
    "version_a names no version": (vote(version_a="support"), 400, "version_a"),
    "version_a is not there": (vote(version_a="support@nope"), 404, "version_a"),
    "version_b is a path": (vote(version_b="../../etc/passwd"), 404, "version_b"),
    "version_b is too long": (vote(version_b="x" * 257), 400, "version_b"),
    "answer_a is null": (vote(answer_a=None), 400, "answer_a"),
    "answer_b is a number": (vote(answer_b=5), 400, "answer_b"),
    "answer_b is half a character": (vote(answer_b="\udc00"), 400, "answer_b"),
    "choice is unknown": (vote(choice="c"), 400, "choice"),
    "choice is in capitals": (vote(choice="A"), 400, "choice"),
    "choice is a list": (vote(choice=["a"]), 400, "choice"),
    "messages is empty": (vote(messages=[]), 400, "messages"),
    "messages end with an answer": (vote(messages=[{"role": "assistant", "content": "x"}]), 400, "messages"),
    "too many messages": (vote(messages=ASKED[1:] * 9), 400, "messages"),
    "a message of no role": (vote(messages=[{"content": "x"}]), 400, "messages[0].role"),
    "sampling is a text": (vote(sampling="greedy"), 400, "sampling"),
    "sampling has an unknown field": (vote(sampling={"lora_name": "x"}), 400, "sampling.lora_name"),
    "temperature is infinite": (vote(sampling={"temperature": float("inf")}), 400, "sampling.temperature"),
    "seed is giant": (vote(sampling={"seed": 2**80}), 400, "sampling.seed"),
    "comment is a number": (vote(comment=1), 400, "comment"),
    "comment is too long": (vote(comment="x" * 2001), 400, "comment"),
    "an unknown field": (vote(key="bob"), 400, "key"),
    "a time of its own": (vote(time=0), 400, "time"),
    "too large": (vote(answer_a="x" * 5000), 413, None),
}


@pytest.mark.parametrize(("body", "status", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_vote_is_refused_and_not_kept(gateway, database, body, status, param):
    before = len(rows(database))
    answered, _, answer = post(gateway, body, PATH)
    assert answered == status
    error = explains(answer)
    assert (error["param"] or "").startswith(param or "")
    assert len(rows(database)) == before


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_vote_is_refused(gateway, body):
    status, _, answer = post(gateway, body, PATH)
    assert status == 400
    explains(answer)


def test_a_vote_wants_a_key_that_may_use_both_models(gateway, database):
    before = len(rows(database))
    data = json.dumps(GOOD).encode()
    assert ask(gateway, "POST", PATH, data, JSON)[0] == 401
    dora = {**JSON, "Authorization": "Bearer pt-dora"}
    assert ask(gateway, "POST", PATH, data, dora)[0] == 404
    other = json.dumps(vote(model="long", version_a="long@only")).encode()
    assert ask(gateway, "POST", PATH, other, dora)[0] == 200
    assert [row["key"] for row in rows(database)[before:]] == ["dora"]


def test_the_settings_of_the_page_are_those_of_the_key(gateway):
    status, _, body = ask(gateway, "GET", "/v1/page", headers={"Authorization": "Bearer pt-dora"})
    assert status == 200
    found = json.loads(body)
    only = {"id": "long@only", "max_tokens": 200}
    assert found["models"] == [{"id": "long", "max_tokens": 200, "versions": [only]}]
    assert found["votes"] == {"kept": True, "reason": None}
    assert ask(gateway, "GET", "/v1/page")[0] == 401
    assert "support" in ask(gateway, "GET", "/v1/page", headers=KEY)[2].decode()
