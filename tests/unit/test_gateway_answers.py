"""How answers are shaped, and what a request costs: pieces, events, Triton's errors, the service's books."""

from __future__ import annotations

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from test_gateway_parts import EXPORT, key, model

from serving.gateway.answers import DONE, LOWEST_LOGPROB, Tally, Writer
from serving.gateway.config import LimitsConfig, VersionConfig
from serving.gateway.errors import ApiError, shown
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import Metrics
from serving.gateway.prompts import ExportLimits, Prompt, Renderer
from serving.gateway.routes import Model, Router, Table, Version
from serving.gateway.schemas import ChatRequest, CompletionRequest
from serving.gateway.service import Service
from serving.gateway.service import events as events_of
from serving.gateway.upstream import Candidate, Piece, Target, from_message


def test_sampling_parameters_are_vllms():
    request = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "temperature": 0,
            "top_k": 5,
            "stop": "end",
            "logprobs": True,
            "top_logprobs": 2,
            "presence_penalty": 0.0,
            "seed": 3,
        }
    )
    assert request.sampling(9) == {
        "max_tokens": 9,
        "temperature": 0,
        "top_k": 5,
        "stop": ["end"],
        "logprobs": 2,
        "seed": 3,
    }
    bare = CompletionRequest.model_validate({"model": "m", "prompt": "x", "top_p": None, "stop": []})
    assert bare.sampling(16) == {"max_tokens": 16}


def events(text: str) -> list[dict[str, Any]]:
    return [
        json.loads(block.removeprefix("data: "))
        for block in text.split("\n\n")
        if block.startswith("data: {")
    ]


def piece(text: str, reason: str | None = None, *logprobs: float) -> Piece:
    return Piece(text, [[Candidate(text, value)] for value in logprobs], reason, 3, 1)


def test_minus_infinity_is_a_number_and_half_a_character_has_no_bytes():
    writer = Writer(True, "m", "v", 0, Tally(3))
    whole = writer.whole([piece("\ufffd", None, float("-inf")), piece("é", "stop", -0.5)])
    first, second = whole["choices"][0]["logprobs"]["content"]
    assert (first["logprob"], first["bytes"]) == (LOWEST_LOGPROB, None)
    assert (second["logprob"], second["bytes"]) == (-0.5, [195, 169])
    json.dumps(whole, allow_nan=False)


def test_a_piece_without_text_is_no_event_and_the_last_one_is():
    writer = Writer(True, "m", "v", None, Tally(3), include_usage=True)
    assert writer.piece(piece("")) is None
    last = events(writer.piece(piece("", "length")) or "")[0]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    closing = writer.closing()
    assert closing.endswith(DONE)
    assert events(closing)[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_a_line_break_in_an_answer_stays_inside_its_event():
    text = Writer(False, "m", "v", None, Tally(3)).piece(piece("a\n\ndata: [DONE]\n\nb")) or ""
    assert text.count("\n\n") == 1
    assert events(text)[0]["choices"][0]["text"] == "a\n\ndata: [DONE]\n\nb"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Request for unknown model: 'desk' is not found", 503),
        ("Request for unknown model: 'desk' version 7 is not found", 503),
        ("the queue is full (256 requests)", 503),
        ("Stub process 'desk_0' is not healthy.", 503),
        ("sampling parameter 'presence_penalty' is not supported by the embedded server", 400),
        ("lora_name 'x' is not served; adapters: a, b", 400),
        ("generation failed: CUDA error at /secret/path", 502),
    ],
)
def test_tritons_messages_become_statuses_and_only_refusals_are_shown(message, status):
    answer = from_message(message).answer
    assert answer.status == status
    assert (message in answer.message) is (status == 400)


class Talking:
    """An upstream that gives one token after the other and never ends by itself."""

    held = 0

    def hold(self) -> None:
        self.held += 1

    def release(self) -> None:
        self.held -= 1

    async def stream(self, *_: Any) -> Any:
        while True:
            yield piece("a")


class Copied:
    """A renderer for which every prompt has three tokens."""

    limits = ExportLimits(100, 50, 100)
    answer_tokens = Renderer.answer_tokens

    async def text(self, text: str) -> Prompt:
        return Prompt(text, 3)


