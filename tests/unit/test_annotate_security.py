"""The web application against what attackers, and browsers of victims, send."""

from __future__ import annotations

import asyncio
import html
import re
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from annotation_study import MODELS, World, answers, make_world, write_rows
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from eval.annotate import security
from eval.annotate.database import SqliteSession
from eval.annotate.security import Guesses, HttpError, Origins, origins
from eval.annotate.server import Hurried, serve
from eval.annotate.store import revoke_annotator
from posttrain.errors import UserError

URL = "http://127.0.0.1:8090"
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}</textarea>"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path, overlap=2, criteria=["helpful"])
    yield made
    made.database.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "WRONG_SECONDS", 0.0)


def client(world: World, origin: Origins | None = None, **options: Any) -> TestClient:
    return TestClient(world.app(origin), base_url=URL, follow_redirects=False, **options)


def send(
    browser: TestClient, path: str, fields: dict[str, str], origin: str | None = URL, **headers: str
) -> Any:
    return browser.post(path, data=fields, headers={**({"Origin": origin} if origin else {}), **headers})


def log_in(browser: TestClient, token: str) -> Any:
    form = dict(HIDDEN.findall(browser.get("/login").text))
    return send(browser, "/login", {**form, "token": token})


def logged_in(world: World, name: str = "ann", role: str = "annotator") -> TestClient:
    world.person(name, role)
    browser = client(world)
    assert log_in(browser, world.tokens[name]).status_code == 303
    return browser


def vote_form(page: str) -> dict[str, str]:
    return dict(HIDDEN.findall(page.partition('action="/vote"')[2]))


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


def test_cookies_are_strict_and_unreadable(world: World) -> None:
    world.person("ann")
    browser = client(world)
    answer = log_in(browser, world.tokens["ann"])
    (cookie,) = [value for value in answer.headers.get_list("set-cookie") if value.startswith("annotate=")]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    public = Origins("https://annotate.example.org")
    behind = TestClient(world.app(public), base_url="https://annotate.example.org", follow_redirects=False)
    cookie = behind.get("/login").headers["set-cookie"]
    assert cookie.startswith("__Host-annotate-visitor=")
    assert "Secure" in cookie
    assert "Path=/" in cookie


def test_login_gives_a_new_session_whatever_cookie_came(world: World) -> None:
    """Session fixation: who planted a cookie in the victim's browser gets nothing by it."""
    world.person("ann")
    browser = client(world)
    browser.cookies.set("annotate", "planted-by-an-attacker", domain="127.0.0.1")
    answer = log_in(browser, world.tokens["ann"])
    session = answer.headers["set-cookie"].partition("annotate=")[2].partition(";")[0]
    assert len(session) >= 43
    assert session != "planted-by-an-attacker"
    attacker = client(world)
    attacker.cookies.set("annotate", "planted-by-an-attacker", domain="127.0.0.1")
    assert attacker.get("/").headers["location"] == "/login"
    stored = world.rows("SELECT sha256 FROM sessions")
    assert [row["sha256"] for row in stored] != [session]


def test_logging_in_again_and_logging_out_end_the_session(world: World) -> None:
    browser = logged_in(world)
    first = browser.cookies["annotate"]
    form = vote_form(browser.get("/").text)["form"]
    log_in(browser, world.tokens["ann"])
    assert len(world.rows("SELECT 1 AS n FROM sessions")) == 1
    assert browser.cookies["annotate"] != first
    assert send(browser, "/logout", {"form": form}).status_code == 403
    form = vote_form(browser.get("/").text)["form"]
    assert send(browser, "/logout", {"form": form}).status_code == 303
    assert not world.rows("SELECT 1 AS n FROM sessions")


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


def test_guesses_are_limited_by_address(world: World) -> None:
    world.person("ann")
    browser = client(world)
    codes = [log_in(browser, f"pa-wrong-{n}").status_code for n in range(security.GUESSES + 1)]
    assert codes == [403] * security.GUESSES + [429]
    refused = log_in(browser, world.tokens["ann"])
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    elsewhere = client(world, client=("203.0.113.9", 1))
    assert elsewhere.get("/login").status_code == 200


