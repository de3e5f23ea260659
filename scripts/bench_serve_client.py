"""The load of `bench_serve.py`: a closed loop of requests over HTTP with server-sent events, or over gRPC.

The HTTP client only notes when bytes came while it measures, and reads them afterwards: on a machine whose
cores the server needs too, a client that parses is part of what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from bench_serve_common import Request, Sample

ANSWER_SECONDS = 300.0
END_OF_CHUNKS = b"\r\n0\r\n\r\n"
Send = Callable[[Request], Awaitable[Sample]]


async def closed_loop(requests: Sequence[Request], concurrency: int, send: Sequence[Send]) -> list[Sample]:
    """Send all requests, `concurrency` at a time; send: one function for each of those places.

    A request that fails is a sample with `error`.
    """
    waiting = enumerate(requests)
    samples: list[Sample] = []

    async def place(ask: Send) -> None:
        for index, request in waiting:
            sent = time.perf_counter()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    sample = await ask(request)
            except TimeoutError:
                error = f"no answer within {ANSWER_SECONDS:.0f} s"
                sample = Sample(sent, ended=time.perf_counter(), error=error)
            sample.index = index
            samples.append(sample)

    async with asyncio.TaskGroup() as group:
        for ask in send[:concurrency]:
            group.create_task(place(ask))
    return samples


class Connection(asyncio.Protocol):
    """One HTTP connection. Keeps what comes, with its time, until the answer is complete."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.tail = b""
        self.length: int | None = None
        self.received = 0
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self.pieces.append((time.perf_counter(), data))
        self.received += len(data)
        self.tail = (self.tail + data)[-len(END_OF_CHUNKS) :]
        if self.length is None:
            self._find_length()
        if self.done is None or self.done.done():
            return
        if self.received >= self.length if self.length else self.tail == END_OF_CHUNKS:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {error}"))

    def _find_length(self) -> None:
        """Length of the answer, its headers included: 0 where it comes in chunks."""
        head, end, _ = b"".join(data for _, data in self.pieces).partition(b"\r\n\r\n")
        if not end:
            return
        self.length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                self.length = len(head) + len(end) + int(value)

    async def post(self, head: bytes, body: bytes) -> list[tuple[float, bytes]]:
        """What the server sent, with its times. Raises ConnectionError."""
        self.pieces, self.tail, self.length, self.received = [], b"", None, 0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await self.done
        return self.pieces


def read_events(pieces: Sequence[tuple[float, bytes]]) -> tuple[int, list[tuple[float, str]]]:
    """Status, and the data of each server-sent event with the time at which its last byte came.

    An answer that is no stream is one event.
    """
    events: list[tuple[float, str]] = []
    raw, payload, head, chunked = b"", b"", b"", False
    for when, data in pieces:
        raw += data
        if not head:
            head, end, rest = raw.partition(b"\r\n\r\n")
            if not end:
                head = b""
                continue
            raw, chunked = rest, b"transfer-encoding: chunked" in head.lower()
        while chunked and b"\r\n" in raw:
            size, _, rest = raw.partition(b"\r\n")
            length = int(size, 16)
            if len(rest) < length + 2:
                break
            payload, raw = payload + rest[:length], rest[length + 2 :]
        while b"\n\n" in payload:
            event, _, payload = payload.partition(b"\n\n")
            events.append((when, event.decode("utf-8").removeprefix("data: ")))
    status = int(head.split(b" ", 2)[1])
    if not chunked:
        events.append((pieces[-1][0], raw.decode("utf-8", errors="replace")))
    return status, events


def read_answer(sample: Sample, pieces: Sequence[tuple[float, bytes]]) -> None:
    """Fill a sample from an OpenAI stream of /v1/completions."""
    status, events = read_events(pieces)
    sample.ended = pieces[-1][0]
    if status != 200:
        sample.error = f"{status}: {events[0][1][:200]}"
        return
    finished = False
    for when, data in events:
        if data == "[DONE]":
            continue
        content = json.loads(data)
        if "error" in content:
            sample.error = str(content["error"])[:200]
            return
        sample.tokens = (content.get("usage") or {}).get("completion_tokens", sample.tokens)
        for choice in content["choices"]:
            if choice["text"]:
                sample.events.append(when)
                sample.text += choice["text"]
            finished = finished or choice.get("finish_reason") is not None
    if not finished:
        sample.error = "the stream ended without a finish_reason"


