"""The table of votes, and the gateway's settings around it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import UserError
from serving.gateway.config import GatewayConfig
from serving.gateway.exchange import PAGE_FILES
from serving.monitor import votes as module
from serving.monitor.store import Store
from serving.monitor.votes import Vote, VoteStore

VOTE = Vote(
    model="desk",
    messages=[{"role": "user", "content": "Where is Maria's order?"}],
    version_a="desk@v1",
    version_b="desk@v2",
    answer_a="Maria's order is late.",
    answer_b="\x00 \u2028 ok",
    choice="tie",
    sampling={"seed": 5, "temperature": 0.5},
    key="alice",
    comment="Maria",
)


def kept(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM votes")]


def test_votes_are_committed_one_by_one_and_a_second_store_adds_to_them(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"

    async def scenario() -> list[str]:
        names = []
        for _ in range(2):
            store = VoteStore(path)
            names += await asyncio.gather(*(store.add(VOTE) for _ in range(20)))
            assert len(kept(path)) == len(names), "visible to others before the store is closed"
            store.close()
        return names

    names = asyncio.run(scenario())
    rows = kept(path)
    assert {row["id"] for row in rows} == set(names)
    assert len(rows) == len(set(names)) == 40
    row = rows[0]
    assert json.loads(row["messages"]) == VOTE.messages
    assert json.loads(row["sampling"]) == VOTE.sampling
    assert (row["answer_b"], row["choice"], row["key"]) == (VOTE.answer_b, "tie", "alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_personal_data_is_redacted_in_every_text_unless_told_not_to(tmp_path: Path) -> None:
    """One value, one pseudonym, in all texts of a vote."""
    mail = "maria@shop.example"
    vote = replace(
        VOTE,
        messages=[{"role": "user", "content": f"I am {mail}."}],
        answer_a=f"Write to help@shop.example, {mail}.",
        comment=f"{mail} again",
    )
    for redact in (True, False):
        store = VoteStore(tmp_path / f"{redact}.sqlite", redact)
        asyncio.run(store.add(vote))
        store.close()
    (row,) = kept(tmp_path / "True.sqlite")
    assert "@shop" not in str(row)
    assert json.loads(row["messages"])[0]["content"] == "I am [EMAIL_1]."
    assert row["answer_a"] == "Write to [EMAIL_2], [EMAIL_1]."
    assert row["comment"] == "[EMAIL_1] again"
    (row,) = kept(tmp_path / "False.sqlite")
    assert row["comment"] == f"{mail} again"


def test_a_pair_has_the_same_texts_on_whichever_sides_it_stood(tmp_path: Path) -> None:
    """In blind mode a coin decides, and `posttrain feedback` finds a pair again by its texts."""
    first, second = "Write to ann@shop.example.", "Write to bob@shop.example."
    store = VoteStore(tmp_path / "m.sqlite")
    for a, b in ((first, second), (second, first)):
        asyncio.run(store.add(replace(VOTE, answer_a=a, answer_b=b)))
    store.close()
    one, other = kept(tmp_path / "m.sqlite")
    assert (one["answer_a"], one["answer_b"]) == (other["answer_b"], other["answer_a"])
    assert one["answer_a"] != one["answer_b"]


def test_readers_of_other_processes_take_nothing_away(tmp_path: Path) -> None:
    """Two connections here, as in the gateway, and a reader elsewhere that closes the file between writes."""
    path = tmp_path / "m.sqlite"
    store = Store(path, samples=0, retention_days=1)
    votes = VoteStore(path)
    count = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1])\n"
    count += "print(c.execute('SELECT count(*) FROM votes').fetchone()[0]); c.close()"
    for number in (1, 2, 3):
        asyncio.run(votes.add(VOTE))
        done = subprocess.run([sys.executable, "-c", count, path], capture_output=True, text=True, check=True)
        assert int(done.stdout) == number
    votes.close()
    store.close()
    assert len(kept(path)) == 3


def test_a_vote_waits_for_another_writer_and_is_an_error_when_that_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.sqlite"
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    store = VoteStore(path)
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        asyncio.run(store.add(VOTE))
    other.rollback()
    other.close()
    asyncio.run(store.add(VOTE))
    store.close()
    assert len(kept(path)) == 1


@pytest.mark.parametrize("kind", ["no directory", "a directory", "no database"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, kind: str) -> None:
    path = {"no directory": tmp_path / "none" / "m.sqlite", "a directory": tmp_path}.get(
        kind, tmp_path / "text"
    )
    if kind == "no database":
        path.write_text("hello " * 1000)
    with pytest.raises(UserError, match="monitoring.database: .* cannot be used") as caught:
        VoteStore(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "page", "served"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("0.0.0.0", None, False),
        ("0.0.0.0", True, True),
        ("127.0.0.1", False, False),
    ],
)
def test_other_machines_get_the_page_only_where_the_file_says_so(host: str, page: Any, served: bool) -> None:
    versions = {"v": {"export": "e", "triton": "127.0.0.1:1"}}
    fields = {"host": host, "page": page, "models": {"m": {"versions": versions}}}
    assert GatewayConfig.model_validate(fields).serves_page is served


def test_the_pages_files_are_those_in_its_folder() -> None:
    folder = Path(module.__file__).parents[1] / "gateway" / "static"
    assert {path.name for path in folder.iterdir()} == {*PAGE_FILES, "index.html"}
    for path in folder.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval("))
        assert "http:" not in text
        assert "https:" not in text