def test_guesses_of_a_neighbour_do_not_lock_out_who_was_there_before(world: World) -> None:
    browser = logged_in(world)
    form = vote_form(browser.get("/").text)["form"]
    assert send(browser, "/logout", {"form": form}).status_code == 303
    neighbour = TestClient(browser.app, base_url=URL, follow_redirects=False)
    codes = [log_in(neighbour, f"pa-wrong-{n}").status_code for n in range(security.GUESSES + 1)]
    assert codes[-1] == 429
    forged = TestClient(browser.app, base_url=URL, follow_redirects=False)
    forged.cookies.set("annotate-visitor", "made-up." + "0" * 64, domain="127.0.0.1")
    assert log_in(forged, world.tokens["ann"]).status_code == 429
    assert log_in(browser, world.tokens["ann"]).status_code == 303
    # A browser that is known has its own limit, no freedom.
    codes = [log_in(browser, f"pa-wrong-{n}").status_code for n in range(security.GUESSES + 1)]
    assert codes[0] == 403
    assert 429 in codes


def test_a_whole_network_of_ipv6_is_one_address() -> None:
    """Whoever has one IPv6 address usually has 2^64 of them."""
    guesses = Guesses(lambda: 0.0)

    async def wrong() -> None:
        return None

    for n in range(security.GUESSES):
        asyncio.run(guesses.attempt(f"2001:db8::{n:x}", wrong))
    with pytest.raises(HttpError, match="Too many wrong"):
        guesses.check("2001:db8::ffff:1")
    guesses.check("2001:db8:0:1::1")
    assert security.network("::ffff:10.0.0.1") != security.network("::ffff:10.0.0.2")


def test_a_proxy_is_an_address(world: World) -> None:
    """With `*`, uvicorn would count guesses by whatever X-Forwarded-For a client makes up."""
    for proxy in ("*", "proxy.example.org", "127.0.0.1,*"):
        with pytest.raises(UserError, match="--proxy"):
            serve(world.database.url, proxy=proxy)
    security.check_proxy("10.0.0.0/24")


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


def test_unknown_revoked_and_malformed_tokens_get_one_answer(world: World) -> None:
    world.person("ann")
    revoke_annotator(world.database, world.study, "ann")
    browser = client(world)
    form = dict(HIDDEN.findall(browser.get("/login").text))
    tokens = (world.tokens["ann"], "pa-unknown", "", "x" * 500, "' OR 1=1 --", "\ud800")
    found = {
        send(browser, "/login", {**form, "token": token.encode("utf-8", "replace").decode()}).text
        for token in tokens
    }
    assert len(found) == 1


def test_revoking_ends_an_open_session(world: World) -> None:
    browser = logged_in(world)
    assert browser.get("/").status_code == 200
    revoke_annotator(world.database, world.study, "ann")
    assert browser.get("/").headers["location"] == "/login"


def test_wrong_tokens_take_turns() -> None:
    """All guesses together are as slow as one at a time, and an old guess counts no more."""
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    inside = [0, 0]

    async def wrong() -> None:
        inside[0] += 1
        inside[1] = max(inside)
        await asyncio.sleep(0)
        inside[0] -= 1

    async def all_at_once() -> None:
        await asyncio.gather(*(guesses.attempt(f"10.0.0.{n}", wrong) for n in range(20)))

    asyncio.run(all_at_once())
    assert inside == [0, 1]
    guesses.waiting = security.WAITING
    with pytest.raises(HttpError, match="Too many people"):
        guesses.check("10.9.9.9")
    guesses.waiting = 0
    guesses.wrong["10.1.1.1"] = [0.0] * security.GUESSES
    with pytest.raises(HttpError, match="Too many wrong"):
        guesses.check("10.1.1.1")
    now[0] = security.GUESS_SECONDS + 1
    guesses.check("10.1.1.1")


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
