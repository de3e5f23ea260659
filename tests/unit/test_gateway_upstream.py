"""Connections that route changes retire while requests hold them, and copies to a shadow."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving.gateway.config import LimitsConfig, ModelConfig
from serving.gateway.exchange import Exchange
from serving.gateway.keys import ApiKey, hash_key
from serving.gateway.metrics import Metrics
from serving.gateway.prompts import ExportLimits, Prompt, Renderer
from serving.gateway.routes import Model, Router, Table, Version
from serving.gateway.schemas import CompletionRequest
from serving.gateway.service import Service
from serving.gateway.upstream import Candidate, Piece, Target, Upstream, UpstreamError, read_piece

NOWHERE = "127.0.0.1:1"
ALICE = ApiKey(name="alice", sha256=hash_key("secret"))


class Waiting:
    """A renderer that is told when to go on."""

    limits = ExportLimits(100, 50, 100)
    answer_tokens = Renderer.answer_tokens

    def __init__(self) -> None:
        self.rendering, self.go_on = asyncio.Event(), asyncio.Event()

    async def text(self, text: str) -> Prompt:
        self.rendering.set()
        await self.go_on.wait()
        return Prompt(text, 3)


class Answering:
    """An upstream that gives one token, or never answers."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.held = 0

    def hold(self) -> None:
        self.held += 1

    def release(self) -> None:
        self.held -= 1

    async def stream(self, *_: Any) -> Any:
        if not self.ends:
            await asyncio.Event().wait()
        yield Piece("a", [], "stop", 3, 1)


def table(
    renderer: Any, upstreams: dict[str, Any], names: tuple[str, ...] = ("m",), **settings: Any
) -> Table:
    """Models of these names, with a version on each upstream; the first one gets the traffic."""
    weights = {label: float(index == 0) for index, label in enumerate(upstreams)}
    versions = {label: {"export": "e", "triton": NOWHERE} for label in upstreams}
    config = ModelConfig.model_validate({"versions": versions, **settings})
    built = {
        label: Version(label, config.versions[label], renderer, upstream, Target("m"))
        for label, upstream in upstreams.items()
    }
    return Table({name: Model(name, config, built, weights) for name in names}, dict(upstreams))


def request(model: str = "m") -> CompletionRequest:
    return CompletionRequest.model_validate({"model": model, "prompt": "x"})


def service_of(routes: Table) -> Service:
    router = Router(LimitsConfig(), ThreadPoolExecutor(1), lambda: 0.0)
    router.table = routes
    return Service(router, Metrics(), 8)


def test_a_request_that_has_its_version_keeps_the_connection_through_two_route_changes():
    async def scenario() -> None:
        renderer, upstream = Waiting(), Upstream(NOWHERE, LimitsConfig())
        service = service_of(table(renderer, {"a": upstream}))
        starting = asyncio.create_task(service.start(request(), Exchange("/", "POST", "r", key=ALICE)))
        await renderer.rendering.wait()
        for _ in range(2):
            await service.router._replace(table(renderer, {"b": Answering(True)}))
        assert (upstream.retired, upstream.active) == (True, 1)
        renderer.go_on.set()
        job, pieces = await starting
        with pytest.raises(Exception, match="not available now") as caught:
            await anext(pieces)
        cause = caught.value.__cause__
        assert isinstance(cause, UpstreamError)
        assert cause.code == "UNAVAILABLE", "the channel was open: nobody listens at its address"
        service.finish(job)
        service.finish(job)
        assert upstream.active == 0
        assert upstream._closing is not None
        await upstream._closing

    asyncio.run(scenario())


def test_a_request_that_is_refused_holds_nothing():
    async def scenario() -> None:
        renderer, upstream = Waiting(), Answering(True)
        renderer.go_on.set()
        service = service_of(table(renderer, {"a": upstream}))
        asked = CompletionRequest.model_validate({"model": "m", "prompt": "x", "max_tokens": 51})
        with pytest.raises(Exception, match="at most 50 are accepted"):
            await service.start(asked, Exchange("/", "POST", "r", key=ALICE))
        assert upstream.held == 0

    asyncio.run(scenario())


