"""The web application against what attackers, and browsers of victims, send."""

from __future__ import annotations

import asyncio
import html
import re
import resource
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from annotation_study import (
    HIDDEN,
    MODELS,
    World,
    answers,
    logged_in,
    make_world,
    send,
    vote_form,
    write_rows,
)
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from eval.annotate.database import SqliteSession
from eval.annotate.security import Origins, origins
from eval.annotate.server import Hurried
from posttrain.errors import UserError

HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}</textarea>"


def count(world: World) -> int:
    return len(world.rows("SELECT 1 AS n FROM votes"))


def test_a_vote_by_form_is_kept_before_the_redirect(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)
    fields = {**form, "choice": "b", "rating-helpful": "a", "comment": "fine"}
    answer = send(browser, "/vote", fields)
    assert (answer.status_code, answer.headers["location"], count(world)) == (303, "/", 1)
    assert send(browser, "/vote", fields).status_code == 303
    assert send(browser, "/vote", {**fields, "choice": "a"}).status_code == 409
    assert count(world) == 1


def test_forms_of_other_sites_are_refused(world: World) -> None:
    browser = logged_in(world)
    fields = {**vote_form(browser.get("/").text), "choice": "a"}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1.evil.example"):
        assert send(browser, "/vote", fields, origin=origin).status_code == 403
    crossed = {"Sec-Fetch-Site": "cross-site"}
    assert send(browser, "/vote", fields, origin=None, **crossed).status_code == 403
    assert send(browser, "/vote", fields, origin=None, **{"Sec-Fetch-Site": "same-site"}).status_code == 403
    assert count(world) == 0


@pytest.mark.parametrize("token", ["", "0" * 64, "é", None])
def test_forms_without_the_token_of_the_session_are_refused(world: World, token: str | None) -> None:
    browser = logged_in(world)
    fields = {**vote_form(browser.get("/").text), "choice": "a"}
    other = vote_form(logged_in(world, "bob").get("/").text)["form"]
    fields["form"] = other if token is None else token
    for path in ("/vote", "/skip", "/draft", "/undo", "/logout"):
        assert send(browser, path, fields).status_code == 403
    assert count(world) == 0


def test_a_get_changes_no_vote(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)
    assert browser.get("/vote", params={**form, "choice": "a"}).status_code in (404, 405)
    assert browser.put("/vote").status_code == 405
    assert count(world) == 0


def test_what_models_wrote_is_text(tmp_path: Path) -> None:
    row = answers(0)
    row["prompt"][0]["content"] = HOSTILE
    row["answers"][MODELS[0]]["text"] = HOSTILE + " one"
    world = make_world(tmp_path, rows=[row], instructions=HOSTILE)
    browser = logged_in(world)
    page = browser.get("/").text
    assert page.count("<script") == 1
    assert "<img" not in page
    # Instructions, prompt and one answer.
    assert html.unescape(page).count(HOSTILE) == 3
    form = vote_form(page)
    send(browser, "/draft", {**form, "comment": HOSTILE})
    page = browser.get("/").text
    assert page.count("</textarea>") == 1
    send(browser, "/vote", {**form, "choice": "a", "comment": HOSTILE})
    bob = logged_in(world, "root", "admin")
    assert "<img" not in bob.get("/admin").text


def test_no_answer_names_a_model(world: World) -> None:
    browser = logged_in(world)
    seen: list[Any] = []
    others = ("/static/annotate.js", "/static/annotate.css", "/admin")
    while form := vote_form((page := browser.get("/")).text):
        seen += [page, send(browser, "/vote", {**form, "choice": "a"})]
        seen += [browser.get(path) for path in others]
    seen.append(page)
    for answer in seen:
        everything = answer.text + str(answer.headers) + str(answer.url)
        assert not re.search("aardvark|zebra|samples.jsonl|first_|second_|gold", everything)
    names = world.rows("SELECT id, name, place FROM items")
    ids = [row["id"] for row in names] + [row["id"] for row in world.rows("SELECT id FROM assignments")]
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)
    assert len(set(ids)) == len(ids)


