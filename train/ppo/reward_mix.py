"""Adds up the rewards of a response: ensemble of reward models, running normalisation, weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train.ppo.advantages import Reduce, local, masked_moments
from train.ppo.reward_config import RewardsConfig
from train.ppo.reward_functions import FunctionReward
from train.ppo.reward_sources import (
    LengthPenaltySource,
    LoadedRewardModel,
    ModelReward,
    RepetitionPenaltySource,
    RetemplatedModelReward,
    RewardBatch,
    RewardSource,
)

SMALLEST_SPREAD = 1e-6
"""A running standard deviation below this is taken for none, and nothing is divided by it."""


@dataclass(frozen=True)
class RewardResult:
    """total_B: what is trained on, before clipping and the treatment of a missing end token. float32, [B].

    parts, [B] each: every source's raw score by its name; `model` the reward model's or the ensemble's, and
    with a normaliser `model.normalised`, which enters the total in its place. Of an ensemble also each
    member (`model.reward`, `model.ensemble.0`, ...) and `model.spread`, the standard deviation of what is
    combined. 0 or 1: `NAME.no_opinion` where a function gave no score (its part is then 0), `NAME.cut` where
    a dialogue exceeded the context of a reward model with its own template.
    """

    total_B: Tensor
    parts: dict[str, Tensor]


def combine_ensemble(
    scores_KB: Tensor, how: Literal["mean", "min", "mean_minus_std"], std_coef: float
) -> Tensor:
    """One score per response from those of K models, [B].

    `mean_minus_std` is mean - std_coef * population standard deviation over the models. Source: Coste et al.
    2023 (2310.02743), whose WCO is `min` and whose UWO takes off the variance instead.
    """
    if how == "min":
        return scores_KB.amin(0)
    mean_B = scores_KB.mean(0)
    return mean_B if how == "mean" else mean_B - std_coef * scores_KB.std(0, correction=0)


class RunningMoments:
    """Mean and population variance of all scores seen, by all processes, merged batch by batch.

    Source: Chan, Golub and LeVeque 1979, eq. 2.1: with d the difference of the means, the squared deviations
    of two parts add up to M2_a + M2_b + d^2 n_a n_b / (n_a + n_b). Kept in double precision.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, scores_B: Tensor, reduce: Reduce = local) -> None:
        """Take in the scores of one batch, of which every process holds a share."""
        everyone = torch.ones_like(scores_B, dtype=torch.bool)
        mean, variance = (moment.item() for moment in masked_moments(scores_B, everyone, reduce))
        count = reduce(everyone.sum().to(scores_B.dtype)).item()
        total, difference = self.count + count, mean - self.mean
        self.squares += variance * count + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while the scores do not differ."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > SMALLEST_SPREAD else 1.0

    def normalise(self, scores: Tensor, how: Literal["none", "scale", "standardise"]) -> Tensor:
        """`scale` divides by the standard deviation, `standardise` subtracts the mean before it does."""
        if how == "none":
            return scores
        return (scores - self.mean if how == "standardise" else scores) / self.std

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` continues from, exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


class Rewards:
    """reward = model_weight * model + sum of weight * source. `build_rewards` makes it from a configuration.

    models: that of the stage's `reward`, then the ensemble's; none is allowed. Each is normalised by its own
    moments, before they are combined. Calls are collective where `reduce` is.
    """

    def __init__(
        self,
        config: RewardsConfig,
        models: Sequence[RewardSource],
        sources: Sequence[RewardSource],
        device: torch.device | str,
        reduce: Reduce = local,
    ) -> None:
        self.config, self.models, self.sources = config, list(models), list(sources)
        self.device, self.reduce = device, reduce
        self.moments = [RunningMoments() for _ in self.models]

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> RewardResult:
        total_B = torch.zeros(len(batch.responses), device=self.device)
        parts: dict[str, Tensor] = {}
        if self.models:
            model_B = self._score_with_models(batch, parts)
            if self.config.model_weight:
                total_B += self.config.model_weight * model_B
        for source in self.sources:
            scores_B = self._score(source, batch)
            if isinstance(source, FunctionReward):
                parts[f"{source.name}.no_opinion"] = scores_B.isnan().float()
                scores_B = scores_B.nan_to_num(nan=0.0)
            parts[source.name] = scores_B
            if source.weight:
                total_B += source.weight * scores_B
        return RewardResult(total_B, parts)

    def _score_with_models(self, batch: RewardBatch, parts: dict[str, Tensor]) -> Tensor:
        """What enters the total; the raw scores go to `parts`."""
        raw = []
        for model in self.models:
            raw.append(self._score(model, batch))
            if len(self.models) > 1:
                parts[model.name] = raw[-1]
            if isinstance(model, RetemplatedModelReward):
                parts[f"{model.name}.cut"] = model.cut_B.to(self.device).float()
        scores_KB = torch.stack(raw)
        parts["model"] = self._combine(scores_KB)
        how = self.config.normalise
        if how != "none":
            for scores_B, moments in zip(raw, self.moments, strict=True):
                moments.update(scores_B, self.reduce)
            normalised = [m.normalise(scores_B, how) for scores_B, m in zip(raw, self.moments, strict=True)]
            scores_KB = torch.stack(normalised)
            parts["model.normalised"] = self._combine(scores_KB)
        if len(self.models) > 1:
            parts["model.spread"] = scores_KB.std(0, correction=0)
        return parts["model" if how == "none" else "model.normalised"]

    def _combine(self, scores_KB: Tensor) -> Tensor:
        ensemble = self.config.ensemble
        if ensemble is None:
            return scores_KB[0]
        return combine_ensemble(scores_KB, ensemble.combine, ensemble.std_coef)

    def _score(self, source: RewardSource, batch: RewardBatch) -> Tensor:
        scores_B = source(batch).to(self.device, torch.float32)
        assert scores_B.shape == (len(batch.responses),), (source.name, scores_B.shape)
        return scores_B

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the running moments. The same on every process."""
        return {"moments": [moments.state_dict() for moments in self.moments]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of rewards with the same configuration."""
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            moments.load_state_dict(saved)


def build_rewards(
    config: RewardsConfig,
    own: Sequence[RewardSource],
    models: Sequence[LoadedRewardModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_tokens: int,
    device: torch.device | str,
    reduce: Reduce = local,
) -> Rewards:
    """The rewards that `config` asks for; the models are moved to `device`.

    own: the reward model among the run's networks, if there is one. models: of `load_reward_models`.
    tokenizer: the policy's. rows: the prompts that were kept, in the order
    of RewardBatch.indices. max_tokens: padded tokens in one forward of a reward model. Raises UserError for
    a function that cannot be used and a chat template that does not fit the prompts.
    """
    sources: list[RewardSource] = [
        FunctionReward(item, index, tokenizer, rows) for index, item in enumerate(config.functions)
    ]
    if config.length_penalty is not None:
        sources.append(LengthPenaltySource(config.length_penalty))
    if config.repetition_penalty is not None:
        sources.append(RepetitionPenaltySource(config.repetition_penalty))
    scorers: list[RewardSource] = list(own)
    for loaded in models:
        name = f"model.{loaded.field.removeprefix('rewards.').replace('.models.', '.')}"
        module: nn.Module = loaded.model
        module.to(device)
        if loaded.tokenizer is None:
            scorers.append(ModelReward(name, config.model_weight, loaded, max_tokens))
        else:
            conversations = rows["prompt"]
            scorers.append(
                RetemplatedModelReward(
                    name, config.model_weight, loaded, max_tokens, tokenizer, conversations
                )
            )
    return Rewards(config, scorers, sources, device, reduce)
