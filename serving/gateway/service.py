"""From a valid request to an answer: limits, version, prompt, Triton, and the books kept about it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serving.gateway import limits as rates
from serving.gateway.answers import Tally, Writer, event
from serving.gateway.choices import merged
from serving.gateway.errors import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.keys import ApiKey
from serving.gateway.logs import log
from serving.gateway.metrics import Metrics
from serving.gateway.prompts import Prompt
from serving.gateway.routes import Model, Router, Version
from serving.gateway.schemas import ChatRequest, CompletionRequest
from serving.gateway.upstream import Piece, UpstreamError

AnyRequest = ChatRequest | CompletionRequest


@dataclass
class Job:
    """One request on its way to a version. failed: Triton refused it or broke off."""

    request: AnyRequest
    exchange: Exchange
    key: ApiKey
    state: rates.KeyState
    model: Model
    version: Version
    prompt: Prompt
    max_tokens: int
    tally: Tally
    failed: bool = False
    finished: bool = False

    @property
    def writer(self) -> Writer:
        """Shapes the answer."""
        options = self.request.stream_options
        return Writer(
            chat=isinstance(self.request, ChatRequest),
            model=self.request.model,
            version=self.version.name,
            top=self.request.logprobs_wanted,
            tally=self.tally,
            include_usage=options is not None and options.include_usage,
            id=self.exchange.request_id,
            n=self.request.answers,
        )

    @property
    def reserved(self) -> int:
        """The most tokens it can use: the prompt once, and every answer as long as it may be."""
        return self.prompt.tokens + self.request.answers * self.max_tokens


class Service:
    """Answers requests. One for the whole process, used from the event loop."""

    def __init__(self, router: Router, metrics: Metrics, max_messages: int) -> None:
        self.router = router
        self.metrics = metrics
        self.max_messages = max_messages
        self.limiter = rates.Limiter()
        self.shadows: set[asyncio.Task[None]] = set()
        self.copies: Counter[str] = Counter()
        """Copies under way by model."""

    async def start(self, request: AnyRequest, exchange: Exchange) -> tuple[Job, AsyncGenerator[Piece, None]]:
        """Admit a request and choose who answers it: the job, and Triton's pieces as they come.

        The caller closes the pieces, which takes the request out of Triton, and calls `finish`.
        Raises ApiError.
        """
        key = exchange.key
        assert key is not None, "the guard lets nobody in without a key"
        state = self.limiter.admit(key)
        try:
            job = await self._prepare(request, exchange, key, state)
        except BaseException:
            self.limiter.release(state)
            raise
        return job, self._pieces(job)

    async def _prepare(
        self, request: AnyRequest, exchange: Exchange, key: ApiKey, state: rates.KeyState
    ) -> Job:
        model, pinned = self.router.table.find(request.model, key)
        version = self.router.choose(model, pinned, key, request.user)
        exchange.model, exchange.version, exchange.stream = model.name, version.name, bool(request.stream)
        # Before anything is awaited: a route change must not close it under this request.
        version.upstream.hold()
        try:
            prompt = await self._prompt(request, model, version)
            wanted, param = request.answer_limit
            default = None if isinstance(request, ChatRequest) else 16
            max_tokens = version.renderer.answer_tokens(prompt, wanted, default, param)
            self.limiter.reserve(key, state, prompt.tokens + request.answers * max_tokens)
        except BaseException:
            version.upstream.release()
            raise
        exchange.tally = Tally(prompt.tokens, unfinished=request.answers)
        exchange.messages = turns(request) if exchange.keeps_text else None
        return Job(request, exchange, key, state, model, version, prompt, max_tokens, exchange.tally)

    async def _prompt(self, request: AnyRequest, model: Model, version: Version) -> Prompt:
        if isinstance(request, CompletionRequest):
            return await version.renderer.text(request.text)
        if len(request.messages) > self.max_messages:
            raise ApiError(400, f"at most {self.max_messages} messages are accepted", param="messages")
        messages = [message.rendered() for message in request.messages]
        return await version.renderer.chat(messages, model.config.special_tokens)

    async def _pieces(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Triton's pieces, counted. Raises ApiError."""
        labels = (job.model.name, job.version.name)
        texts: list[str] = []
        first = Tally(job.prompt.tokens)
        asked = time.monotonic()
        try:
            async with aclosing(self._answers(job)) as pieces:
                async for piece in pieces:
                    if job.exchange.first_token_s is None:
                        job.exchange.first_token_s = round(time.monotonic() - asked, 4)
                        self.metrics.first_token.labels(*labels).observe(job.exchange.first_token_s)
                    job.tally.count(piece)
                    if piece.index == 0:
                        texts.append(piece.text)
                        first.count(piece)
                    yield piece
                    if time.monotonic() > job.exchange.deadline and job.tally.finish_reason is None:
                        raise ApiError(504, "the answer took too long", code="timeout")
            job.exchange.answer, job.exchange.answer_tally = "".join(texts), first
            self._copy(job, job.exchange.answer)
        except UpstreamError as error:
            job.failed = True
            job.exchange.reason = error.code
            self.metrics.upstream_errors.labels(*labels, error.code).inc()
            if error.answer.status >= 500:
                log(
                    "upstream_error",
                    logging.WARNING,
                    request_id=job.exchange.request_id,
                    url=job.version.upstream.url,
                    code=error.code,
                    detail=error.detail[:500],
                )
            raise error.answer from error

    def _answers(self, job: Job) -> AsyncGenerator[Piece, None]:
        """One request of Triton for each answer."""
        streams = [
            ask(job.version, job.prompt.text, sampling(job, job.version, index), job.exchange)
            for index in range(job.request.answers)
        ]
        return merged(streams) if len(streams) > 1 else streams[0]

    def finish(self, job: Job) -> None:
        """Take a job out of the limits and into the books. Does nothing the second time."""
        if job.finished:
            return
        job.finished = True
        job.version.upstream.release()
        # What Triton refused costs nothing; a client that left early made it read the prompt.
        free = job.failed and job.exchange.first_token_s is None
        prompt, completion = (0, 0) if free else (job.tally.prompt_tokens, job.tally.completion_tokens)
        self.limiter.settle(job.state, job.reserved, prompt + completion)
        self.limiter.release(job.state)
        for kind, count in (("prompt", prompt), ("completion", completion)):
            self.metrics.tokens.labels(job.model.name, job.version.name, kind).inc(count)
            self.metrics.key_tokens.labels(job.key.name, kind).inc(count)

    def _copy(self, job: Job, text: str) -> None:
        """Send a copy of a request that was answered to the model's shadow, if it has one.

        text: the first answer. Of a request for several answers the copy asks for that one.
        """
        shadow = self.router.shadow(job.model, job.version)
        if shadow is None:
            return
        settings = job.model.config.shadow
        assert settings is not None
        if self.copies[job.model.name] >= settings.max_concurrent:
            self.metrics.shadows.labels(job.model.name, shadow.name, "left_out").inc()
            return
        shadow.upstream.hold()
        self.copies[job.model.name] += 1
        task = asyncio.create_task(self._shadow(job, shadow, text))
        self.shadows.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            # Not in the task itself, which never begins when it is cancelled at once.
            self.shadows.discard(task)
            self.copies[job.model.name] -= 1
            shadow.upstream.release()

        task.add_done_callback(ended)

    async def _shadow(self, job: Job, shadow: Version, text: str) -> None:
        exchange = Exchange(job.exchange.endpoint, "POST", f"{job.exchange.request_id}-shadow"[:80])
        outcome = "failed"
        try:
            prompt = await self._prompt(job.request, job.model, shadow)
            async with aclosing(ask(shadow, prompt.text, sampling(job, shadow), exchange)) as pieces:
                answer = "".join([piece.text async for piece in pieces])
            greedy = job.request.temperature == 0
            outcome = ("same" if answer == text else "different") if greedy else "answered"
        except (ApiError, UpstreamError):
            pass  # Counted below, as everything else that ends it early.
        finally:
            self.metrics.shadows.labels(job.model.name, shadow.name, outcome).inc()
            log(
                "shadow",
                request_id=job.exchange.request_id,
                model=job.model.name,
                version=shadow.name,
                outcome=outcome,
            )

    async def close(self) -> None:
        """Drop the copies that are still on their way."""
        for task in self.shadows:
            task.cancel()
        await asyncio.gather(*self.shadows, return_exceptions=True)