def test_a_closed_connection_is_a_model_that_is_not_available():
    async def scenario() -> None:
        upstream = Upstream(NOWHERE, LimitsConfig())
        await upstream.retire()
        with pytest.raises(UpstreamError) as caught:
            await anext(upstream.stream(Target("m"), "x", {}, {}))
        assert (caught.value.code, caught.value.answer.status) == ("CLOSED", 503)
        assert not await upstream.ready(Target("m"))

    asyncio.run(scenario())


async def answer(service: Service, model: str) -> None:
    """One request, to its end."""
    job, pieces = await service.start(request(model), Exchange("/", "POST", "r", key=ALICE))
    async for _ in pieces:
        pass
    service.finish(job)


def outcomes(service: Service, model: str) -> dict[str, float]:
    known = ("left_out", "failed", "answered")
    return {word: service.metrics.shadows.labels(model, "s", word)._value.get() for word in known}


def test_copies_under_way_are_counted_for_each_model():
    async def scenario() -> None:
        renderer, shadow = Waiting(), Answering(False)
        renderer.go_on.set()
        settings = {"shadow": {"version": "s", "fraction": 1.0, "max_concurrent": 1}}
        service = service_of(table(renderer, {"a": Answering(True), "s": shadow}, ("m", "n"), **settings))
        for model in ("m", "m", "n"):
            await answer(service, model)
        assert [outcomes(service, name)["left_out"] for name in ("m", "n")] == [1, 0]
        assert shadow.held == 2
        await service.close()
        await asyncio.sleep(0)
        assert (shadow.held, +service.copies) == (0, {})

    asyncio.run(scenario())


def test_a_copy_that_finds_its_connection_closed_has_failed():
    async def scenario() -> None:
        renderer, shadow = Waiting(), Upstream(NOWHERE, LimitsConfig())
        renderer.go_on.set()
        await shadow.retire()
        settings = {"shadow": {"version": "s", "fraction": 1.0}}
        service = service_of(table(renderer, {"a": Answering(True), "s": shadow}, **settings))
        await answer(service, "m")
        await asyncio.gather(*service.shadows)
        assert outcomes(service, "m") == {"left_out": 0, "failed": 1, "answered": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["", " caf\u00e9 \U0001f600", "None"])
@pytest.mark.parametrize(
    "logprobs", [None, "null", json.dumps([{"7": {"logprob": -0.5, "decoded_token": "x"}}])]
)
def test_a_response_is_read_as_tritonclient_reads_it(text: str, logprobs: str | None):
    import numpy as np
    from tritonclient.grpc import InferResult, service_pb2
    from tritonclient.utils import serialize_byte_tensor

    values: dict[str, Any] = {"text_output": text, "finish_reason": "stop"}
    values |= {"num_input_tokens": 70_000, "num_output_tokens": 1}
    values |= {} if logprobs is None else {"logprobs": logprobs}
    response = service_pb2.ModelInferResponse()
    for name, value in values.items():
        is_text = isinstance(value, str)
        response.outputs.add(name=name, datatype="BYTES" if is_text else "UINT32", shape=[1])
        array = (
            np.array([value.encode()], dtype=np.object_) if is_text else np.array([value], dtype=np.uint32)
        )
        raw = serialize_byte_tensor(array).item() if is_text else array.tobytes()
        response.raw_output_contents.append(raw)
    read = {name: InferResult(response).as_numpy(name)[0] for name in values}
    piece = read_piece(response)
    assert piece.text.encode() == read["text_output"]
    assert (piece.finish_reason or "").encode() == read["finish_reason"]
    assert (piece.input_tokens, piece.output_tokens) == (read["num_input_tokens"], read["num_output_tokens"])
    asked = logprobs not in (None, "null")
    assert piece.positions == ([[Candidate("x", -0.5)]] if asked else [])
