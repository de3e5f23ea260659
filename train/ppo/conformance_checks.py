"""Measures of `posttrain conformance` that need no update: pure functions, the tokenizer, forward passes,
rollouts.

A measure is 0 where the invariant holds to the bit, and None where it does not apply to the model. Deviations
of log-probabilities are means over a response, in nats, the worst response counting: a single wrong row
shows, and the rounding of single tokens in bfloat16 does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from train.ppo.advantages import gae, whiten
from train.ppo.batches import TokenBatch
from train.ppo.conformance import NEW_TOKENS, Subject
from train.ppo.engines.hf import HfSampler
from train.ppo.rollout import episode_uniforms

MARK = "conformance answer"


# Without the model


def distinct_pad(subject: Subject) -> float:
    tokenizer = subject.tokenizer
    return float(tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id)


def template_end(subject: Subject) -> float:
    """1 when the first special token that the template writes after an answer is not the end token."""
    tokenizer = subject.tokenizer
    dialogue = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": MARK}]
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert isinstance(text, str)
    if MARK not in text:
        return 1.0
    tail: list[int] = tokenizer(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False)["input_ids"]
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = [token for token in tail if token in added or token in tokenizer.all_special_ids]
    return float(not special or special[0] != subject.eos_id)


def brute_force_gae(subject: Subject) -> float:
    """Advantages by the recursion against the sum of the definition, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(6, 9, generator=generator) for _ in range(2))
    lengths, gamma, lam = [9, 1, 4, 7, 9, 2], 0.97, 0.9
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    worst = 0.0
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            terms = ((gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length))
            expected = sum(terms)
            worst = max(worst, abs(advantages[row, t].item() - expected))
            worst = max(worst, abs(returns[row, t].item() - expected - v[t]))
    return worst


def whitening(subject: Subject) -> float:
    """Distance of the whitened mean from 0 and variance from 1, under a mask, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    values = 3 + 2 * torch.randn(8, 12, generator=generator)
    mask = torch.rand(8, 12, generator=generator) < 0.6
    inside = whiten(values, mask)[mask].double()
    return max(abs(inside.mean().item()), abs(inside.var(unbiased=False).item() - 1))


# One forward pass


@torch.no_grad()
def repeatable(subject: Subject) -> float:
    with subject.accelerator.autocast():
        first, second = (subject.trainer.networks.policy(subject.batch, 1.0).logprobs for _ in range(2))
    return (first - second).abs().max().item()


@torch.no_grad()
def causal(subject: Subject) -> float:
    """Log-probabilities of the responses alone against those with more tokens behind them."""
    prompts, responses = subject.rollout.prompts, subject.rollout.responses
    longer = [response + prompt[::-1] for prompt, response in zip(prompts, responses, strict=True)]
    with subject.accelerator.autocast():
        worst = 0.0
        for single, prompt, response, more in zip(subject.singles(), prompts, responses, longer, strict=True):
            policy = subject.trainer.networks.policy
            alone = policy(single, 1.0).logprobs
            followed = policy(subject.tokens([prompt], [more]), 1.0).logprobs[: len(response)]
            worst = larger(worst, (alone - followed).abs().mean().item())
    return worst


def by_row(batch: TokenBatch, values_N: Tensor) -> tuple[Tensor, ...]:
    return values_N.split(batch.response_mask_BR.sum(-1).tolist())


def larger(one: float, other: float) -> float:
    """The larger of two; a NaN stays."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


@torch.no_grad()
def _batch_mates(subject: Subject, function: Callable[[TokenBatch], Tensor], relative: bool) -> float:
    batch, worst = subject.batch, 0.0
    with subject.accelerator.autocast():
        together = by_row(batch, function(batch))
        for whole, single in zip(together, subject.singles(), strict=True):
            alone = function(single)
            scale = alone.abs().clamp(min=1) if relative else torch.ones_like(alone)
            worst = larger(worst, ((whole - alone).abs() / scale).mean().item())
    return worst


