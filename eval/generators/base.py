"""What every target of a benchmark can be asked, whatever stands behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from posttrain.errors import UserError
from posttrain.hashing import hash_json

Message = dict[str, str]
Status = Literal["ok", "rejected"]
Advance = Callable[[int], None]


def silent(count: int) -> None:
    """Progress for those who do not look."""


@dataclass(frozen=True)
class Prompt:
    """One question. question: its text in the data, before a template, by which given answers are found.

    sample: which of several answers to this prompt is wanted, from 0.
    """

    id: str
    messages: list[Message]
    question: str
    sample: int = 0


@dataclass(frozen=True)
class Settings:
    """Everything beside prompt and model that decides an answer. temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Output:
    """One answer. finished: it ended by itself; None where that is not known.

    Tokens are None where nobody counted. status "rejected": the target does not take this prompt, and detail
    says why; such a prompt has no answer, which is not a wrong one.
    """

    text: str
    finished: bool | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    status: Status = "ok"
    detail: str = ""


@dataclass(frozen=True)
class Continuation:
    """A text whose likelihood as the assistant's answer to `messages` is asked for."""

    messages: list[Message]
    text: str


@dataclass(frozen=True)
class Likelihood:
    """logprob: natural logarithm, summed over the `tokens` of the text, the end-of-turn token left out."""

    logprob: float
    tokens: int


@dataclass
class Usage:
    """How many answers were computed or asked for, and how many were in the cache already."""

    computed: int = 0
    cached: int = 0
    retries: dict[str, int] = field(default_factory=dict)


class Target:
    """One thing that is measured. Answers depend on prompt, settings and model, never on the batch."""

    kind = "target"

    def __init__(self, name: str) -> None:
        self.name = name
        self.usage = Usage()

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings, advance: Advance = silent
    ) -> list[Output]:
        """Answers in the order of the prompts.

        Raises RequeueError where some could not be had and the same command may get them later.
        """
        raise self._cannot("generate text")

    def loglikelihood(
        self, continuations: Sequence[Continuation], advance: Advance = silent
    ) -> list[Likelihood]:
        """Log-likelihoods in the order of the continuations. Raises UserError where the target has none."""
        raise self._cannot("give the likelihood of a text, which multiple choice and perplexity need")

    def _cannot(self, what: str) -> UserError:
        return UserError(
            f"targets.{self.name}: {self.kind} targets cannot {what}\n"
            "    use a target of kind `model`, or leave the task out with `skip`"
        )


def sample_key(messages: Sequence[Message], sample: int) -> int:
    """The number of an answer in the random stream: of prompt and sample alone, so the same in any batch,
    order or subset (63 bits of a sha256).
    """
    digest = hashlib.sha256(hash_json([list(messages), sample]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
