"""The interface between the PPO trainer and what generates its responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from posttrain.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn: from softmax(logits / temperature), the whole of it.

    max_new_tokens: longest response in tokens, its end token included. The fields after temperature exist to
    be refused: PPO's ratio, KL and entropy are those of softmax(logits / temperature), and responses from a
    cut or reshaped distribution would come from another policy than the one that is updated.

    Raises UserError for anything but a length, a temperature above 0 and neutral values.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: a response has at least one token")
        if not self.temperature > 0:
            raise UserError(
                f"temperature is {self.temperature}: PPO needs samples, so it must be above 0 (1.0 leaves "
                "the model's distribution as it is)"
            )
        given = {
            "top_k": (self.top_k, 0),
            "top_p": (self.top_p, 1.0),
            "min_p": (self.min_p, 0.0),
            "repetition_penalty": (self.repetition_penalty, 1.0),
        }
        for name, (value, neutral) in given.items():
            if value is not None and value != neutral:
                raise UserError(
                    f"{name} is {value}: PPO samples from softmax(logits / temperature) and nothing else, "
                    "because the log-probabilities of its update are those of that distribution. "
                    f"Leave {name} out and use temperature"
                )


@dataclass(frozen=True)
class Samples:
    """Responses (end token included where written) and the log-probability each token had when it was
    drawn.

    Log-probabilities are in nats, of the whole distribution at the sampling temperature.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]


class Sampler(Protocol):
    """A rollout engine: the policy's responses to prompts at the run's temperature."""

    @property
    def uses_uniforms(self) -> bool:
        """Whether a response is a function of its prompt, the weights and its row of uniforms alone.

        Where false, the engine draws its own random numbers, and responses can depend on the whole call.
        """
        ...

    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        """uniforms_BN: one random number per prompt and response position, float64 in [0, 1); N is the
        longest response. Results are in the order of the prompts.
        """
        ...

    def sync(self, policy: nn.Module) -> None:
        """Make the engine's weights those of the policy. Called on every process at the start, after a
        checkpoint is loaded and after every update."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it is not called again after this."""
        ...


RolloutEngine = Sampler
