"""The PPO loop: roll out, score, estimate advantages, take K passes of clipped updates.

One `run_update` is one rollout and the optimizer steps on it. Every mean is a sum over the response tokens
(or responses) of the global batch divided by their number, so the number of processes and the split into
micro-batches change nothing but rounding. All randomness is a function of the seed and the episode number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.errors import UserError
from train.ppo.advantages import gae, whiten
from train.ppo.config import PpoStageConfig
from train.ppo.experience import (
    Experience,
    MicroBatch,
    Rollout,
    Sample,
    batch_share,
    describe,
    first_samples,
    require_finite,
    split_rollout,
)
from train.ppo.losses import kl_k1, kl_k2, policy_loss, value_loss
from train.ppo.models import PolicyAndValue, response_logprobs
from train.ppo.rewards import KlCoefficient, RewardFunction, shape_scores, token_rewards
from train.ppo.rollout import Sampler, episode_prompts, episode_uniforms, truncate_at_eos


def learning_rate_factor(kind: str, update: int, warmup: int, total: int) -> float:
    """Factor on the peak learning rate in rollout `update` (from 0) of `total`."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(total - warmup, 1)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class PpoTrainer:
    """Trains `model` against `reward`, held near `reference`.

    prompts: token ids, none empty. Raises UserError when batch_size does not divide among the processes.
    """

    def __init__(
        self,
        config: PpoStageConfig,
        accelerator: Accelerator,
        model: PolicyAndValue,
        reference: nn.Module,
        reward: RewardFunction,
        sampler: Sampler,
        prompts: list[list[int]],
        *,
        eos_id: int,
        pad_id: int,
    ) -> None:
        share = accelerator.num_processes * config.num_mini_batches
        if config.batch_size % share:
            raise UserError(
                f"batch_size {config.batch_size} is not divisible by {accelerator.num_processes} processes x "
                f"num_mini_batches {config.num_mini_batches}; use a multiple of {share}"
            )
        self.config, self.accelerator, self.reward, self.sampler = config, accelerator, reward, sampler
        self.prompts, self.eos_id, self.pad_id = prompts, eos_id, pad_id
        self.reference = reference.to(accelerator.device).eval()
        self.networks = model
        value_rate = (
            config.learning_rate if config.value_learning_rate is None else config.value_learning_rate
        )
        optimizer = torch.optim.AdamW(
            [
                {"params": _trained(model.policy), "lr": config.learning_rate},
                {"params": _trained(model.value), "lr": value_rate},
            ],
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda update: learning_rate_factor(
                config.lr_scheduler_type, update, config.warmup_steps, config.num_updates
            ),
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.kl_coefficient = KlCoefficient(config.kl_coef, config.kl_controller)
        self.step = 0
        self.samples: list[Sample] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights; the data cursor is step * batch_size."""
        return {
            "step": self.step,
            "kl_coef": self.kl_coefficient.value,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of a trainer with the same config."""
        self.step = state["step"]
        self.kl_coefficient.value = state["kl_coef"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def run_update(self) -> dict[str, float]:
        """One rollout and the optimizer steps on it; returns the metrics row. `samples` holds a few
        responses.

        Raises PosttrainError when a log-probability, score, value, loss or gradient is not finite.
        """
        seconds: dict[str, float] = {}
        kl_coef = self.kl_coefficient.value
        rates = [float(rate) for rate in self.scheduler.get_last_lr()]
        with _timed(seconds, "generate"):
            rollout = self.generate()
        with _timed(seconds, "score"):
            experience, mini_batches = self.collect(rollout)
        with _timed(seconds, "update"):
            update_metrics = self.optimise(experience, mini_batches)
        metrics = describe(experience, kl_coef, self._reduce) | update_metrics
        self.samples = first_samples(experience)
        self.kl_coefficient.update(metrics["kl"], self.config.batch_size)
        self.scheduler.step()
        self.step += 1
        total = sum(seconds.values())
        return metrics | {
            "episodes": self.step * self.config.batch_size,
            "kl_coef": kl_coef,
            "learning_rate": rates[0],
            "value_learning_rate": rates[1],
            "tokens_per_second": metrics["response_length"] * self.config.batch_size / total,
            "seconds": total,
            **{f"seconds_{name}": value for name, value in seconds.items()},
        }

    def generate(self) -> Rollout:
        """Sample this process's responses to the next batch of prompts and cut them at the end token."""
        config, start = self.config, self.step * self.config.batch_size
        offsets = batch_share(
            config.batch_size,
            config.num_mini_batches,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        indices = episode_prompts(len(self.prompts), config.seed, start, config.batch_size)
        uniforms = episode_uniforms(config.seed, start, config.batch_size, config.max_new_tokens)
        prompts = [self.prompts[indices[offset]] for offset in offsets]
        with self.accelerator.autocast():
            drawn = self.sampler(self.networks.policy, prompts, uniforms[offsets])
        cut = [truncate_at_eos(response, self.eos_id) for response in drawn.responses]
        responses = [response for response, _ in cut]
        logprobs = [row[: len(response)] for row, response in zip(drawn.logprobs, responses, strict=True)]
        return Rollout(prompts, responses, [finished for _, finished in cut], logprobs)

    @torch.no_grad()
    def collect(self, rollout: Rollout) -> tuple[Experience, list[list[MicroBatch]]]:
        """Log-probabilities, values and scores of the responses, then rewards and advantages."""
        config, device, step = self.config, self.accelerator.device, self.step + 1
        mini_batches = split_rollout(
            rollout, config.num_mini_batches, config.micro_batch_size, self.pad_id, device
        )
        lengths = torch.tensor([len(response) for response in rollout.responses], device=device)
        mask_BR = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
        logprobs_BR, reference_BR, entropy_BR, values_BR = (
            torch.zeros(mask_BR.shape, device=device) for _ in range(4)
        )
        scores_B = torch.zeros(len(lengths), device=device)
        for micro in (micro for mini in mini_batches for micro in mini):
            tokens, inside = micro.tokens, micro.tokens.response_mask_BR
            outputs = self.model(tokens, config.temperature, with_entropy=True)
            with self.accelerator.autocast():
                reference, _ = response_logprobs(self.reference, tokens, config.temperature)
                scores_B[micro.rows] = self.reward(tokens.input_ids_BT, tokens.attention_mask_BT).float()
            for whole, part in (
                (logprobs_BR, outputs.logprobs),
                (reference_BR, reference),
                (entropy_BR, outputs.entropy),
                (values_BR, outputs.values),
            ):
                whole[micro.rows, : inside.shape[1]] = torch.where(inside, part, torch.zeros_like(part))
        for tensor, name in (
            (logprobs_BR, "the policy's log-probabilities"),
            (reference_BR, "the reference's log-probabilities"),
            (values_BR, "the values"),
            (scores_B, "the reward scores"),
        ):
            require_finite(tensor, name, step)
        finished_B = torch.tensor(rollout.finished, device=device)
        shaped_B = shape_scores(scores_B, finished_B, config.missing_eos, config.reward_clip)
        rewards_BR = token_rewards(
            shaped_B, kl_k1(logprobs_BR, reference_BR), mask_BR, self.kl_coefficient.value
        )
        if config.whiten_rewards:
            rewards_BR = whiten(rewards_BR, mask_BR, shift_mean=False, reduce=self._reduce)
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, config.gamma, config.lam)
        experience = Experience(
            rollout=rollout,
            mask_BR=mask_BR,
            scores_B=scores_B,
            shaped_B=shaped_B,
            logprobs_BR=logprobs_BR,
            reference_logprobs_BR=reference_BR,
            entropy_BR=entropy_BR,
            values_BR=values_BR,
            advantages_BR=whiten(advantages_BR, mask_BR, reduce=self._reduce),
            returns_BR=returns_BR,
        )
        return experience, mini_batches

    def optimise(self, experience: Experience, mini_batches: list[list[MicroBatch]]) -> dict[str, float]:
        """num_ppo_epochs passes in a seeded order of mini-batches; averages over all optimizer steps.

        Of ratio_deviation = max |ratio - 1| it returns that of the first step, which is 0, and the largest.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        rows: list[dict[str, float]] = []
        for _ in range(self.config.num_ppo_epochs):
            for index in torch.randperm(len(mini_batches), generator=generator).tolist():
                rows.append(self.optimizer_step(experience, mini_batches[index]))
        averages = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        averages["ratio_deviation_first"] = rows[0]["ratio_deviation"]
        averages["ratio_deviation"] = max(row["ratio_deviation"] for row in rows)
        return averages

    def optimizer_step(self, experience: Experience, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One step on one mini-batch, gradients accumulated over its micro-batches; token means over all
        processes.
        """
        step = self.step + 1
        count = self._reduce(
            torch.stack([micro.tokens.response_mask_BR.sum() for micro in micro_batches]).sum()
        )
        sums: dict[str, Tensor] = {}
        deviation = torch.zeros((), device=self.accelerator.device)
        for micro in micro_batches:
            synchronised = micro is micro_batches[-1]
            with nullcontext() if synchronised else self.accelerator.no_sync(self.model):
                per_token = self._losses(experience, micro)
                loss = per_token["loss_policy"].sum() + self.config.vf_coef * per_token["loss_value"].sum()
                require_finite(loss, "the loss", step)
                # DDP averages gradients over the processes; wanted is their sum, over the global number of
                # tokens.
                self.accelerator.backward(loss * (self.accelerator.num_processes / count))
            for name, values in per_token.items():
                sums[name] = sums.get(name, 0) + values.detach().sum(dtype=torch.float32)
            deviation = torch.maximum(deviation, (per_token["ratio"] - 1).abs().max())
        norms = {
            "grad_norm_policy": self._clip_gradients(self.networks.policy),
            "grad_norm_value": self._clip_gradients(self.networks.value),
        }
        for name, norm in norms.items():
            require_finite(norm, name, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        means = self._reduce(torch.stack(list(sums.values()))) / count
        return (
            dict(zip(sums, means.tolist(), strict=True))
            | {name: norm.item() for name, norm in norms.items()}
            | {"ratio_deviation": self.accelerator.gather(deviation).max().item()}
        )

    def _losses(self, experience: Experience, micro: MicroBatch) -> dict[str, Tensor]:
        """Losses and statistics at the response tokens of a micro-batch, as flat vectors without padding."""
        mask = micro.tokens.response_mask_BR
        old_logprobs, old_values, advantages, returns = (
            whole[micro.rows, : mask.shape[1]][mask]
            for whole in (
                experience.logprobs_BR,
                experience.values_BR,
                experience.advantages_BR,
                experience.returns_BR,
            )
        )
        outputs = self.model(micro.tokens, self.config.temperature)
        logprobs = outputs.logprobs[mask]
        policy = policy_loss(logprobs, old_logprobs, advantages, self.config.cliprange)
        value = value_loss(outputs.values[mask], old_values, returns, self.config.cliprange_value)
        return {
            "loss_policy": policy.loss,
            "loss_value": value.loss,
            "approxkl": kl_k2(logprobs, old_logprobs),
            "clipfrac": policy.clipped,
            "vf_clipfrac": value.clipped,
            "ratio": policy.ratio,
        }

    def _clip_gradients(self, module: nn.Module) -> Tensor:
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(_trained(module), limit)
        assert norm is not None
        return norm

    def _reduce(self, total: Tensor) -> Tensor:
        return self.accelerator.reduce(total, "sum")


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
