"""What a rollout leaves behind: token micro-batches, per-token quantities, and the metrics read off them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from train.ppo.advantages import Reduce, explained_variance, masked_moments
from train.ppo.batches import MicroBatch, micro_batches
from train.ppo.config import PpoStageConfig
from train.ppo.losses import kl_k1, kl_k3

SAMPLES_KEPT = 4
"""Responses of a rollout kept for samples.jsonl."""


class NotFiniteError(PosttrainError):
    """A NaN or an infinity on its way to the weights, in update `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Rollout:
    """One process's responses, cut at the end token.

    sampled_logprobs: those at the time of drawing. indices: rows of the prompt data set.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]
    sampled_logprobs: list[list[float]]
    indices: list[int]


@dataclass(frozen=True)
class Experience:
    """A scored rollout, one row per response, [B, R] padded to the longest one and 0 outside mask_BR.

    loss_mask_BR: the tokens that are trained on. scores_B: the weighted sum of the reward sources, whose own
    scores are in score_parts; shaped_B: the same after clipping and the treatment of a missing end token.
    """

    rollout: Rollout
    mini_batches: list[list[MicroBatch]]
    mask_BR: Tensor
    loss_mask_BR: Tensor
    scores_B: Tensor
    score_parts: dict[str, Tensor]
    shaped_B: Tensor
    sampled_logprobs_BR: Tensor
    logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


@dataclass(frozen=True)
class Sample:
    """One response for samples.jsonl: token ids, the reward's score, KL to the reference in nats."""

    prompt: list[int]
    response: list[int]
    score: float
    kl: float
    finished: bool


def batch_share(batch_size: int, num_mini_batches: int, processes: int, index: int) -> list[int]:
    """Offsets in the global batch of process `index`: an equal slice of every mini-batch, in order."""
    width = batch_size // num_mini_batches
    share = width // processes
    return [m * width + index * share + i for m in range(num_mini_batches) for i in range(share)]


def split_rollout(
    rollout: Rollout, config: PpoStageConfig, pad_id: int, device: torch.device, *, packed: bool = False
) -> list[list[MicroBatch]]:
    """Per mini-batch, rows of similar length cut into micro-batches that stay together for the whole update.

    The same rows with the same padding in the scoring pass and in the first epoch are what makes the first
    ratio exactly 1.
    """
    share = len(rollout.prompts) // config.num_mini_batches
    return [
        micro_batches(
            rollout.prompts,
            rollout.responses,
            range(start, start + share),
            pad_id,
            device,
            config.micro_batch_tokens,
            config.micro_batch_size,
            packed=packed,
        )
        for start in range(0, len(rollout.prompts), share)
    ]


def loss_mask(mask_BR: Tensor, finished_B: Tensor, truncated: str) -> Tensor:
    """The response tokens to train on; `truncated` says what becomes of responses without an end token."""
    if truncated == "keep":
        return mask_BR
    if truncated == "mask":
        return mask_BR & finished_B.unsqueeze(1)
    places_R = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    last_BR = places_R == (mask_BR.sum(-1, keepdim=True) - 1)
    return mask_BR & ~(last_BR & ~finished_B.unsqueeze(1))


def loss_weights(experience: Experience, config: PpoStageConfig, reduce: Reduce) -> Tensor:
    """Weight of every token in the losses of its mini-batch, [B, R]; they sum to 1 over the processes.

    With loss_aggregation `token` all trained tokens weigh the same, with `sequence` all responses that have
    any. A mini-batch without a trained token has weights of 0.
    """
    mask = experience.loss_mask_BR.to(experience.logprobs_BR.dtype)
    if config.loss_aggregation == "sequence":
        mask = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.zeros_like(mask)
    for mini_batch in experience.mini_batches:
        rows = torch.cat([micro.rows for micro in mini_batch])
        total = reduce(mask[rows].sum())
        weights[rows] = mask[rows] / total if total > 0 else 0.0
    return weights


def require_finite(tensor: Tensor, name: str, step: int, reduce: Reduce) -> None:
    """Raise NotFiniteError, naming tensor and update, when an entry is NaN or infinite.

    On every process or on none: one that stopped alone would leave the others waiting for it.
    """
    bad = (~torch.isfinite(tensor)).sum()
    bad, total = reduce(torch.stack([bad, torch.full_like(bad, tensor.numel())])).tolist()
    if bad:
        raise NotFiniteError(
            f"PPO update {step}: {bad} of {total} entries of {name} are not finite. Training "
            "stopped before they reached the weights; lower learning_rate or max_grad_norm, turn bf16 "
            "off, or check the reward model.",
            step,
        )


def describe(
    experience: Experience, kl_coef: float, reduce: Reduce, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Metrics of a rollout, before the update on it.

    kl and kl_k3: nats per response, k1 and k3 estimators summed over its tokens; entropy: nats per token;
    rollout_gap: mean |log-probability when sampled - in the trainer's forward| per token, the numerical
    distance of the two passes; distinct_responses: share of the responses that are different.
    """
    mask = experience.mask_BR
    everyone = torch.ones_like(experience.scores_B, dtype=torch.bool)
    k1_B = kl_k1(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1)
    k3_B = kl_k3(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1)
    finished_B = torch.tensor(experience.rollout.finished, device=mask.device)
    score, score_variance = masked_moments(experience.scores_B, everyone, reduce)
    per_response = {
        "kl": k1_B,
        "kl_k3": k3_B,
        "rlhf_reward": experience.shaped_B - kl_coef * k1_B,
        "eos_rate": finished_B.float(),
        "response_length": mask.sum(-1).float(),
        **{f"reward/{name}": part for name, part in experience.score_parts.items()},
    }
    per_token = {
        "entropy": experience.entropy_BR,
        "values": experience.values_BR,
        "returns": experience.returns_BR,
        "rollout_gap": (experience.sampled_logprobs_BR - experience.logprobs_BR).abs(),
    }
    return {
        "score": score.item(),
        "score_std": score_variance.sqrt().item(),
        "distinct_responses": _distinct_share(experience, gather),
        **{name: masked_moments(values, everyone, reduce)[0].item() for name, values in per_response.items()},
        **{name: masked_moments(values, mask, reduce)[0].item() for name, values in per_token.items()},
        "explained_variance": explained_variance(
            experience.values_BR, experience.returns_BR, mask, reduce
        ).item(),
    }


def _distinct_share(experience: Experience, gather: Callable[[Tensor], Tensor]) -> float:
    """Different responses over responses, of all processes (told apart by a 64-bit hash)."""
    hashes = [hash(tuple(response)) for response in experience.rollout.responses]
    everyone = gather(torch.tensor(hashes, device=experience.mask_BR.device))
    return len(everyone.unique()) / len(everyone)


def first_samples(experience: Experience) -> list[Sample]:
    """The first few responses of a rollout, for people to read."""
    rollout = experience.rollout
    kl_B = kl_k1(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1).tolist()
    scores = experience.scores_B.tolist()
    return [
        Sample(rollout.prompts[i], rollout.responses[i], scores[i], kl_B[i], rollout.finished[i])
        for i in range(min(SAMPLES_KEPT, len(scores)))
    ]
