"""Logging in to the web application: tokens, guesses, sessions."""

from __future__ import annotations

import asyncio

import pytest
from annotation_study import (
    HIDDEN,
    URL,
    World,
    client,
    log_in,
    logged_in,
    send,
    vote_form,
)
from fastapi.testclient import TestClient

from eval.annotate import security
from eval.annotate.security import Guesses, HttpError, Origins
from eval.annotate.server import serve
from eval.annotate.store import revoke_annotator
from posttrain.errors import UserError


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
