"""What a rollout leaves behind: token micro-batches, per-token quantities, and the metrics read off them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from train.ppo.advantages import Reduce, explained_variance, masked_moments
from train.ppo.losses import kl_k1, kl_k3
from train.ppo.models import TokenBatch

SAMPLES_KEPT = 4
"""Responses of a rollout kept for samples.jsonl."""


@dataclass(frozen=True)
class Rollout:
    """One process's responses, cut at the end token; sampled_logprobs are those at the time of drawing."""

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]
    sampled_logprobs: list[list[float]]


@dataclass(frozen=True)
class MicroBatch:
    """Responses that go through the networks together: in the scoring pass and in every epoch alike.

    rows: their indices in the process's rollout, [B].
    """

    rows: Tensor
    tokens: TokenBatch


@dataclass(frozen=True)
class Experience:
    """A scored rollout, one row per response, [B, R] padded to the longest one and 0 outside mask_BR.

    scores_B are the reward's own; shaped_B those after clipping and the treatment of a missing end token.
    """

    rollout: Rollout
    mask_BR: Tensor
    scores_B: Tensor
    shaped_B: Tensor
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
    rollout: Rollout, num_mini_batches: int, micro_batch_size: int, pad_id: int, device: torch.device
) -> list[list[MicroBatch]]:
    """Per mini-batch, rows sorted by length and cut into micro-batches that stay together for the whole
    update.

    The same rows with the same padding in the scoring pass and in the first epoch are what makes the first
    ratio exactly 1.
    """
    prompts, responses = rollout.prompts, rollout.responses
    share = len(prompts) // num_mini_batches
    mini_batches = []
    for start in range(0, len(prompts), share):
        order = sorted(range(start, start + share), key=lambda i: (len(prompts[i]) + len(responses[i]), i))
        micro_batches = []
        for first in range(0, share, micro_batch_size):
            rows = order[first : first + micro_batch_size]
            tokens = TokenBatch.build(
                [prompts[i] for i in rows], [responses[i] for i in rows], pad_id, device
            )
            micro_batches.append(MicroBatch(torch.tensor(rows, device=device), tokens))
        mini_batches.append(micro_batches)
    return mini_batches


def require_finite(tensor: Tensor, name: str, step: int) -> None:
    """Raise PosttrainError, naming tensor and update, when an entry is NaN or infinite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise PosttrainError(
            f"PPO update {step}: {bad} of {tensor.numel()} entries of {name} are not finite. Training "
            "stopped before they reached the weights; lower learning_rate or max_grad_norm, turn bf16 "
            "off, or check the reward model."
        )


def describe(experience: Experience, kl_coef: float, reduce: Reduce) -> dict[str, float]:
    """Metrics of a rollout, before the update on it.

    kl and kl_k3: nats per response, k1 and k3 estimators summed over its tokens; entropy: nats per token;
    rollout_gap: mean |log-probability when sampled - in the trainer's forward| per token, the numerical
    distance of the two passes.
    """
    mask = experience.mask_BR
    everyone = torch.ones_like(experience.scores_B, dtype=torch.bool)
    k1_B = kl_k1(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1)
    k3_B = kl_k3(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1)
    finished_B = torch.tensor(experience.rollout.finished, device=mask.device)
    width = mask.shape[1]
    sampled_BR = torch.tensor(
        [row + [0.0] * (width - len(row)) for row in experience.rollout.sampled_logprobs], device=mask.device
    )
    score, score_variance = masked_moments(experience.scores_B, everyone, reduce)
    per_response = {
        "kl": k1_B,
        "kl_k3": k3_B,
        "rlhf_reward": experience.shaped_B - kl_coef * k1_B,
        "eos_rate": finished_B.float(),
        "response_length": mask.sum(-1).float(),
    }
    per_token = {
        "entropy": experience.entropy_BR,
        "values": experience.values_BR,
        "returns": experience.returns_BR,
        "rollout_gap": (sampled_BR - experience.logprobs_BR).abs(),
    }
    return {
        "score": score.item(),
        "score_std": score_variance.sqrt().item(),
        **{name: masked_moments(values, everyone, reduce)[0].item() for name, values in per_response.items()},
        **{name: masked_moments(values, mask, reduce)[0].item() for name, values in per_token.items()},
        "explained_variance": explained_variance(
            experience.values_BR, experience.returns_BR, mask, reduce
        ).item(),
    }


def first_samples(experience: Experience) -> list[Sample]:
    """The first few responses of a rollout, for people to read."""
    rollout = experience.rollout
    kl_B = kl_k1(experience.logprobs_BR, experience.reference_logprobs_BR).sum(-1).tolist()
    scores = experience.scores_B.tolist()
    return [
        Sample(rollout.prompts[i], rollout.responses[i], scores[i], kl_B[i], rollout.finished[i])
        for i in range(min(SAMPLES_KEPT, len(scores)))
    ]
