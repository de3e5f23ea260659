"""The PPO loop: roll out, score, estimate advantages, take K passes of clipped updates.

One `run_update` is one rollout and the optimizer steps on it. Every mean is a sum over the response tokens
(or responses) of the global batch divided by their number, so the number of processes and the split into
micro-batches change nothing but rounding. All randomness is a function of the seed and the episode number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train.ppo.advantages import gae, summed_by, whiten
from train.ppo.config import PpoStageConfig
from train.ppo.engines.base import RolloutEngine
from train.ppo.experience import (
    Experience,
    Rollout,
    Sample,
    batch_share,
    describe,
    first_samples,
    loss_mask,
    require_finite,
    split_rollout,
)
from train.ppo.logprobs import wide
from train.ppo.losses import KL_ESTIMATORS
from train.ppo.networks import Networks
from train.ppo.reward_mix import Rewards
from train.ppo.reward_sources import RewardBatch
from train.ppo.rewards import KlCoefficient, shape_scores, token_rewards
from train.ppo.rollout import episode_prompts, episode_uniforms, truncate_at_eos
from train.ppo.timing import Stopwatch, UpdateFlops
from train.ppo.update import PpoUpdate


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
    """Trains the policy of `networks` against `rewards`, held near its reference.

    prompts: token ids, none empty. Raises UserError when batch_size does not divide among the processes.
    """

    def __init__(
        self,
        config: PpoStageConfig,
        accelerator: Accelerator,
        networks: Networks,
        rewards: Rewards,
        engine: RolloutEngine,
        prompts: list[list[int]],
        *,
        eos_id: int,
        pad_id: int,
    ) -> None:
        config.check_processes(accelerator.num_processes)
        self.config, self.accelerator, self.rewards, self.engine = config, accelerator, rewards, engine
        self.prompts, self.eos_id, self.pad_id = prompts, eos_id, pad_id
        self.networks = networks.to(accelerator.device)
        self.updater = PpoUpdate(config, accelerator, networks)
        self.reduce = summed_by(accelerator)
        self.kl_coefficient = KlCoefficient(config.kl_coef, config.kl_controller)
        self.flops = UpdateFlops(networks, torch.bfloat16 if config.bf16 else torch.float32)
        self.step = 0
        self.samples: list[Sample] = []
        self._last: dict[str, Any] = {}
        self.engine.sync(self.networks.policy_model)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights; the data cursor is step * batch_size."""
        return {
            "step": self.step,
            "kl_coef": self.kl_coefficient.value,
            "updater": self.updater.state_dict(),
            "rewards": self.rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of a trainer with the same config, the weights being in place."""
        self.step = state["step"]
        self.kl_coefficient.value = state["kl_coef"]
        self.updater.load_state_dict(state["updater"])
        self.rewards.load_state_dict(state["rewards"])
        self.engine.sync(self.networks.policy_model)

    def run_update(self) -> dict[str, float]:
        """One rollout and the optimizer steps on it; returns the metrics row. `samples` holds a few
        responses.

        Raises NotFiniteError when a log-probability, score, value, loss or gradient is not finite.
        """
        clock = Stopwatch(self.accelerator.device)
        kl_coef, rates = self.kl_coefficient.value, self._schedule()
        with clock.phase("rollout"):
            rollout = self.generate()
        experience = self.collect(rollout, clock)
        with clock.phase("update"):
            update_metrics = self.updater.run(experience, self.step, kl_coef)
        with clock.phase("sync"):
            self.engine.sync(self.networks.policy_model)
        metrics = describe(experience, kl_coef, self.reduce, self.accelerator.gather) | update_metrics
        self.samples = first_samples(experience)
        self.kl_coefficient.update(metrics["kl"], self.config.batch_size)
        self.step += 1
        total = sum(clock.seconds.values())
        tokens = metrics["response_length"] * self.config.batch_size
        return metrics | {
            "episodes": self.step * self.config.batch_size,
            "kl_coef": kl_coef,
            **rates,
            "mfu": self.flops.utilisation(experience, metrics["passes"], clock.seconds["update"]),
            "tokens_per_second": tokens / total,
            "seconds": total,
            **{f"seconds_{name}": value for name, value in clock.seconds.items()},
        }

    def last_rollout(self) -> dict[str, Any]:
        """Token ids and, as far as it got, scores of this process's last rollout: to look into a failure."""
        return dict(self._last)

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
        return self.respond([indices[offset] for offset in offsets], self.prompts, uniforms[offsets])

    def respond(self, indices: list[int], prompts: list[list[int]], uniforms_BN: Tensor) -> Rollout:
        """The policy's responses to the prompts of these indices, cut at the end token."""
        asked = [prompts[index] for index in indices]
        with self.accelerator.autocast(), self.networks.sampling() as policy:
            drawn = self.engine(policy, asked, uniforms_BN)
        cut = [truncate_at_eos(response, self.eos_id) for response in drawn.responses]
        responses = [response for response, _ in cut]
        logprobs = [row[: len(response)] for row, response in zip(drawn.logprobs, responses, strict=True)]
        rollout = Rollout(asked, responses, [finished for _, finished in cut], logprobs, indices)
        self._last = {"prompts": asked, "responses": responses, "finished": rollout.finished}
        return rollout

    def check_scores(self, scores_B: Tensor, name: str, step: int) -> None:
        """Note the scores of the last rollout. Raises NotFiniteError when one of them is not finite."""
        self._last["scores"] = scores_B.tolist()
        require_finite(scores_B, name, step, self.reduce)

    @torch.no_grad()
    def collect(self, rollout: Rollout, clock: Stopwatch) -> Experience:
        """Scores, log-probabilities and values of the responses, then rewards and advantages."""
        config, device, step = self.config, self.accelerator.device, self.step + 1
        with clock.phase("scoring"), self.accelerator.autocast():
            result = self.rewards(
                RewardBatch(rollout.prompts, rollout.responses, rollout.finished, rollout.indices)
            )
        scores_B = result.total_B.to(device)
        self.check_scores(scores_B, "the reward scores", step)
        mini_batches = split_rollout(rollout, config, self.pad_id, device, packed=self.networks.packed)
        lengths = torch.tensor([len(response) for response in rollout.responses], device=device)
        mask_BR = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
        logprobs_BR, reference_BR, entropy_BR, values_BR = (
            torch.zeros(mask_BR.shape, device=device, dtype=wide(self.networks.value_head.bias.dtype))
            for _ in range(4)
        )
        for micro in (micro for mini in mini_batches for micro in mini):
            with clock.phase("reference"), self.accelerator.autocast():
                micro.put(reference_BR, self.networks.reference(micro.tokens, config.temperature))
            with clock.phase("scoring"), self.accelerator.autocast():
                tokens, values = self.networks.policy_and_value(
                    micro.tokens, config.temperature, entropy=True
                )
                micro.put(logprobs_BR, tokens.logprobs)
                micro.put(entropy_BR, tokens.entropy)
                micro.put(values_BR, values)
        for tensor, name in (
            (logprobs_BR, "the policy's log-probabilities"),
            (reference_BR, "the reference's log-probabilities"),
            (values_BR, "the values"),
        ):
            require_finite(tensor, name, step, self.reduce)
        finished_B = torch.tensor(rollout.finished, device=device)
        shaped_B = shape_scores(scores_B, finished_B, config.missing_eos, config.reward_clip)
        kl_BR = KL_ESTIMATORS[config.kl_estimator](logprobs_BR, reference_BR)
        kl_coef = self.kl_coefficient.value if config.kl_in == "reward" else 0.0
        rewards_BR = token_rewards(shaped_B, kl_BR, mask_BR, kl_coef)
        if config.whiten_rewards:
            rewards_BR = whiten(rewards_BR, mask_BR, shift_mean=False, reduce=self.reduce)
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, config.gamma, config.lam)
        trained_BR = loss_mask(mask_BR, finished_B, config.truncated)
        return Experience(
            rollout=rollout,
            mini_batches=mini_batches,
            mask_BR=mask_BR,
            loss_mask_BR=trained_BR,
            scores_B=scores_B,
            score_parts={name: part.to(device) for name, part in result.parts.items()},
            shaped_B=shaped_B,
            sampled_logprobs_BR=_padded(rollout.sampled_logprobs, mask_BR, logprobs_BR.dtype),
            logprobs_BR=logprobs_BR,
            reference_logprobs_BR=reference_BR,
            entropy_BR=entropy_BR,
            values_BR=values_BR,
            advantages_BR=whiten(advantages_BR, trained_BR, reduce=self.reduce),
            returns_BR=returns_BR,
        )

    def _schedule(self) -> dict[str, float]:
        config = self.config
        factor = learning_rate_factor(
            config.lr_scheduler_type, self.step, config.warmup_steps, config.num_updates
        )
        return self.updater.set_learning_rates(factor)


def _padded(rows: list[list[float]], mask_BR: Tensor, dtype: torch.dtype) -> Tensor:
    values_BR = torch.zeros(mask_BR.shape, dtype=dtype, device=mask_BR.device)
    values = [value for row in rows for value in row]
    values_BR[mask_BR] = torch.tensor(values, dtype=dtype, device=mask_BR.device)
    return values_BR