class HttpLoad:
    """Requests to an OpenAI-compatible server. usage: ask for it, where the server sends none unasked."""

    def __init__(self, port: int, model: str, usage: bool) -> None:
        self.port = port
        self.model = model
        self.usage = usage

    def body(self, request: Request) -> bytes:
        """The request's JSON."""
        fields: dict[str, Any] = {"model": self.model, "prompt": request.prompt, "temperature": 0}
        fields |= {"max_tokens": request.answer_tokens, "stream": True}
        if self.usage:
            fields["stream_options"] = {"include_usage": True}
        return json.dumps(fields).encode("utf-8")

    async def run(self, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """All requests, each place on a connection of its own."""
        places = [Place(self) for _ in range(concurrency)]
        samples = await closed_loop(requests, concurrency, [place.ask for place in places])
        for place in places:
            place.close()
            for sample, pieces in place.answers:
                read_answer(sample, pieces)
        return samples


class Place:
    """One connection that sends one request at a time and keeps what comes, to be read afterwards."""

    def __init__(self, load: HttpLoad) -> None:
        self.load = load
        self.answers: list[tuple[Sample, list[tuple[float, bytes]]]] = []
        self.connection: Connection | None = None
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\n"
        self.head = f"{head}Content-Type: application/json\r\n".encode("ascii")

    async def ask(self, request: Request) -> Sample:
        """Send it and wait for the whole answer; the sample is filled by `read_answer`."""
        sample = Sample(time.perf_counter())
        try:
            if self.connection is None or self.connection.transport.is_closing():
                loop = asyncio.get_running_loop()
                _, self.connection = await loop.create_connection(Connection, "127.0.0.1", self.load.port)
            self.answers.append((sample, await self.connection.post(self.head, self.load.body(request))))
        except OSError as error:
            sample.error, sample.ended = f"connection: {error}", time.perf_counter()
        except asyncio.CancelledError:
            self.close()
            raise
        return sample

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.connection is not None:
            self.connection.transport.close()
        self.connection = None


class TritonLoad:
    """Requests to the export in Triton as the gateway sends them, without the gateway."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    async def run(self, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """All requests, each a stream of its own on one connection."""
        from serving.gateway.config import LimitsConfig
        from serving.gateway.upstream import Target, Upstream, UpstreamError

        upstream, target = Upstream(self.url, LimitsConfig()), Target(self.model)

        async def ask(request: Request) -> Sample:
            sample = Sample(time.perf_counter())
            sampling = {"temperature": 0, "max_tokens": request.answer_tokens}
            try:
                async for piece in upstream.stream(target, request.prompt, sampling, {}):
                    sample.tokens += piece.output_tokens
                    if piece.text:
                        sample.events.append(time.perf_counter())
                        sample.text += piece.text
            except UpstreamError as error:
                sample.error = str(error)
            sample.ended = time.perf_counter()
            return sample

        try:
            return await closed_loop(requests, concurrency, [ask] * concurrency)
        finally:
            await upstream.retire()


class BatcherLoad:
    """Requests to the peer in Triton's dynamic batcher: one response each, nothing before the end."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    async def run(self, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """All requests on one connection."""
        import tritonclient.grpc.aio as aio
        from tritonclient.utils import InferenceServerException

        client = aio.InferenceServerClient(self.url)

        async def ask(request: Request) -> Sample:
            prompt = aio.InferInput("prompt", [1, 1], "BYTES")
            prompt.set_data_from_numpy(np.array([[request.prompt.encode("utf-8")]], dtype=np.object_))
            length = aio.InferInput("max_tokens", [1, 1], "INT32")
            length.set_data_from_numpy(np.array([[request.answer_tokens]], dtype=np.int32))
            sample = Sample(time.perf_counter())
            try:
                result = await client.infer(self.model, [prompt, length])
                sample.text = result.as_numpy("text").reshape(-1)[0].decode("utf-8")
                sample.tokens = int(result.as_numpy("tokens").reshape(-1)[0])
            except InferenceServerException as error:
                sample.error = str(error)
            sample.ended = time.perf_counter()
            return sample

        try:
            return await closed_loop(requests, concurrency, [ask] * concurrency)
        finally:
            await client.close()
