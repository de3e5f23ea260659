"""The HTTP application: OpenAI's endpoints, health, metrics and administration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.types import Receive, Scope, Send

from posttrain import __version__
from serving.gateway import limits as rates
from serving.gateway.config import Name
from serving.gateway.error_handlers import ERRORS, add_error_handlers
from serving.gateway.errors import CLIENT_GONE, ApiError, unknown_model
from serving.gateway.exchange import Exchange
from serving.gateway.guard import ClientGoneError
from serving.gateway.metrics import Metrics
from serving.gateway.monitoring import add_feedback
from serving.gateway.page import add_page, add_settings
from serving.gateway.routes import SEPARATOR, Router, allowed, describe
from serving.gateway.schemas import ApiModel, ChatRequest, CompletionRequest
from serving.gateway.service import AnyRequest, Job, Service, events
from serving.gateway.upstream import Piece
from serving.gateway.votes import add_votes
from serving.monitor.votes import VoteStore
from serving.monitor.writer import Monitor

Result = TypeVar("Result")
READY_TTL_SECONDS = 1.0


class Weights(ApiModel):
    """New weights of one model's versions; a version that is not named gets 0."""

    model: Name
    weights: dict[Name, float] = Field(min_length=1, max_length=64)


class Control:
    """What the server lends the application: draining, and reading the configuration again."""

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self.reload = reload
        self.draining = False
        self.started = int(time.time())


class Readiness:
    """Which versions can be asked, looked up once in READY_TTL_SECONDS however many ask."""

    def __init__(
        self, check: Callable[[], Awaitable[dict[str, bool]]], clock: rates.Clock = time.monotonic
    ) -> None:
        self.check = check
        self.clock = clock
        self._states: dict[str, bool] = {}
        self._checked = float("-inf")
        self._running: asyncio.Task[None] | None = None

    async def states(self) -> dict[str, bool]:
        """By "model@version". One check runs at a time, and goes on when who asked for it leaves."""
        if self.clock() - self._checked > READY_TTL_SECONDS:
            if self._running is None or self._running.done():
                self._running = asyncio.create_task(self._look())
            await asyncio.shield(self._running)
        return self._states

    async def _look(self) -> None:
        self._states = await self.check()
        self._checked = self.clock()


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed and booked however the sending ends.

    end: called with whether it ended by itself: at the source's end, or because the client left.
    """

    def __init__(
        self, source: AsyncGenerator[str, None], end: Callable[[bool], Awaitable[None]], **options: Any
    ):
        super().__init__(source, media_type="text/event-stream", **options)
        self.source = source
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        by_itself = False
        try:
            await super().__call__(scope, receive, send)
            by_itself = True
        finally:
            await self.source.aclose()
            await self.end(by_itself)


def create_app(
    router: Router,
    service: Service,
    metrics: Metrics,
    control: Control,
    *,
    monitor: Monitor | None = None,
    votes: VoteStore | None = None,
    page: str | None = None,
) -> FastAPI:
    """The application behind the guard. page: GatewayConfig.authentication where the web page is served."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()
        await router.close()
        if votes is not None:
            await asyncio.to_thread(votes.close)

    app = FastAPI(
        title="posttrain gateway",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=ERRORS,
    )
    add_error_handlers(app)
    _add_api(app, router, service, control)
    add_feedback(app, service, monitor)
    add_votes(app, router, service, votes)
    add_settings(app, router, service, votes is not None)
    if page is not None:
        add_page(app, page)
    _add_health(app, router, metrics, control)
    _add_admin(app, router, metrics, control)
    return app


