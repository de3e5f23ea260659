"""What the gateway keeps about real requests: rows, redacted samples, feedback, the log, and traces."""

from __future__ import annotations

import gzip
import http.client
import http.server
import json
import queue
import signal
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

EMAIL = "ann@shop.example"
QUESTION = f"Where is my order? Write to {EMAIL} please"
ASKED = {"model": "support", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "seed": 3}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
WAIT_SECONDS = 60


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as protobuf. spans: (resource attributes, span), as they come."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.spans: queue.Queue[tuple[dict[str, Any], Any]] = queue.Queue()
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class CollectorHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.add(self.path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.server.spans.put((attributes(resource.resource), span))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def attributes(holder: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(item) for item in found.values] if kind == "array_value" else found

    return {pair.key: plain(pair.value) for pair in holder.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def monitored(
    start_gateway: Any, settings: dict[str, Any], collector: Collector, tmp_path_factory: Any
) -> Any:
    """A gateway that keeps everything, logs redacted text and sends traces."""
    monitoring = {
        "database": str(tmp_path_factory.mktemp("monitoring") / "monitoring.db"),
        "samples": 100,
        "log_text": "redacted",
    }
    tracing = {"endpoint": collector.url, "service_name": "desk-gateway"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        gateway = start_gateway(settings | {"monitoring": monitoring, "tracing": tracing})
    gateway.database = Path(monitoring["database"])
    return gateway


def rows(gateway: Any, query: str, *values: Any) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(gateway.database)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def post(gateway: Any, body: Any, key: str = "alice") -> tuple[int, dict[str, Any]]:
    client = gateway.client(key)
    try:
        answer = client.post("/feedback", body=body, cast_to=object)
    except openai.APIStatusError as error:
        return error.status_code, error.response.json()["error"]
    return 200, answer


def settled(gateway: Any, name: str, rating: str = "up", key: str = "alice") -> tuple[int, dict[str, Any]]:
    """Feedback goes behind what was put before, so the rows are there once it is answered."""
    return post(gateway, {"request_id": name, "rating": rating}, key)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_kept_in_numbers_and_its_text_without_personal_data(monitored, stream):
    name = f"kept-{stream}"
    answer = monitored.client().chat.completions.create(
        **ASKED,
        stream=stream,
        extra_headers={"X-Request-Id": name},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage, finish = chunks[-1].usage, chunks[-2].choices[0].finish_reason
    else:
        text, usage, finish = (
            answer.choices[0].message.content,
            answer.usage,
            answer.choices[0].finish_reason,
        )
    assert settled(monitored, name)[0] == 200
    (row,) = rows(monitored, "SELECT * FROM requests WHERE id = ?", name)
    assert row[2:8] == ("support", "stable", "/v1/chat/completions", 200, int(stream), "alice")
    assert row[8:11] == (usage.prompt_tokens, usage.completion_tokens, finish)
    assert 0 < row[11] <= row[12] < 60
    (sample,) = rows(
        monitored,
        "SELECT messages, answer, prompt_tokens, finish_reason, redactions FROM samples WHERE request_id = ?",
        name,
    )
    assert json.loads(sample[0]) == [
        {"role": "user", "content": "Where is my order? Write to [EMAIL_1] please"}
    ]
    assert sample[1:4] == (text, usage.prompt_tokens, finish)
    assert json.loads(sample[4])["EMAIL"] == 1


def test_the_file_is_private_and_neither_it_nor_the_log_holds_what_was_redacted(monitored):
    monitored.client().completions.create(
        model="support", prompt=QUESTION, max_tokens=4, extra_headers={"X-Request-Id": "logged"}
    )
    while (line := monitored.wait_for("text"))["request_id"] != "logged":
        pass
    assert line["messages"] == [{"role": "user", "content": "Where is my order? Write to [EMAIL_1] please"}]
    assert line["redactions"]["EMAIL"] == 1
    files = list(monitored.database.parent.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert EMAIL not in "".join(monitored.lines)
    assert EMAIL.encode() not in b"".join(file.read_bytes() for file in files)


def test_a_request_that_fails_is_kept_in_numbers_only(monitored):
    with pytest.raises(openai.BadRequestError):
        monitored.client().chat.completions.create(
            **ASKED | {"max_tokens": 100_000}, extra_headers={"X-Request-Id": "refused"}
        )
    assert settled(monitored, "refused")[0] == 404
    (row,) = rows(monitored, "SELECT status, model, key, finish_reason FROM requests WHERE id = 'refused'")
    assert row == (400, "support", "alice", None)
    assert rows(monitored, "SELECT * FROM samples WHERE request_id = 'refused'") == []


def test_of_several_answers_the_sample_has_the_first_and_what_belongs_to_it(monitored):
    """Another seed makes the second longer or shorter; the request counts both."""
    answer = monitored.client().chat.completions.create(**ASKED | {"max_tokens": 40, "n": 2})
    alone = monitored.client().chat.completions.create(**ASKED | {"max_tokens": 40})
    name = answer.id.removeprefix("chatcmpl-")
    assert settled(monitored, name)[0] == 200
    columns = "answer, completion_tokens, finish_reason"
    first = alone.choices[0]
    assert rows(monitored, f"SELECT {columns} FROM samples WHERE request_id = ?", name) == [
        (first.message.content, alone.usage.completion_tokens, first.finish_reason)
    ]
    found = rows(monitored, "SELECT completion_tokens FROM requests WHERE id = ?", name)
    assert found == [(answer.usage.completion_tokens,)]
    assert answer.usage.completion_tokens > alone.usage.completion_tokens


def test_feedback_flags_the_sample_of_the_key_that_asked(monitored):
    answer = monitored.client().chat.completions.create(**ASKED)
    told = {"request_id": answer.id, "rating": "down", "comment": f"no, to {EMAIL}"}
    status, error = post(monitored, told, "bob")
    assert (status, error["code"]) == (404, "sample_not_found")
    assert post(monitored, told)[0] == 200
    name = answer.id.removeprefix("chatcmpl-")
    found = rows(monitored, "SELECT flag, comment FROM samples WHERE request_id = ?", name)
    assert found == [("down", "no, to [EMAIL_1]")]
    assert post(monitored, {"request_id": name, "rating": "up"})[0] == 200, "by the request's id too"
    assert rows(monitored, "SELECT flag FROM samples WHERE request_id = ?", name) == [("up",)]


def test_feedback_counts_among_the_requests_of_a_key(monitored):
    """bob may send three a minute."""
    told = {"request_id": "none", "rating": "up"}
    statuses = [post(monitored, told, "bob")[0] for _ in range(4)]
    assert statuses[0] == 404
    assert statuses[-1] == 429


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "up"}, "request_id"),
        ({"request_id": "a/b", "rating": "up"}, "request_id"),
        ({"request_id": "x" * 81, "rating": "up"}, "request_id"),
        ({"request_id": 7, "rating": "up"}, "request_id"),
        ({"request_id": "x", "rating": "good"}, "rating"),
        ({"request_id": "x", "rating": "up", "comment": "x" * 2001}, "comment"),
        ({"request_id": "x", "rating": "up", "comment": "\ud800"}, "comment"),
        ({"request_id": "x", "rating": "up", "more": 1}, "more"),
    ],
)
def test_wrong_feedback_is_refused(monitored, body, param):
    # Not with the openai client, which cannot write half of a surrogate pair.
    connection = http.client.HTTPConnection("127.0.0.1", monitored.port, timeout=WAIT_SECONDS)
    headers = {"Authorization": "Bearer pt-alice", "Content-Type": "application/json"}
    connection.request("POST", "/v1/feedback", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["param"]) == (400, param)
    connection.close()


def test_nothing_is_kept_unless_it_is_asked_for(gateway):
    """The gateway of the other tests: no database, no text in the log, and feedback finds nothing."""
    answer = gateway.client().chat.completions.create(**ASKED)
    assert settled(gateway, answer.id)[0] == 404
    assert EMAIL not in "".join(gateway.lines)
    assert not any(json.loads(line)["event"] == "text" for line in gateway.lines if line.startswith("{"))
    assert not [path for path in gateway.file.parent.iterdir() if path != gateway.file]


@pytest.mark.slow
def test_neither_a_locked_database_nor_an_absent_collector_hurts_a_request(start_gateway, settings, tmp_path):
    """While it is locked, what cannot be written is counted; after a burst and SIGTERM all is there."""
    more = {
        "monitoring": {"database": str(tmp_path / "m.db"), "samples": 5},
        "tracing": {"endpoint": "http://127.0.0.1:1"},
    }
    gateway = start_gateway(settings | more)
    gateway.database = tmp_path / "m.db"
    client = gateway.client()
    other = sqlite3.connect(gateway.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert client.completions.create(model="support", prompt="Hi", max_tokens=1).choices
    assert gateway.wait_for("monitoring_failed")["detail"] == "database is locked"
    dropped = "posttrain_gateway_monitoring_dropped_total"
    assert gateway.metric(dropped, reason="database") == 1
    assert gateway.metric(dropped, reason="queue_full") == 0
    other.close()
    for number in range(12):
        client.completions.create(
            model="support", prompt="Hi", max_tokens=1, extra_headers={"X-Request-Id": f"burst-{number}"}
        )
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(WAIT_SECONDS) == 0
    assert rows(gateway, "SELECT count(*) FROM requests WHERE id LIKE 'burst-%'") == [(12,)]
    assert rows(gateway, "SELECT count(*) FROM samples") == [(5,)]
    assert rows(gateway, "SELECT seen FROM reservoirs") == [(12,)]


def spans_of(collector: Collector, count: int, trace: str) -> list[tuple[dict[str, Any], Any]]:
    """The next `count` spans of a trace; others are left behind."""
    found: list[tuple[dict[str, Any], Any]] = []
    while len(found) < count:
        resource, span = collector.spans.get(timeout=WAIT_SECONDS)
        if span.trace_id.hex() == trace:
            found.append((resource, span))
    return found


def test_a_request_is_a_server_span_in_the_clients_trace_and_one_for_triton_in_it(monitored, collector):
    answer = monitored.client().chat.completions.create(
        **ASKED, stream=False, extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
    )
    found = spans_of(collector, 2, TRACE)
    (resource, inner), (_, server) = sorted(found, key=lambda pair: pair[1].kind, reverse=True)
    assert resource["service.name"] == "desk-gateway"
    assert collector.paths == {"/v1/traces"}
    assert (server.name, server.kind) == ("POST /v1/chat/completions", server.SPAN_KIND_SERVER)
    assert server.parent_span_id.hex() == PARENT
    assert (inner.name, inner.kind) == ("triton desk", inner.SPAN_KIND_CLIENT)
    assert inner.parent_span_id == server.span_id
    usage = {
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.usage.completion_tokens,
        "gen_ai.response.finish_reasons": [answer.choices[0].finish_reason],
    }
    told = attributes(server)
    assert told.pop("posttrain.first_token_s") > 0
    assert told.pop("posttrain.request_id") == answer.id.removeprefix("chatcmpl-")
    assert told == usage | {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "posttrain",
        "gen_ai.request.model": "support",
        "gen_ai.response.model": "support@stable",
        "posttrain.key": "alice",
    }
    assert usage.items() <= attributes(inner).items()
    assert [event.name for event in inner.events] == ["first_token"]
    assert server.start_time_unix_nano <= inner.start_time_unix_nano <= inner.events[0].time_unix_nano
    assert inner.events[0].time_unix_nano <= inner.end_time_unix_nano <= server.end_time_unix_nano
    assert server.status.code == inner.status.code == 0
    assert not any(word in str(found) for word in (EMAIL, "order"))


def test_a_failure_of_triton_is_an_error_in_both_spans(monitored, collector):
    trace = "0af7651916cd43dd8448eb211c80319c"
    with pytest.raises(openai.InternalServerError):
        monitored.client().chat.completions.create(
            **ASKED | {"model": "down"}, extra_headers={"traceparent": f"00-{trace}-{PARENT}-01"}
        )
    spans = {span.kind: span for _, span in spans_of(collector, 2, trace)}
    server, inner = spans[2], spans[3]
    assert attributes(server)["error.type"] == "model_unavailable"
    assert attributes(server)["http.response.status_code"] == 503
    assert attributes(inner)["error.type"] == "UNAVAILABLE"
    assert server.status.code == inner.status.code == server.status.STATUS_CODE_ERROR
    assert not inner.events


def test_a_client_that_does_not_sample_is_not_traced(monitored, collector):
    unsampled = "1af7651916cd43dd8448eb211c80319c"
    client = monitored.client()
    client.completions.create(
        model="support",
        prompt="Hi",
        max_tokens=1,
        extra_headers={"traceparent": f"00-{unsampled}-{PARENT}-00"},
    )
    last = "2af7651916cd43dd8448eb211c80319c"
    client.models.list(extra_headers={"traceparent": f"00-{last}-{PARENT}-01"})
    seen = set()
    while last not in seen:
        seen.add(collector.spans.get(timeout=WAIT_SECONDS)[1].trace_id.hex())
    assert unsampled not in seen
