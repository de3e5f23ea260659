"""Triton responses from an engine's updates; the tensors are those of Triton's vLLM backend."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.backends.vllm.sequences import TokenLogprob, Update

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Responder:
    """Answers one request through its sender: a response per token when streaming, otherwise one in all.

    A request for n answers has n `sinks`; its response has n elements in every tensor but num_input_tokens.
    """

    def __init__(self, sender: Any, stream: bool, prefix: str, flags: set[str], n: int) -> None:
        """`prefix` opens every answer; `flags` name the outputs wanted besides text_output."""
        self.sender = sender
        self.stream = stream
        self.prefix = prefix
        self.flags = flags
        self.sinks = [_AnswerSink(self) for _ in range(n)]
        self.closed = False

    def advance(self) -> None:
        """Send what has come in, or wait for the rest."""
        done = all(sink.finish_reason is not None for sink in self.sinks)
        if self.closed or not (self.stream or done):
            return
        self.sender.send(pb_utils.InferenceResponse(self._tensors()), flags=LAST if done else 0)
        for sink in self.sinks:
            sink.pending = []

    def fail(self, message: str, unavailable: bool) -> None:
        """Send the error as the final response."""
        if not self.closed:
            self.closed = True
            send_error(self.sender, message, unavailable)

    def cancelled(self) -> bool:
        """Whether the client went away; then the stream is closed here, since nothing else will."""
        if not self.closed and self.sender.is_cancelled():
            self.closed = True
            error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
            self.sender.send(pb_utils.InferenceResponse(error=error), flags=LAST)
        return self.closed

    def _tensors(self) -> list[Any]:
        sinks = self.sinks
        tensors = [_strings("text_output", (self.prefix + sink.pending_text() for sink in sinks))]
        if "return_finish_reason" in self.flags:
            tensors.append(_strings("finish_reason", (str(sink.finish_reason) for sink in sinks)))
        if "return_cumulative_logprob" in self.flags:
            totals = [sink.cumulative_logprob for sink in sinks]
            tensors.append(pb_utils.Tensor("cumulative_logprob", np.array(totals, dtype=np.float32)))
        if "return_logprobs" in self.flags:
            tensors.append(
                _strings(
                    "logprobs", (logprobs_json(each.logprobs for each in sink.pending) for sink in sinks)
                )
            )
        if "return_num_input_tokens" in self.flags:
            count = np.array([sinks[0].num_input_tokens], dtype=np.uint32)
            tensors.append(pb_utils.Tensor("num_input_tokens", count))
        if "return_num_output_tokens" in self.flags:
            counts = np.array([len(sink.pending) for sink in sinks], dtype=np.uint32)
            tensors.append(pb_utils.Tensor("num_output_tokens", counts))
        return tensors


class _AnswerSink:
    """The engine's sink for one of a request's answers."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self.pending: list[Update] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.num_input_tokens = 0

    def update(self, update: Update) -> None:
        self.pending.append(update)
        self.cumulative_logprob += update.logprob
        self.finish_reason = update.finish_reason
        self.num_input_tokens = update.num_input_tokens
        self._responder.advance()

    def fail(self, message: str, unavailable: bool) -> None:
        self._responder.fail(message, unavailable)

    def cancelled(self) -> bool:
        return self._responder.cancelled()

    def pending_text(self) -> str:
        return "".join(update.text for update in self.pending)


def logprobs_json(positions: Iterable[tuple[TokenLogprob, ...] | None]) -> str:
    """The `logprobs` output: per position {token id: {logprob, rank, decoded_token}}, the drawn one first."""
    found = list(positions)
    if any(position is None for position in found):
        return "null"
    return json.dumps(
        [
            {
                str(c.token_id): {"logprob": c.logprob, "rank": c.rank, "decoded_token": c.text}
                for c in position
            }
            for position in found
            if position is not None
        ]
    )


def send_error(sender: Any, message: str, unavailable: bool) -> None:
    """Close a request with INVALID_ARG, or UNAVAILABLE where the fault is the server's."""
    code = pb_utils.TritonError.UNAVAILABLE if unavailable else pb_utils.TritonError.INVALID_ARG
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=LAST)


def _strings(name: str, texts: Iterable[str]) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode("utf-8") for text in texts], dtype=np.object_))