def _add_api(app: FastAPI, router: Router, service: Service, control: Control) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        """Answer a conversation; with `stream`, as server-sent events."""
        return await answer(service, request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue a text, which is sent as it is."""
        return await answer(service, request, body)

    def models_of(request: Request) -> list[dict[str, Any]]:
        exchange: Exchange = request.state.exchange
        assert exchange.key is not None
        names = []
        for model in router.table.models.values():
            if allowed(exchange.key, model.name):
                names += [model.name, *(f"{model.name}{SEPARATOR}{label}" for label in model.versions)]
        return [
            {"id": name, "object": "model", "created": control.started, "owned_by": "posttrain"}
            for name in names
        ]

    @app.get("/v1/models")
    async def list_models(request: Request) -> Any:
        """The models this key may use, and their versions as model@version."""
        return {"object": "list", "data": models_of(request)}

    @app.get("/v1/models/{model}")
    async def retrieve_model(request: Request, model: str) -> Any:
        """One of them."""
        for known in models_of(request):
            if known["id"] == model:
                return known
        raise unknown_model(model)


def _add_health(app: FastAPI, router: Router, metrics: Metrics, control: Control) -> None:
    readiness = Readiness(router.ready)

    @app.get("/health/live")
    async def live() -> Any:
        """200 while the process answers at all."""
        return {"status": "live"}

    async def ready() -> Any:
        """200 when every version that gets traffic can be asked and the gateway is not going down."""
        if control.draining:
            return JSONResponse({"status": "draining"}, 503)
        states = await readiness.states()
        body = {"status": "ready" if all(states.values()) else "not ready", "versions": states}
        return JSONResponse(body, 200 if all(states.values()) else 503)

    app.get("/health")(ready)
    app.get("/health/ready")(ready)

    @app.get("/metrics")
    async def prometheus() -> Any:
        """Prometheus' text format."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_admin(app: FastAPI, router: Router, metrics: Metrics, control: Control) -> None:
    def routes() -> dict[str, Any]:
        shares = describe(router.table)
        metrics.show_shares(shares)
        return {"routes": shares}

    @app.get("/admin/routes", include_in_schema=False)
    async def show() -> Any:
        return routes()

    @app.post("/admin/reload", include_in_schema=False)
    async def reload() -> Any:
        await control.reload()
        return routes()

    @app.post("/admin/rollback", include_in_schema=False)
    async def rollback() -> Any:
        await router.rollback()
        metrics.reloads.labels("rollback", "done").inc()
        return routes()

    @app.post("/admin/weights", include_in_schema=False)
    async def reweigh(body: Weights) -> Any:
        if not all(0 <= weight < float("inf") for weight in body.weights.values()):
            raise ApiError(400, "a weight is a number from 0 on", param="weights")
        await router.reweigh(body.model, body.weights)
        metrics.reloads.labels("weights", "done").inc()
        return routes()


async def answer(service: Service, request: Request, body: AnyRequest) -> Any:
    """The response to a valid request."""
    exchange: Exchange = request.state.exchange
    job, pieces = await service.start(body, exchange)
    handed_over = False
    try:
        # Triton's first response decides the status, so that an error before it is an error status.
        first = await unless_gone(request, anext(pieces, None))
        if first is None:
            raise ApiError(502, "the model server sent no answer", code="model_failed")
        if body.stream:
            handed_over = True
            return _stream(service, job, first, pieces)
        # To the stream's end, also behind the last token: then Triton has nothing to cancel.
        rest = await unless_gone(request, _collect(pieces))
        content = job.writer.whole([first, *rest])
        return JSONResponse(content, headers=rates.headers(job.key, job.state))
    finally:
        if not handed_over:
            await pieces.aclose()
            service.finish(job)


def _stream(service: Service, job: Job, first: Piece, pieces: AsyncGenerator[Piece, None]) -> EventStream:
    def finish() -> None:
        service.finish(job)

    async def end(by_itself: bool) -> None:
        if by_itself and not job.finished:
            job.exchange.reason = CLIENT_GONE
        await pieces.aclose()
        finish()

    headers = rates.headers(job.key, job.state) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(events(job.writer, first, pieces, finish), end, headers=headers)


async def _collect(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGoneError then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _gone(request: Request) -> Coroutine[Any, Any, None]:
    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait()
