"""One answer on its way: what is asked, what has been drawn, and where it goes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from serving.backends.vllm.detokenise import AnswerText
from serving.backends.vllm.sampling import SamplingParams

CANCEL_CHECK_EVERY = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one candidate at one position; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True)
class Update:
    """What one token added to an answer. `logprobs`: the drawn token, then the likeliest if asked for."""

    text: str
    token_id: int
    logprob: float
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    num_input_tokens: int


class Sink(Protocol):
    """Where a request's answer goes; called from the engine's thread."""

    def update(self, update: Update) -> None:
        """One more token; the last one has a finish_reason."""

    def fail(self, message: str, unavailable: bool) -> None:
        """No more is coming: the request failed."""

    def cancelled(self) -> bool:
        """Whether the client has gone; then no more is computed or sent."""


@dataclass
class Answer:
    """One answer; `key` names it in the batch, `max_tokens` is what the context leaves of the wanted ones."""

    key: str
    prompt_ids: list[int]
    params: SamplingParams
    sink: Sink
    generator: torch.Generator
    text: AnswerText
    max_tokens: int
    drawn: int = 0
    finished: bool = field(default=False)

    def is_gone(self) -> bool:
        """Whether the client has gone, asked until the first token and every few later; then it is over."""
        if self.drawn % CANCEL_CHECK_EVERY == 0:
            try:
                self.finished = self.sink.cancelled()
            except Exception:
                self._drop("cancelled")
        return self.finished

    def add(
        self, token: int, logprob: float, logprobs: tuple[TokenLogprob, ...] | None, stop_ids: frozenset[int]
    ) -> None:
        """Send one more token; sets `finished` with the last one."""
        self.drawn += 1
        if not math.isfinite(logprob):
            self.fail("generation failed: the model's output is not finite", unavailable=False)
            return
        params = self.params
        reason = None
        if (token in stop_ids and not params.ignore_eos) or token in params.stop_token_ids:
            reason = "stop"
        elif self.drawn >= self.max_tokens:
            reason = "length"
        text, stopped = self.text.add(token, last=reason is not None)
        if stopped:
            reason = "stop"
        self.finished = reason is not None
        try:
            self.sink.update(Update(text, token, logprob, logprobs, reason, len(self.prompt_ids)))
        except Exception:
            self._drop("update")

    def fail(self, message: str, unavailable: bool) -> None:
        """Send an error instead of the rest."""
        self.finished = True
        try:
            self.sink.fail(message, unavailable)
        except Exception:
            self._drop("fail")

    def _drop(self, call: str) -> None:
        """A sink that cannot be reached any more, whatever the reason, costs its own request and no other."""
        self.finished = True
        log.exception("a request is dropped: its sink's %s() failed", call)


class LogprobReader:
    """Log-probabilities of drawn tokens and of the likeliest ones, from raw logits."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def read(
        self, logits_RV: torch.Tensor, tokens: Sequence[int], counts: Sequence[int | None]
    ) -> list[tuple[float, tuple[TokenLogprob, ...] | None]]:
        """Per row: the drawn token's log-probability and, where a count is given, the candidates' too.

        Args:
            logits_RV: raw next-token logits, float32.
            tokens: the drawn token of each row.
            counts: how many of the likeliest tokens each row's request wants besides; None: no candidates.
        """
        totals_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
        drawn_R1 = logits_RV.gather(1, torch.tensor(tokens)[:, None])
        drawn: list[float] = (drawn_R1 - totals_R1)[:, 0].tolist()
        wanted = max((count for count in counts if count is not None), default=None)
        if wanted is None:
            return [(logprob, None) for logprob in drawn]
        ranks: list[int] = ((logits_RV > drawn_R1).sum(dim=-1) + 1).tolist()
        top_RK = logits_RV.topk(min(wanted, logits_RV.shape[1]), dim=-1)
        values: list[list[float]] = (top_RK.values - totals_R1).tolist()
        ids: list[list[int]] = top_RK.indices.tolist()
        read: list[tuple[float, tuple[TokenLogprob, ...] | None]] = []
        for row, count in enumerate(counts):
            if count is None:
                read.append((drawn[row], None))
                continue
            first = TokenLogprob(tokens[row], drawn[row], ranks[row], self._text(tokens[row]))
            others = (
                # Equal values share a rank.
                TokenLogprob(i, value, values[row].index(value) + 1, self._text(i))
                for i, value in zip(ids[row][:count], values[row][:count], strict=True)
                if i != tokens[row]
            )
            read.append((drawn[row], (first, *others)))
        return read

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self._tokenizer.decode([token]))
        return text