async def overdue_stream(service: Service, exchange: Exchange) -> tuple[list[str], int]:
    """The events of a stream that is past its deadline, and the requests that are then still running."""
    request = CompletionRequest.model_validate({"model": "support", "prompt": "x", "stream": True})
    job, pieces = await service.start(request, exchange)
    first = await anext(pieces)
    written = [text async for text in events_of(job.writer, first, pieces, lambda: service.finish(job))]
    service.finish(job)
    service.finish(job)
    return written, job.state.running


class Brief(Talking):
    """An upstream that gives one token."""

    async def stream(self, *_: Any) -> Any:
        yield piece("a", "stop")


async def running_by_event(service: Service, exchange: Exchange) -> list[tuple[str, int]]:
    """The events of a stream, each with the requests of its key that were running when it came."""
    request = CompletionRequest.model_validate({"model": "support", "prompt": "x", "stream": True})
    job, pieces = await service.start(request, exchange)
    first = await anext(pieces)
    written = events_of(job.writer, first, pieces, lambda: service.finish(job))
    return [(text, job.state.running) async for text in written]


def test_who_has_read_the_last_event_may_ask_again_at_once():
    exchange = Exchange("/v1/completions", "POST", "r1", key=key(max_concurrent=1))
    found = asyncio.run(running_by_event(service_of(Brief()), exchange))
    assert [(DONE in text, running) for text, running in found] == [(False, 1), (True, 0)]


def test_an_answer_that_takes_too_long_ends_with_an_event_that_says_so():
    service = service_of(Talking())
    exchange = Exchange("/v1/completions", "POST", "r1", deadline=0.0, key=key(tokens_per_minute=100))
    written, running = asyncio.run(overdue_stream(service, exchange))
    assert events(written[-1])[0]["error"]["code"] == "timeout"
    assert DONE not in "".join(written)
    assert running == 0
    left = service.limiter.state(key(tokens_per_minute=100)).tokens
    assert left is not None
    assert left.level == pytest.approx(100 - 3 - 1, abs=0.5), "the prompt and the one token that came"


class Silent(Talking):
    """An upstream that is still reading the prompt."""

    async def stream(self, *_: Any) -> Any:
        await asyncio.Event().wait()
        yield piece("never")


class Refusing(Talking):
    """An upstream whose queue is full."""

    url = "127.0.0.1:8001"

    async def stream(self, *_: Any) -> Any:
        raise from_message("the queue is full (256 requests)")
        yield piece("never")


def service_of(upstream: Any) -> Service:
    """A service with one model `support`, of one version `a`."""
    router = Router(LimitsConfig(), ThreadPoolExecutor(1))
    version: Any = Version("a", VersionConfig(**EXPORT), Copied(), upstream, Target("m"))  # type: ignore[arg-type]
    plain = model({"a": 1})
    router.table = Table({"support": Model("support", plain.config, {"a": version}, {"a": 1})})
    return Service(router, Metrics(), 8)


@pytest.mark.parametrize(("upstream", "used"), [(Silent(), 3), (Refusing(), 0)])
def test_who_leaves_before_the_first_token_pays_for_the_prompt(upstream, used):
    service, alice = service_of(upstream), key(tokens_per_minute=100)

    async def scenario() -> None:
        request = CompletionRequest.model_validate({"model": "support", "prompt": "x"})
        job, pieces = await service.start(request, Exchange("/v1/completions", "POST", "r1", key=alice))
        with contextlib.suppress(TimeoutError, ApiError):
            await asyncio.wait_for(anext(pieces), 0.01)
        await pieces.aclose()
        service.finish(job)

    asyncio.run(scenario())
    left = service.limiter.state(alice).tokens
    assert left is not None
    assert left.level == pytest.approx(100 - used, abs=0.5)


def test_a_clients_text_is_shown_short_and_printable():
    assert shown("a\r\nSet-Cookie: x\ud800") == "a\\r\\nSet-Cookie: x\\ud800"
    assert len(shown("é" * 100)) == 64