def turns(request: AnyRequest) -> list[dict[str, str]]:
    """What was asked, as messages; a text is one of the user's."""
    if isinstance(request, CompletionRequest):
        return [{"role": "user", "content": request.text}]
    return [message.rendered() for message in request.messages]


def sampling(job: Job, version: Version, index: int = 0) -> dict[str, Any]:
    """The sampling parameters of one answer, with the adapter where the version has one."""
    adapter = version.config.adapter
    return job.request.sampling(job.max_tokens, index) | ({"lora_name": adapter} if adapter else {})


def ask(
    version: Version, prompt: str, sampling: dict[str, Any], exchange: Exchange
) -> AsyncGenerator[Piece, None]:
    """One request to a version's Triton."""

    def stream(headers: dict[str, str]) -> AsyncGenerator[Piece, None]:
        return version.upstream.stream(version.target, prompt, sampling, headers)

    return exchange.spans.follow(stream, version, exchange.traceparent)


async def events(
    writer: Writer, first: Piece, rest: AsyncGenerator[Piece, None], finish: Callable[[], None]
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events. An error in the middle is an event with `error`, and the last one.

    finish: called before the last event, so that a client that has read it may ask again at once.
    """
    async with aclosing(rest):
        try:
            if opening := writer.opening():
                yield opening
            if chunk := writer.piece(first):
                yield chunk
            async for piece in rest:
                if chunk := writer.piece(piece):
                    yield chunk
        except ApiError as error:
            finish()
            yield event(error.body())
            return
        finish()
        yield writer.closing()