def mates_logprobs(subject: Subject) -> float:
    return _batch_mates(subject, lambda b: subject.trainer.networks.policy(b, 1.0).logprobs, relative=False)


def mates_values(subject: Subject) -> float | None:
    """Not without a reward model: the value head then starts at zero."""
    if subject.trainer.networks.reward_trunk is None:
        return None
    return _batch_mates(subject, subject.trainer.networks.value, relative=True)


@torch.no_grad()
def mates_scores(subject: Subject) -> float | None:
    networks, batch, worst = subject.trainer.networks, subject.batch, 0.0
    if networks.reward_trunk is None:
        return None
    with subject.accelerator.autocast():
        together = networks.reward(batch)
        for whole, single in zip(together, subject.singles(), strict=True):
            alone = networks.reward(single)[0]
            worst = larger(worst, ((whole - alone).abs() / alone.abs().clamp(min=1)).item())
    return worst


def _own_logprobs(subject: Subject, prompt: list[int], response: list[int], padding: int) -> Tensor:
    """The model called by itself on one row, `padding` pad tokens before it; its own logits."""
    ids = torch.tensor([[subject.pad_id] * padding + prompt + response], device=subject.device)
    columns = torch.arange(ids.shape[1], device=subject.device)
    extra: dict[str, Tensor] = {}
    if padding:
        extra = {
            "attention_mask": (columns >= padding).long().unsqueeze(0),
            "position_ids": (columns - padding).clamp(min=0).unsqueeze(0),
        }
    with subject.trainer.networks.sampling() as policy:
        logits_TV = policy(input_ids=ids, use_cache=False, **extra).logits[0].float()
    start = padding + len(prompt) - 1
    table = logits_TV[start : start + len(response)].log_softmax(-1)
    return table.gather(1, torch.tensor(response, device=subject.device).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def _against_own_logits(subject: Subject, padding: int) -> float:
    batch, worst = subject.batch, 0.0
    with subject.accelerator.autocast():
        rows = by_row(batch, subject.trainer.networks.policy(batch, 1.0).logprobs)
        pairs = zip(subject.rollout.prompts, subject.rollout.responses, strict=True)
        for row, (prompt, response) in zip(rows, pairs, strict=True):
            own = _own_logprobs(subject, prompt, response, padding)
            worst = larger(worst, (row - own).abs().mean().item())
    return worst


def own_logits(subject: Subject) -> float:
    return _against_own_logits(subject, padding=0)


def left_padding(subject: Subject) -> float:
    return _against_own_logits(subject, padding=7)


# Rollout


@torch.no_grad()
def rollout_gap(subject: Subject) -> float:
    """Log-probabilities when sampled, from the cache, against the trainer's; no step has been taken."""
    batch, worst = subject.batch, 0.0
    with subject.accelerator.autocast():
        rows = by_row(batch, subject.trainer.networks.policy(batch, 1.0).logprobs)
    for row, sampled in zip(rows, subject.rollout.sampled_logprobs, strict=True):
        gap = row - torch.tensor(sampled, device=row.device, dtype=row.dtype)
        worst = larger(worst, gap.abs().mean().item())
    return worst


def stops_at_end(subject: Subject) -> float:
    """Responses that go on after the end token. A token that the model did sample is taken for it, since a
    model may not end any response within a few tokens.
    """
    response = max(subject.rollout.responses, key=len)
    prompts, wrong = subject.prompts, 0
    uniforms = episode_uniforms(subject.config.seed, 0, len(prompts), NEW_TOKENS)
    ends = {subject.eos_id, response[len(response) // 2]}
    for end in ends:
        sampler = HfSampler(end, subject.pad_id, subject.config.temperature)
        with subject.accelerator.autocast(), subject.trainer.networks.sampling() as policy:
            drawn = sampler(policy, prompts, uniforms).responses
        wrong += sum(end in row[:-1] or (row[-1] != end and len(row) < NEW_TOKENS) for row in drawn)
    return float(wrong)
