"""The clipped updates of policy and value network on one rollout.

Policy and value network are updated in passes of their own (unless the value head sits on the policy's
trunk). They share no trained parameter, so the result is that of one pass, and only one of them holds
activations and gradients at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.ppo.advantages import summed_by
from train.ppo.batches import MicroBatch
from train.ppo.config import PpoStageConfig
from train.ppo.experience import Experience, loss_weights, require_finite
from train.ppo.losses import KL_ESTIMATORS, importance_weights, kl_k2, policy_loss, value_loss
from train.ppo.networks import Networks, PolicyTokens

PARTS = ("policy", "value")
SYNC_ELEMENTS = 2**24
"""Gradient entries that processes sum at a time."""


class PpoUpdate:
    """Optimizers of policy and value network and the steps they take."""

    def __init__(self, config: PpoStageConfig, accelerator: Accelerator, networks: Networks) -> None:
        self.config, self.accelerator, self.networks = config, accelerator, networks
        self.reduce = summed_by(accelerator)
        self.trained = networks.trained()
        value_rate = config.value_learning_rate
        self.peak = {
            "policy": config.learning_rate,
            "value": config.learning_rate if value_rate is None else value_rate,
        }
        self.optimizers = {
            part: torch.optim.AdamW(
                list(self.trained[part].values()),
                lr=self.peak[part],
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
                fused=True,
            )
            for part in PARTS
        }
        self.passes: list[tuple[str, ...]] = (
            [PARTS] if networks.value_shares_trunk else [("policy",), ("value",)]
        )

    def state_dict(self) -> dict[str, Any]:
        return {part: optimizer.state_dict() for part, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[part])

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """Scale the peak rates; returns them as metrics."""
        rates = {part: self.peak[part] * factor for part in PARTS}
        for part, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[part]
        return {"learning_rate": rates["policy"], "value_learning_rate": rates["value"]}

    def run(self, experience: Experience, step: int, kl_coef: float) -> dict[str, float]:
        """num_ppo_epochs passes in a seeded order of mini-batches; averages over all optimizer steps.

        Stops early where the KL from the policy that wrote the rollout exceeds `target_kl`. Of
        ratio_deviation = max |ratio - 1| the metrics hold that of the first step, which is 0, and the largest
        one. `passes` is the number of passes taken (a fraction when it stopped inside one).
        """
        config = self.config
        weights_BR = loss_weights(experience, config, self.reduce)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows: list[dict[str, float]] = []
        count = len(experience.mini_batches)
        stopped = False
        for _ in range(config.num_ppo_epochs):
            for index in torch.randperm(count, generator=generator).tolist():
                row, stopped = self._step(
                    experience, experience.mini_batches[index], weights_BR, step, kl_coef
                )
                rows.append(row)
                if stopped:
                    break
            if stopped:
                break
        averages = {}
        for name in rows[0]:
            values = [row[name] for row in rows if name in row]
            averages[name] = sum(values) / len(values)
        averages["ratio_deviation_first"] = rows[0]["ratio_deviation"]
        averages["ratio_deviation"] = max(row["ratio_deviation"] for row in rows)
        averages["passes"] = (len(rows) - stopped) / count
        return averages

    def _step(
        self,
        experience: Experience,
        micro_batches: list[MicroBatch],
        weights_BR: Tensor,
        step: int,
        kl_coef: float,
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step of each part on one mini-batch; metrics, and whether target_kl forbade it."""
        metrics: dict[str, float] = {}
        weight = torch.stack([micro.take(weights_BR).sum() for micro in micro_batches]).sum()
        empty = self.reduce(weight).item() == 0
        for parts in self.passes:
            metrics |= self._accumulate(parts, experience, micro_batches, weights_BR, step, kl_coef)
            limit = self.config.target_kl
            if limit is not None and "policy" in parts and metrics["approxkl"] > limit:
                for optimizer in self.optimizers.values():
                    optimizer.zero_grad()
                return metrics, True
            for part in parts:
                parameters = list(self.trained[part].values())
                self._sum_gradients(parameters)
                norm = _clip(parameters, self.config.max_grad_norm)
                require_finite(norm, f"grad_norm_{part}", step, self.reduce)
                metrics[f"grad_norm_{part}"] = norm.item()
            for part in parts:
                # Where every token is masked there is no gradient, and momentum alone must not move anything.
                if not empty:
                    self.optimizers[part].step()
                self.optimizers[part].zero_grad()
        return metrics, False

    def _accumulate(
        self,
        parts: tuple[str, ...],
        experience: Experience,
        micro_batches: list[MicroBatch],
        weights_BR: Tensor,
        step: int,
        kl_coef: float,
    ) -> dict[str, float]:
        """Gradients of the mini-batch's losses, and the weighted means of their per-token terms."""
        sums: dict[str, Tensor] = {}
        deviation = torch.zeros((), device=self.accelerator.device)
        losses: list[Tensor] = []
        for micro in micro_batches:
            weights_N = micro.take(weights_BR)
            terms: dict[str, Tensor] = {}
            losses_N = torch.zeros_like(weights_N)
            tokens, values = self._forward(micro, parts)
            if tokens is not None:
                policy_terms, policy_losses = self._policy_terms(experience, micro, tokens, kl_coef)
                terms |= policy_terms
                losses_N = losses_N + policy_losses
                deviation = torch.maximum(deviation, (terms["ratio"] - 1).abs().max())
            if values is not None:
                terms |= self._value_terms(experience, micro, values)
                losses_N = losses_N + self.config.vf_coef * terms["loss_value"]
            loss = (losses_N * weights_N).sum()
            losses.append(loss.detach())
            loss.backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + (term.detach() * weights_N).sum()
        require_finite(torch.stack(losses), "the loss", step, self.reduce)
        means = self.reduce(torch.stack(list(sums.values())))
        metrics = dict(zip(sums, means.tolist(), strict=True))
        if "policy" in parts:
            metrics["ratio_deviation"] = self.accelerator.gather(deviation).max().item()
        return metrics

    def _forward(
        self, micro: MicroBatch, parts: tuple[str, ...]
    ) -> tuple[PolicyTokens | None, Tensor | None]:
        networks, config = self.networks, self.config
        with self.accelerator.autocast():
            if len(parts) == 2:
                return networks.policy_and_value(
                    micro.tokens, config.temperature, entropy=config.entropy_coef > 0
                )
            if "value" in parts:
                return None, networks.value(micro.tokens)
            return networks.policy(micro.tokens, config.temperature, entropy=config.entropy_coef > 0), None

    def _policy_terms(
        self, experience: Experience, micro: MicroBatch, tokens: PolicyTokens, kl_coef: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Per response token: the terms to log, and the loss to take the gradient of."""
        config, logprobs = self.config, tokens.logprobs
        old = micro.take(experience.logprobs_BR)
        policy = policy_loss(
            logprobs, old, micro.take(experience.advantages_BR), config.cliprange, config.dual_clip
        )
        total = policy.loss
        if config.truncated_importance_sampling is not None:
            sampled = micro.take(experience.sampled_logprobs_BR)
            total = total * importance_weights(old, sampled, config.truncated_importance_sampling)
        terms = {
            "loss_policy": total,
            "approxkl": kl_k2(logprobs, old),
            "clipfrac": policy.clipped,
            "ratio": policy.ratio,
        }
        if config.kl_in == "loss":
            kl = KL_ESTIMATORS[config.kl_estimator](logprobs, micro.take(experience.reference_logprobs_BR))
            terms["loss_kl"] = kl
            total = total + kl_coef * kl
        if config.entropy_coef > 0:
            total = total - config.entropy_coef * tokens.entropy
        return terms, total

    def _value_terms(self, experience: Experience, micro: MicroBatch, values_N: Tensor) -> dict[str, Tensor]:
        value = value_loss(
            values_N,
            micro.take(experience.values_BR),
            micro.take(experience.returns_BR),
            self.config.cliprange_value,
        )
        return {"loss_value": value.loss, "vf_clipfrac": value.clipped}

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum over the processes: each loss is already divided by the global number of tokens."""
        if self.accelerator.num_processes == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat(
                [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket]
            )
            flat = self.reduce(flat)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter).clone()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if buckets[-1] and size + parameter.numel() > SYNC_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


def _clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Clip the norm of the gradients in place; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
