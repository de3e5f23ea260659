"""The guard around an application: what an internal error tells, who may read metrics, and the log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving.gateway.app import READY_TTL_SECONDS, Control, Readiness, create_app
from serving.gateway.config import GatewayConfig, LimitsConfig
from serving.gateway.errors import ApiError
from serving.gateway.exchange import PAGE_PATHS
from serving.gateway.guard import ClientGoneError, Guard
from serving.gateway.keys import ApiKey, KeyRing, hash_key
from serving.gateway.logs import JsonFormatter, configure
from serving.gateway.metrics import Metrics
from serving.gateway.routes import Model, Router, Table
from serving.gateway.service import Service

SECRET = "the text of a prompt"
MODELS = {"m": {"versions": {"v": {"export": "runs/export", "triton": "127.0.0.1:8001"}}}}
BODY = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}


class Failing:
    """A router or service in which whatever is asked for fails with a message that quotes the request."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def start(self, *_: Any) -> Any:
        raise self.error

    async def ready(self) -> dict[str, bool]:
        raise self.error


def guard(error: BaseException, router: Any = None, **settings: Any) -> Guard:
    failing: Any = Failing(error)
    metrics = Metrics()
    config = GatewayConfig.model_validate({"models": MODELS, **settings})

    async def reload() -> None:
        raise error

    page = config.authentication if config.serves_page else None
    app = create_app(router or failing, failing, metrics, Control(reload), page=page)
    keys = KeyRing([ApiKey(name="alice", sha256=hash_key("key"))], hash_key("root"))
    return Guard(app, config, keys, metrics)