def test_assigning_runs_the_same_statements_whoever_wrote_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing: what is asked of the database depends neither on models nor on whether it is a gold check."""
    gold = [{**answers(100 + number), "gold": MODELS[0]} for number in range(8)]
    file = write_rows(tmp_path / "gold.jsonl", gold)
    world = make_world(tmp_path, gold=file, gold_share=0.5, rows=[answers(n) for n in range(16)])
    browser = logged_in(world)
    log: list[str] = []
    run = SqliteSession.run

    def noted(self: SqliteSession, sql: str, **values: Any) -> Any:
        log.append(sql)
        return run(self, sql, **values)

    monkeypatch.setattr(SqliteSession, "run", noted)
    found: dict[int, set[str]] = {0: set(), 1: set()}
    for _ in range(16):
        log.clear()
        form = vote_form(browser.get("/").text)
        statements = "\n".join(log)
        kinds = "SELECT i.is_gold FROM assignments s JOIN items i ON i.id = s.item WHERE s.state = 'open'"
        found[world.rows(kinds)[0]["is_gold"]].add(statements)
        assert send(browser, "/vote", {**form, "choice": "a"}).status_code == 303
    assert len(found[0]) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: 127."])
def test_clients_that_send_no_request_are_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("eval.annotate.server.HEAD_SECONDS", 0.1)

    async def slow() -> tuple[bytes, bytes]:
        config = uvicorn.Config(world.app(), ws="none", lifespan="off")
        config.load()
        state = ServerState()
        listening = await asyncio.get_running_loop().create_server(
            lambda: Hurried(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            nothing = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            page = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        assert not state.connections
        return nothing, page

    nothing, page = asyncio.run(slow())
    assert nothing == b""
    assert page.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[::1", "", "10.0.0.1:8090"])
def test_a_host_that_is_not_ours_is_refused(world: World, host: str) -> None:
    browser = logged_in(world)
    answer = browser.get("/", headers={"Host": host})
    assert answer.status_code == 403
    assert "Question" not in answer.text


def test_behind_a_public_address_only_that_is_answered(world: World) -> None:
    public = Origins("https://annotate.example.org")
    browser = TestClient(world.app(public), base_url="https://annotate.example.org")
    assert browser.get("/login").status_code == 200
    assert browser.get("/login", headers={"Host": "localhost"}).status_code == 403
    form = dict(HIDDEN.findall(browser.get("/login").text))
    plain = send(browser, "/login", {**form, "token": "x"}, origin="http://annotate.example.org")
    assert plain.status_code == 403


def test_every_answer_has_the_headers(world: World) -> None:
    browser = logged_in(world)
    paths = ("/", "/login", "/admin", "/nothing", "/static/annotate.js")
    found = [browser.get(path) for path in paths] + [browser.get("/", headers={"Host": "evil.example"})]
    for answer in found:
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert found[0].headers["cache-control"] == "no-store"
    page = found[0].text
    assert not re.search(r"\bon\w+=|style=|javascript:|https?://", page)


def test_large_forms_are_refused(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)
    assert send(browser, "/vote", {**form, "choice": "a", "comment": "x" * 70_000}).status_code == 413
    assert send(browser, "/vote", {**form, "choice": "a", "comment": "x" * 5_000}).status_code == 413
    many = {f"field{n}": "x" for n in range(200)}
    assert send(browser, "/vote", {**form, **many}).status_code == 400
    assert browser.get("/", headers={"X-Large": "x" * 20_000}).status_code == 431
    assert count(world) == 0


def test_sql_in_fields_is_text(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)
    hostile = "x'; DROP TABLE votes; --"
    for name in ("assignment", "nonce", "choice"):
        answer = send(browser, "/vote", {**form, "choice": "a", name: hostile})
        assert answer.status_code in (400, 404, 409)
    assert send(browser, "/vote", {**form, "choice": "a", "comment": hostile}).status_code == 303
    assert count(world) == 1


def test_annotators_see_nothing_of_the_admin_and_admins_do_not_vote(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)["form"]
    assert browser.get("/admin").headers["location"] == "/login"
    assert send(browser, "/admin/export", {"form": form}).headers["location"] == "/login"
    admin = logged_in(world, "root", "admin")
    page = admin.get("/admin").text
    assert MODELS[0] not in page
    send(browser, "/vote", {**vote_form(browser.get("/").text), "choice": "a"})
    assert MODELS[0] in admin.get("/admin").text
    export = dict(HIDDEN.findall(page))
    assert "aardvark" in send(admin, "/admin/export", export).text
    assert admin.get("/").headers["location"] == "/login"


def test_the_database_going_away_is_said_and_nothing_acknowledged(world: World, monkeypatch: Any) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)
    run = SqliteSession.run

    def broken(self: SqliteSession, sql: str, **values: Any) -> Any:
        if sql == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return run(self, sql, **values)

    monkeypatch.setattr(SqliteSession, "run", broken)
    assert send(browser, "/vote", {**form, "choice": "a"}).status_code == 503
    monkeypatch.undo()
    assert count(world) == 0
    assert send(browser, "/vote", {**form, "choice": "a"}).status_code == 303
    assert count(world) == 1


def test_a_full_disk_is_said_and_no_vote_acknowledged(world: World) -> None:
    browser = logged_in(world)
    kept, codes = [], []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    form = vote_form(browser.get("/").text)
    full = Path(f"{world.database.url}-wal").stat().st_size
    # A file that may not grow is what SQLite sees of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, unlimited[1]))
    try:
        for _ in range(6):
            answer = send(browser, "/vote", {**form, "choice": "a", "comment": "x" * 4000})
            codes.append(answer.status_code)
            kept += [form["nonce"]] if answer.status_code == 303 else []
            form = vote_form(browser.get("/").text) or form
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert 503 in codes
    assert "sends it again" in answer.text
    assert {row["nonce"] for row in world.rows("SELECT nonce FROM votes")} == set(kept)
    form = vote_form(browser.get("/").text)
    assert send(browser, "/vote", {**form, "choice": "a"}).status_code == 303
    assert count(world) == len(kept) + 1


def test_who_listens_for_others_says_under_which_address() -> None:
    with pytest.raises(UserError, match="--public-url"):
        origins("0.0.0.0", None)
    with pytest.raises(UserError, match="is no address"):
        origins("0.0.0.0", "annotate.example.org")
    assert origins("0.0.0.0", "HTTPS://A.example:443/").public == "https://a.example"
