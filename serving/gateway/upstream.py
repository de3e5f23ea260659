"""One Triton server over gRPC: a stream per request on a shared connection, its deadlines and its errors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from serving.client import OUTPUT_FLAGS, grpc_inputs, import_grpc
from serving.gateway.config import LimitsConfig
from serving.gateway.errors import ApiError, shown, unavailable

CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A Triton that was down is tried again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
READY_SECONDS = 2.0
TRY_AGAIN = "the model is not available now; try again"
NOT_THERE = re.compile(
    r"unknown model|not ready|not healthy|queue is full|maximum queue size|engine has stopped|unavailable",
    re.I,
)
REFUSED = re.compile(
    r"sampling.param|parameter|not supported|lora|adapter|max_tokens|the prompt has|must be", re.I
)
"""How Triton, vLLM's backend and the embedded one word what they cannot do now, and what they never do."""


@dataclass(frozen=True)
class Candidate:
    """One token and its log-probability at one position."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Piece:
    """One response of Triton. positions: per token the drawn one first, then the likeliest, if asked for.

    index: which of the request's answers it belongs to.
    """

    text: str
    positions: list[list[Candidate]]
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    index: int = 0


@dataclass(frozen=True)
class Target:
    """Which model of the server answers. version "": the latest."""

    model: str
    version: str = ""


class UpstreamError(Exception):
    """Triton refused or failed. detail is for the log only; `answer` is what the client gets."""

    def __init__(self, code: str, detail: str, answer: ApiError) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.answer = answer


class Upstream:
    """A connection to one Triton server. Made inside the event loop it is used in."""

    def __init__(self, url: str, limits: LimitsConfig) -> None:
        import tritonclient.grpc.aio as aio

        self.url = url
        self.limits = limits
        self.active = 0
        self.retired = False
        self._closing: asyncio.Task[None] | None = None
        self._grpc = import_grpc()
        self._client = aio.InferenceServerClient(url, channel_args=CHANNEL_OPTIONS)

    async def ready(self, target: Target) -> bool:
        """Whether the model can be asked."""
        from grpc.aio import UsageError
        from tritonclient.utils import InferenceServerException

        try:
            return bool(
                await self._client.is_model_ready(target.model, target.version, client_timeout=READY_SECONDS)
            )
        except (InferenceServerException, UsageError):
            return False

    def hold(self) -> None:
        """Keep the connection open for a request that was given to it, until `release`."""
        self.active += 1

    def release(self) -> None:
        """The request has ended; the last one closes a connection that was retired."""
        self.active -= 1
        if self.retired and self.active == 0:
            self._closing = asyncio.get_running_loop().create_task(self._client.close())

    async def retire(self) -> None:
        """Close, now or when the last request has ended."""
        self.retired = True
        if self.active == 0:
            await self._client.close()

    async def stream(
        self, target: Target, prompt: str, sampling: dict[str, Any], headers: dict[str, str]
    ) -> AsyncGenerator[Piece, None]:
        """Triton's responses as they arrive. Closing the iterator cancels the request in Triton.

        The caller holds the connection (`hold`). Raises UpstreamError.
        """
        outputs = [name for name in OUTPUT_FLAGS if name != "return_logprobs" or "logprobs" in sampling]
        request = {
            "model_name": target.model,
            "model_version": target.version,
            "inputs": grpc_inputs(self._grpc, prompt, sampling, outputs),
        }

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield request

        # Not with the header `triton_grpc_error`, which would give errors a status code: Triton 2.51 dies of
        # it after some hundreds of refused requests.
        call = self._call(requests(), headers)
        wait, finish_reason = self.limits.first_token_seconds, None
        try:
            while (result := await self._next(call, wait)) is not None:
                wait = self.limits.next_token_seconds
                response = result.get_response()
                if response.outputs:
                    piece = read_piece(response)
                    finish_reason = piece.finish_reason
                    yield piece
            if finish_reason is None:
                raise _failed("INCOMPLETE", "the stream ended without a finish reason")
        finally:
            call.cancel()

    def _call(self, requests: AsyncIterator[dict[str, Any]], headers: dict[str, str]) -> Any:
        from grpc.aio import UsageError

        try:
            return self._client.stream_infer(requests, headers=headers)
        except UsageError as failure:
            raise _closed(failure) from failure

    async def _next(self, call: Any, wait: float) -> Any:
        from grpc.aio import AioRpcError, UsageError

        try:
            async with asyncio.timeout(wait):
                result, error = await anext(call)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            answer = ApiError(504, f"the model did not answer within {wait:g} s", code="timeout")
            raise UpstreamError("TIMEOUT", f"no response in {wait:g} s", answer) from None
        except AioRpcError as failure:
            raise _from_status(failure.code().name, failure.details() or "") from failure
        except UsageError as failure:
            raise _closed(failure) from failure
        if error is not None:
            raise from_message(str(error.message()))
        return result


def read_piece(response: Any) -> Piece:
    """The tensors of one response, a ModelInferResponse.

    Every token comes through here, so the bytes are read as they are: tritonclient's as_numpy takes three
    times as long.
    """
    raw = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))
    reason = _text(raw["finish_reason"])
    positions = (json.loads(_text(raw["logprobs"])) or []) if "logprobs" in raw else []
    return Piece(
        text=_text(raw["text_output"]),
        positions=[
            [Candidate(entry["decoded_token"] or "", float(entry["logprob"])) for entry in position.values()]
            for position in positions
        ],
        finish_reason=None if reason == "None" else reason,
        input_tokens=_number(raw["num_input_tokens"]),
        output_tokens=_number(raw["num_output_tokens"]),
    )


def _text(raw: bytes) -> str:
    """The first element of a BYTES tensor: four bytes of length, little-endian, then UTF-8."""
    return raw[4 : 4 + _number(raw)].decode("utf-8")


def _number(raw: bytes) -> int:
    """The first element of a UINT32 tensor."""
    return int.from_bytes(raw[:4], "little")


def _from_status(code: str, detail: str) -> UpstreamError:
    """The connection's own errors. Those of requests come as messages, see `from_message`."""
    if code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
        return UpstreamError(code, detail, unavailable(TRY_AGAIN, "model_unavailable"))
    if code == "DEADLINE_EXCEEDED":
        return UpstreamError(code, detail, ApiError(504, "the model did not answer in time", code="timeout"))
    return _failed(code, detail)


def from_message(message: str) -> UpstreamError:
    """An error of a request, which Triton sends in a stream as text without a status.

    What is about a parameter is the client's to read. Everything else stays in the log.
    """
    if NOT_THERE.search(message):
        return UpstreamError(
            "UNAVAILABLE", message, unavailable(TRY_AGAIN, "model_unavailable", retry_after=2)
        )
    if REFUSED.search(message):
        answer = ApiError(400, f"the model server refused the request: {shown(message, 300)}")
        return UpstreamError("INVALID_ARGUMENT", message, answer)
    return _failed("UNKNOWN", message)


def _closed(failure: Exception) -> UpstreamError:
    """The connection was closed on this side."""
    return UpstreamError("CLOSED", str(failure), unavailable(TRY_AGAIN, "model_unavailable"))


def _failed(code: str, detail: str) -> UpstreamError:
    return UpstreamError(code, detail, ApiError(502, "the model server failed", code="model_failed"))
