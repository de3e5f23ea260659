"""A policy's answers to one batch of prompts, scored. Random numbers belong to the prompt and the sample.

Answer i to a prompt is a function of the seed, the prompt's id and i (engine hf): the first 4 answers of n =
8 are those of n = 4, whatever else the data set holds. With the engines that draw their own random numbers
the answers depend on the batch, and with vllm they differ from run to run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TopPLogitsWarper

from data_prep.dataset import Split
from posttrain.errors import PosttrainError
from train.ppo.engines.base import RolloutEngine
from train.ppo.reward_mix import Rewards
from train.ppo.reward_sources import RewardBatch
from train.ppo.rollout import truncate_at_eos
from train.synthesis.selection import Answer

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt. row: of the data set, all columns; line: counted from 1 in the file of its side; place: its
    place among the prompts that are answered."""

    split: Split
    line: int
    row: dict[str, Any]
    ids: list[int]
    place: int

    @property
    def key(self) -> str:
        """What its random numbers are drawn with."""
        return f"{self.split}/{self.row['id']}"


@dataclass(frozen=True)
class Drawn:
    """Answers without scores, prompt by prompt and n to each: token ids, texts, and whether they ended."""

    prompts: list[Prompt]
    responses: list[list[int]]
    texts: list[str]
    finished: list[bool]


class Scorer(Protocol):
    """Gives every answer a score, or the reason why it has none."""

    def __call__(self, drawn: Drawn) -> list[tuple[float | None, str | None, dict[str, float]]]:
        """(score, reason, parts) of each answer in order."""
        ...


class Nucleus(nn.Module):
    """A policy whose logits outside the nucleus are minus infinity (Holtzman et al. 2020, 1904.09751)."""

    def __init__(self, policy: nn.Module, temperature: float, top_p: float) -> None:
        super().__init__()
        self.policy, self.temperature, self.warper = policy, temperature, TopPLogitsWarper(top_p)

    def forward(self, **arguments: Any) -> Any:
        """The policy's output with the logits at the last place, [B, 1, V]."""
        output = self.policy(**arguments)
        logits_BV = output.logits[:, -1].float()
        cut_BV = self.warper(arguments["input_ids"], logits_BV / self.temperature)
        output.logits = logits_BV.masked_fill(cut_BV == -math.inf, -math.inf).unsqueeze(1)
        return output


def answer_uniforms(seed: int, key: str, sample: int, count: int) -> np.ndarray:
    """The random numbers of one answer, float64 in [0, 1), [count]; a larger count only adds to them."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{sample}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(count)


@dataclass(frozen=True)
class AnswerSampler:
    """Draws n answers to each prompt of a batch, and has them scored."""

    engine: RolloutEngine
    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    n: int
    max_new_tokens: int
    seed: int

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        """n scored answers to each prompt."""
        drawn = self.draw(prompts)
        verdicts = self.scorer(drawn)
        answers = [
            Answer(index % self.n, text, len(response), finished, *verdict)
            for index, (text, response, finished, verdict) in enumerate(
                zip(drawn.texts, drawn.responses, drawn.finished, verdicts, strict=True)
            )
        ]
        return [answers[first : first + self.n] for first in range(0, len(answers), self.n)]

    def draw(self, prompts: Sequence[Prompt]) -> Drawn:
        """n answers to each prompt, without scores."""
        uniforms_BN = np.stack(
            [
                answer_uniforms(self.seed, prompt.key, sample, self.max_new_tokens)
                for prompt in prompts
                for sample in range(self.n)
            ]
        )
        repeated = [prompt for prompt in prompts for _ in range(self.n)]
        samples = self.engine(self.policy, [prompt.ids for prompt in repeated], torch.from_numpy(uniforms_BN))
        eos_id = self.tokenizer.eos_token_id
        cut = [truncate_at_eos(response, eos_id) for response in samples.responses]
        responses = [response for response, _ in cut]
        texts = self.tokenizer.batch_decode(
            responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Drawn(repeated, responses, texts, [finished for _, finished in cut])


@dataclass(frozen=True)
class RewardScorer:
    """The rewards of the ppo stage as a scorer. weighted: the functions whose score enters the sum.

    An answer on which one of them has no opinion has no score.
    """

    rewards: Rewards
    weighted: tuple[str, ...]

    def __call__(self, drawn: Drawn) -> list[tuple[float | None, str | None, dict[str, float]]]:
        """See Scorer. Raises PosttrainError for a score that is not finite."""
        result = self.rewards(
            RewardBatch(
                [prompt.ids for prompt in drawn.prompts],
                drawn.responses,
                drawn.finished,
                [prompt.place for prompt in drawn.prompts],
            )
        )
        silent_B = torch.zeros(len(drawn.responses))
        for name in self.weighted:
            silent_B += result.parts[f"{name}.no_opinion"].cpu()
        totals = _finite(result.total_B, drawn)
        parts = {name: values.tolist() for name, values in result.parts.items()}
        return [
            (None, "no_opinion", found) if silent_B[index] else (total, None, found)
            for index, total in enumerate(totals)
            for found in [{name: values[index] for name, values in parts.items()}]
        ]


def _finite(scores_B: Tensor, drawn: Drawn) -> list[float]:
    wrong = (~scores_B.isfinite()).nonzero().flatten().tolist()
    if wrong:
        prompt = drawn.prompts[wrong[0]]
        raise PosttrainError(
            f"{len(wrong)} of {len(scores_B)} scores are not finite, the first of an answer to prompt "
            f"{prompt.row['id']}: the reward model is broken, or its weights are"
        )
    return scores_B.tolist()
