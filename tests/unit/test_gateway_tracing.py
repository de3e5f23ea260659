"""Spans of requests that end in other ways than well, and where tracing gets its settings from."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from posttrain.errors import ConfigError, UserError
from serving.gateway.answers import Tally
from serving.gateway.config import TracingConfig, load_config
from serving.gateway.exchange import Exchange
from serving.gateway.keys import ApiKey
from serving.gateway.tracing import NO_SPANS, Tracing, open_tracing, traces_url
from serving.gateway.upstream import Piece, Target, from_message

NOWHERE = TracingConfig(endpoint="http://127.0.0.1:1")
CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
VERSION: Any = SimpleNamespace(upstream=SimpleNamespace(url="triton-a:8001"), target=Target("desk"))


class Kept:
    """Spans in memory, instead of on their way to a collector."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(NOWHERE, self.exporter)

    def get_finished_spans(self) -> Any:
        self.tracing.provider.force_flush()
        return self.exporter.get_finished_spans()


@pytest.fixture
def spans() -> Iterator[tuple[Tracing, Kept]]:
    """(tracing, what was recorded)."""
    kept = Kept()
    yield kept.tracing, kept
    kept.tracing.close()


def piece(text: str, finish: str | None = None) -> Piece:
    return Piece(text, [], finish, 7, 1)


def stream_of(*items: Any, headers: list[dict[str, str]]) -> Any:
    async def stream(given: dict[str, str]) -> AsyncGenerator[Piece, None]:
        headers.append(given)
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return stream


def follow(spans: Any, stream: Any, take: int = 99) -> list[str]:
    """The texts that came before the end, an error, or a client that left behind `take` pieces."""

    async def run() -> list[str]:
        texts: list[str] = []
        async with aclosing(spans.follow(stream, VERSION, CLIENT)) as pieces:
            async for found in pieces:
                texts.append(found.text)
                if len(texts) == take:
                    break
        return texts

    return asyncio.run(run())


def test_without_tracing_the_clients_traceparent_goes_on():
    headers: list[dict[str, str]] = []
    assert follow(NO_SPANS, stream_of(piece("a", "stop"), headers=headers)) == ["a"]
    assert headers == [{"traceparent": CLIENT}]


def test_triton_gets_the_traceparent_of_its_own_span(spans):
    tracing, kept = spans
    headers: list[dict[str, str]] = []
    follow(tracing.begin("POST", "/v1/completions", CLIENT), stream_of(piece("a", "stop"), headers=headers))
    (inner,) = kept.get_finished_spans()
    span_id = f"{inner.context.span_id:016x}"
    assert headers == [{"traceparent": f"00-4bf92f3577b34da6a3ce929d0e0e4736-{span_id}-01"}]
    assert dict(inner.attributes) == {
        "rpc.system": "grpc",
        "server.address": "triton-a",
        "server.port": 8001,
        "gen_ai.request.model": "desk",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 1,
        "gen_ai.response.finish_reasons": ("stop",),
    }


def test_a_stream_that_breaks_off_is_an_error(spans):
    tracing, kept = spans
    recorded = tracing.begin("POST", "/v1/completions", None)
    error = from_message("it broke, says a text")
    with pytest.raises(type(error)):
        follow(recorded, stream_of(piece("a"), error, headers=[]))
    (inner,) = kept.get_finished_spans()
    assert inner.status.status_code is StatusCode.ERROR
    assert inner.attributes["error.type"] == "UNKNOWN"
    assert inner.attributes["gen_ai.usage.output_tokens"] == 1
    assert "says a text" not in inner.to_json()


def test_a_client_that_leaves_ends_the_span_without_an_error(spans):
    tracing, kept = spans
    recorded = tracing.begin("POST", "/v1/completions", None)
    assert follow(recorded, stream_of(piece("a"), piece("b", "stop"), headers=[]), take=1) == ["a"]
    (inner,) = kept.get_finished_spans()
    assert inner.status.status_code is StatusCode.UNSET
    assert "gen_ai.response.finish_reasons" not in inner.attributes


