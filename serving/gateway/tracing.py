"""OpenTelemetry traces: one server span per request of the API, and in it one for Triton's stream.

Attributes are those of the semantic conventions for HTTP and for generative AI; they are names, numbers and
ids, never text of a request. A client's W3C `traceparent` is the parent of the server span, and Triton gets
that of the inner span. Spans leave in the background; where the collector is not there, they are lost.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from serving.gateway.answers import Tally
from serving.gateway.config import TracingConfig
from serving.gateway.errors import CLIENT_GONE
from serving.gateway.logs import log
from serving.gateway.upstream import Piece, UpstreamError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from serving.gateway.exchange import Exchange
    from serving.gateway.routes import Version

Stream = Callable[[dict[str, str]], AsyncGenerator[Piece, None]]
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACES_PATH = "/v1/traces"
EXPORT_SECONDS = 5.0
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
REMEDY = "pip install 'posttrain[otel]'"


class Spans:
    """The spans of one request. This one records nothing."""

    trace_id: str | None = None

    def follow(
        self, stream: Stream, version: Version, traceparent: str | None
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a stream of Triton, which gets the headers given to `stream`.

        traceparent: the client's.
        """
        return stream({"traceparent": traceparent} if traceparent else {})

    def end(self, exchange: Exchange) -> None:
        """The request has ended."""


NO_SPANS = Spans()


class Tracing:
    """Makes and sends spans. config None: endpoint, name and sampling are those of the OTEL_* variables.

    exporter: what takes the spans; default: OTLP over HTTP.
    """

    def __init__(self, config: TracingConfig | None, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        if config is None:
            provider = TracerProvider()
            exporter = exporter or OTLPSpanExporter()
        else:
            provider = TracerProvider(
                resource=Resource.create({"service.name": config.service_name}),
                sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            )
            endpoint = traces_url(config.endpoint)
            exporter = exporter or OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self.provider = provider
        self.tracer = provider.get_tracer("posttrain.gateway")

    def begin(self, method: str, route: str, traceparent: str | None) -> Spans:
        """Open the server span of a request; it belongs to the client's trace, if there is one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": traceparent} if traceparent else {}
        parent = TraceContextTextMapPropagator().extract(carrier)
        attributes = {"http.request.method": method, "http.route": route}
        span = self.tracer.start_span(f"{method} {route}", parent, SpanKind.SERVER, attributes)
        return RecordedSpans(self.tracer, span)

    def close(self) -> None:
        """Send what is waiting, for some seconds."""
        self.provider.shutdown()


class RecordedSpans(Spans):
    """Spans that are sent."""

    def __init__(self, tracer: Tracer, server: Span) -> None:
        self.tracer = tracer
        self.server = server
        self.trace_id = f"{server.get_span_context().trace_id:032x}"

    async def follow(
        self, stream: Stream, version: Version, traceparent: str | None
    ) -> AsyncGenerator[Piece, None]:
        span, headers = self._child(version.upstream.url, version.target.model)
        tally: Tally | None = None
        try:
            async with aclosing(stream(headers)) as pieces:
                async for piece in pieces:
                    if tally is None:
                        span.add_event("first_token")
                        tally = Tally(piece.input_tokens)
                    tally.count(piece)
                    yield piece
        except UpstreamError as error:
            _fail(span, error.code)
            raise
        finally:
            span.set_attributes(_answer(tally))
            span.end()

    def _child(self, url: str, model: str) -> tuple[Span, dict[str, str]]:
        """The span of one stream, and the headers that make it the parent of Triton's own."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        address, _, port = url.rpartition(":")
        attributes: dict[str, Any] = {
            "rpc.system": "grpc",
            "server.address": address,
            "server.port": int(port),
            "gen_ai.request.model": model,
        }
        context = set_span_in_context(self.server)
        span = self.tracer.start_span(f"triton {model}", context, SpanKind.CLIENT, attributes)
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))
        return span, headers

    def end(self, exchange: Exchange) -> None:
        self.server.set_attributes(_request(exchange) | _answer(exchange.tally))
        error = exchange.reason or (str(exchange.status) if not 100 <= exchange.status < 400 else None)
        if error is not None:
            self.server.set_attribute("error.type", error)
            # What a client did is no error of this server; a stream that broke off behind its 200 is.
            if not (400 <= exchange.status < 500 or exchange.reason == CLIENT_GONE):
                _fail(self.server, error)
        self.server.end()


def _fail(span: Span, code: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))


def _request(exchange: Exchange) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.response.status_code": exchange.status,
        "posttrain.request_id": exchange.request_id,
    }
    if exchange.key is not None:
        found["posttrain.key"] = exchange.key.name
    if exchange.model and exchange.endpoint in OPERATIONS:
        found |= {
            "gen_ai.operation.name": OPERATIONS[exchange.endpoint],
            "gen_ai.provider.name": "posttrain",
            "gen_ai.request.model": exchange.model,
            "gen_ai.response.model": f"{exchange.model}@{exchange.version}",
        }
    if exchange.first_token_s is not None:
        found["posttrain.first_token_s"] = exchange.first_token_s
    return found


def _answer(tally: Tally | None) -> dict[str, Any]:
    if tally is None:
        return {}
    found: dict[str, Any] = {
        "gen_ai.usage.input_tokens": tally.prompt_tokens,
        "gen_ai.usage.output_tokens": tally.completion_tokens,
    }
    if tally.finish_reason is not None:
        found["gen_ai.response.finish_reasons"] = [tally.finish_reason]
    return found


def traces_url(endpoint: str) -> str:
    """Where spans go on this collector; an address that has that path already stays as it is."""
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def open_tracing(config: TracingConfig | None, environment: Mapping[str, str]) -> Tracing | None:
    """Tracing as the file says, else as the environment does; None where neither asks for it.

    Raises UserError where the file asks for it and OpenTelemetry is not installed; where only the environment
    does, it is said in the log.
    """
    wanted = any(environment.get(name) for name in VARIABLES)
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or (config is None and not wanted):
        return None
    try:
        return Tracing(config)
    except ModuleNotFoundError as error:
        if config is not None:
            raise UserError(f"tracing: needs {error.name}\n    {REMEDY}") from error
        log("tracing_unavailable", logging.WARNING, missing=error.name, remedy=REMEDY)
        return None