def call(
    guarded: Guard,
    method: str,
    path: str,
    key: str = "key",
    body: bytes = b"",
    wait: bool = False,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> tuple[int, dict[str, str], str]:
    """One ASGI request: status, headers and body. wait: the body never comes; more: further headers."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": wait}]

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode()), *more]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }
    # An unforeseen error goes on to the server, which logs it, after the client has got its answer.
    with contextlib.suppress(RuntimeError):
        asyncio.run(guarded(scope, receive, send))
    text = b"".join(message.get("body", b"") for message in sent)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, text.decode()


def test_an_internal_error_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    status, headers, text = call(
        guard(RuntimeError(SECRET)), "POST", "/v1/chat/completions", body=json.dumps(BODY).encode()
    )
    assert status == 500
    assert json.loads(text)["error"]["message"] == "internal error"
    assert SECRET not in text
    assert headers["x-request-id"].startswith("req-")


def test_a_client_that_leaves_is_no_internal_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("posttrain.gateway"), "propagate", True)
    guarded = guard(ClientGoneError())
    with caplog.at_level(logging.INFO, "posttrain.gateway"):
        call(guarded, "POST", "/v1/chat/completions", body=json.dumps(BODY).encode())
    fields = vars(caplog.records[-1])["fields"]
    assert (fields["status"], fields["reason"]) == (499, "client_gone")
    assert guarded.metrics.disconnects._value.get() == 1


def test_a_logged_error_has_its_type_and_place_and_not_its_message() -> None:
    stream = io.StringIO()
    configure(stream)
    try:
        raise RuntimeError(SECRET)
    except RuntimeError:
        logging.getLogger("uvicorn.error").exception("failed")
    line = json.loads(stream.getvalue())
    assert line["error"]["type"] == "RuntimeError"
    assert "test_gateway_guard.py" in line["error"]["at"][-1]
    assert SECRET not in stream.getvalue()


def test_a_log_line_is_one_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "event\nwith a break", (), None)
    record.fields = {"detail": "a\nb"}
    assert "\n" not in JsonFormatter().format(record)


def test_an_error_of_the_api_keeps_its_headers() -> None:
    error = ApiError(429, "slow down", headers={"Retry-After": "7"}, reason="requests")
    guarded = guard(error)
    status, headers, text = call(guarded, "POST", "/v1/chat/completions", body=json.dumps(BODY).encode())
    assert (status, headers["retry-after"], json.loads(text)["error"]["message"]) == (429, "7", "slow down")
    assert guarded.metrics.limited.labels("alice", "requests")._value.get() == 1
    assert guarded.in_flight == 0


@pytest.mark.parametrize(
    ("private", "key", "status"), [(False, "", 200), (True, "key", 401), (True, "root", 200)]
)
def test_metrics_are_public_unless_they_are_private(private: bool, key: str, status: int) -> None:
    assert call(guard(RuntimeError(SECRET), private_metrics=private), "GET", "/metrics", key)[0] == status


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_the_page_is_for_everybody_where_it_is_served_and_nowhere_else(path: str) -> None:
    status, headers, text = call(guard(RuntimeError(SECRET)), "GET", path, "")
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == (
        "'none'",
        "'self'",
        "'self'",
    )
    assert not any("unsafe" in sources or "http" in sources for sources in policy.values())
    assert policy["frame-ancestors"] == "'none'"
    assert "<script>" not in text
    assert headers["x-content-type-options"] == "nosniff"
    off = guard(RuntimeError(SECRET), page=False)
    assert call(off, "GET", path, "")[0] == 401
    assert call(off, "GET", path)[0] == 404


@pytest.mark.parametrize("authentication", ["keys", "none"])
def test_the_page_knows_whether_to_ask_for_a_key(authentication: str) -> None:
    _, _, text = call(guard(RuntimeError(SECRET), authentication=authentication), "GET", "/", "")
    assert f'<html lang="en" data-authentication="{authentication}">' in text


VOTE = {
    "model": "m",
    "messages": [{"role": "user", "content": SECRET}],
    "version_a": "m@v",
    "version_b": "m@v",
    "answer_a": SECRET,
    "answer_b": "",
    "choice": "a",
}


def test_without_a_database_votes_are_refused_and_the_page_is_told_why() -> None:
    router = Router(LimitsConfig(), ThreadPoolExecutor(1))
    guarded = guard(RuntimeError(SECRET), router=router)
    guarded.app = create_app(
        router, Service(router, guarded.metrics, 8), guarded.metrics, Control(Counting().ready)
    )
    status, _, text = call(guarded, "POST", "/v1/votes", body=json.dumps(VOTE).encode())
    error = json.loads(text)["error"]
    assert (status, error["code"]) == (404, "votes_not_kept")
    assert "monitoring.database" in error["message"]
    told = json.loads(call(guarded, "GET", "/v1/page")[2])["votes"]
    assert told == {"kept": False, "reason": error["message"]}


class Full:
    """A store on a full disk."""

    async def add(self, vote: Any) -> str:
        raise sqlite3.OperationalError(f"database or disk is full: {vote}")


def test_a_vote_that_is_not_on_the_disk_is_an_error_without_its_text() -> None:
    router: Any = Router(LimitsConfig(), ThreadPoolExecutor(1))
    config = GatewayConfig.model_validate({"models": MODELS}).models["m"]
    version: Any = None
    router.table = Table({"m": Model("m", config, {"v": version}, {"v": 1.0})})
    guarded = guard(RuntimeError(SECRET))
    service, full = Service(router, guarded.metrics, 8), Full()
    guarded.app = create_app(router, service, guarded.metrics, Control(Counting().ready), votes=full)  # type: ignore[arg-type]
    status, headers, text = call(guarded, "POST", "/v1/votes", body=json.dumps(VOTE).encode())
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(text)["error"]["code"] == "vote_not_kept"
    assert SECRET not in text
    assert service.limiter.state(guarded.keys.keys[0]).running == 0


@pytest.mark.parametrize("path", ["/", "/page.js", "/health", "/health/live", "/openapi.json", "/metrics"])
@pytest.mark.parametrize("announced", [(b"content-length", b"1000"), (b"transfer-encoding", b"chunked")])
def test_where_no_key_is_wanted_no_body_is_read(path: str, announced: tuple[bytes, bytes]) -> None:
    guarded = guard(RuntimeError(SECRET))
    counting: Any = Counting()
    guarded.app = create_app(counting, counting, guarded.metrics, Control(counting.ready), page="keys")
    status, headers, _ = call(guarded, "GET", path, "", wait=True, more=[announced])
    assert (status, headers["connection"]) == (200, "close")
    assert "connection" not in call(guarded, "GET", path, "")[1]


class Counting:
    """A router whose readiness is asked for, and takes a while."""

    asked = 0

    async def ready(self) -> dict[str, bool]:
        self.asked += 1
        await asyncio.sleep(0)
        return {"m@v": True}


def test_readiness_is_looked_up_once_however_many_ask_and_one_that_leaves_stops_nobody() -> None:
    router = Counting()

    async def scenario() -> list[dict[str, bool]]:
        readiness = Readiness(router.ready)
        leaving = asyncio.create_task(readiness.states())
        staying = [asyncio.create_task(readiness.states()) for _ in range(5)]
        await asyncio.sleep(0)
        leaving.cancel()
        return [*await asyncio.gather(*staying), await readiness.states()]

    assert asyncio.run(scenario()) == [{"m@v": True}] * 6
    assert router.asked == 1


def test_the_time_of_a_lookup_is_when_it_ended() -> None:
    clock = [1000.0]
    asked = []

    async def slow() -> dict[str, bool]:
        asked.append(clock[0])
        clock[0] += 2 * READY_TTL_SECONDS
        return {"m@v": True}

    async def scenario() -> None:
        readiness = Readiness(slow, lambda: clock[0])
        await readiness.states()
        await readiness.states()
        clock[0] += 2 * READY_TTL_SECONDS
        await readiness.states()

    asyncio.run(scenario())
    assert asked == [1000.0, 1000.0 + 4 * READY_TTL_SECONDS]


def test_without_an_admin_key_there_is_no_administration() -> None:
    guarded = guard(RuntimeError(SECRET))
    assert call(guarded, "POST", "/admin/reload", "key")[0] == 401
    guarded.keys = KeyRing(guarded.keys.keys, None)
    assert call(guarded, "POST", "/admin/reload", "root")[0] == 404


@pytest.mark.parametrize("path", ["/v1/models", "/admin/routes"])
def test_a_request_without_a_key_is_nobodys_whatever_hashes_are_in_force(path: str) -> None:
    guarded = guard(RuntimeError(SECRET))
    guarded.keys = KeyRing([ApiKey(name="alice", sha256=hash_key(""))], hash_key(""))
    assert call(guarded, "GET", path, "")[0] == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost:8080", 200),
        (b"127.0.0.1", 200),
        (b"[::1]:8080", 200),
        (b"site.example:8080", 403),
        (b"127.0.0.1.site.example", 403),
        (b"localhost@site.example", 403),
        (b"[::1", 403),
        (b"", 403),
    ],
)
def test_without_keys_no_other_sites_name_is_answered(host: bytes, status: int) -> None:
    """A page of that site, in a browser on this machine, could read the answers."""
    metrics, config = Metrics(), GatewayConfig.model_validate({"models": MODELS, "authentication": "none"})
    router = Router(LimitsConfig(), ThreadPoolExecutor(1))
    app = create_app(router, Service(router, metrics, 8), metrics, Control(Counting().ready))
    found = call(Guard(app, config, KeyRing([], None), metrics), "GET", "/v1/models", more=[(b"host", host)])
    assert found[0] == status, found[2]


def test_a_whole_request_has_its_time() -> None:
    limits = {"body_seconds": 60.0, "request_seconds": 0.05}
    status, _, text = call(guard(RuntimeError(SECRET), limits=limits), "GET", "/v1/models", wait=True)
    assert status == 504
    assert json.loads(text)["error"]["code"] == "timeout"


def test_a_full_gateway_says_when_to_come_again() -> None:
    guarded = guard(RuntimeError(SECRET), limits={"max_in_flight": 1})
    guarded.in_flight = 1
    status, headers, _ = call(guarded, "POST", "/v1/chat/completions", body=json.dumps(BODY).encode())
    assert (status, headers["retry-after"]) == (503, "1")
    assert call(guarded, "GET", "/health/live")[0] == 200