def test_several_streams_of_a_request_are_several_spans(spans):
    tracing, kept = spans
    recorded = tracing.begin("POST", "/v1/completions", None)
    for text in "ab":
        follow(recorded, stream_of(piece(text, "stop"), headers=[]))
    recorded.end(Exchange("/v1/completions", "POST", "r", status=200))
    first, second, server = kept.get_finished_spans()
    assert first.parent.span_id == second.parent.span_id == server.context.span_id
    assert first.context.span_id != second.context.span_id


@pytest.mark.parametrize(
    ("status", "reason", "error", "failed"),
    [
        (200, None, None, False),
        (200, "INCOMPLETE", "INCOMPLETE", True),
        (400, "400", "400", False),
        (429, "tokens", "tokens", False),
        (499, "client_gone", "client_gone", False),
        (200, "client_gone", "client_gone", False),
        (500, None, "500", True),
        (504, "timeout", "timeout", True),
        (0, None, "0", True),
    ],
)
def test_the_server_span_says_how_it_ended(spans, status, reason, error, failed):
    tracing, kept = spans
    exchange = Exchange("/v1/chat/completions", "POST", "r1", status=status, reason=reason)
    exchange.key = ApiKey(name="alice", sha256="0" * 64)
    exchange.model, exchange.version, exchange.tally = "support", "stable", Tally(7, 3, "stop")
    tracing.begin("POST", "/v1/chat/completions", CLIENT).end(exchange)
    (server,) = kept.get_finished_spans()
    assert server.attributes["http.response.status_code"] == status
    assert server.attributes.get("error.type") == error
    assert (server.status.status_code is StatusCode.ERROR) is failed
    assert server.attributes["gen_ai.response.model"] == "support@stable"


@pytest.mark.parametrize("bad", ["00-" + "0" * 32 + "-00f067aa0ba902b7-01", None])
def test_without_a_valid_parent_a_trace_begins_here(spans, bad):
    tracing, kept = spans
    tracing.begin("GET", "/v1/models", bad).end(Exchange("/v1/models", "GET", "r", status=200))
    (server,) = kept.get_finished_spans()
    assert server.parent is None
    assert server.context.trace_id


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp", "https://c/otlp/v1/traces"),
        ("https://c/v1/traces", "https://c/v1/traces"),
    ],
)
def test_where_spans_go(given, url):
    assert traces_url(given) == url


def test_tracing_is_off_unless_asked_for_or_where_it_is_switched_off():
    assert open_tracing(None, {}) is None
    assert open_tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None
    assert open_tracing(NOWHERE, {"OTEL_SDK_DISABLED": "true"}) is None


def test_a_missing_package_is_an_error_only_where_the_file_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(UserError, match=r"posttrain\[otel\]"):
        open_tracing(NOWHERE, {})
    assert open_tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None


def test_the_standard_variables_are_enough(monkeypatch):
    """A real receiver: what the environment names gets the spans when the tracing is closed."""
    received: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_SERVICE_NAME": "by-name",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        tracing = open_tracing(None, environment)
        assert tracing is not None
        tracing.begin("GET", "/v1/models", None).end(Exchange("/v1/models", "GET", "r", status=200))
        tracing.close()
        server.shutdown()
    ((path, request),) = received
    assert path == "/v1/traces"
    resource = request.resource_spans[0].resource.attributes
    names = {pair.key: pair.value.string_value for pair in resource}
    assert names["service.name"] == "by-name"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("monitoring.samples=5", "samples need a place to be kept"),
        ("monitoring.log_text=true", "monitoring.log_text"),
        ("monitoring.log_text=all", "monitoring.log_text"),
        ("monitoring.retention_days=0", "monitoring.retention_days"),
        ("tracing.endpoint=localhost:4318", "tracing.endpoint"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    models = "models.m.versions.v.export=runs/export", "models.m.versions.v.triton=127.0.0.1:8001"
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*models, setting])


def test_redacted_text_in_the_log_needs_no_database():
    models = "models.m.versions.v.export=runs/export", "models.m.versions.v.triton=127.0.0.1:8001"
    assert load_config(None, [*models, "monitoring.log_text=redacted"]).monitoring.database is None
