"""How the policy does on prompts that it is not trained on, and which of its states is worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from train.ppo.batches import micro_batches
from train.ppo.checkpoint import read_weights, share_file, write_weights
from train.ppo.config import PpoStageConfig
from train.ppo.losses import kl_k1
from train.ppo.reward_mix import Rewards
from train.ppo.reward_sources import RewardBatch
from train.ppo.rewards import shape_scores
from train.ppo.rollout import episode_uniforms
from train.ppo.trainer import PpoTrainer

UNIFORMS_SEED = 2**31
"""Added to the run's seed: the random numbers of the evaluation are not those of any episode."""


class HeldOutEvaluation:
    """Samples responses to fixed prompts with fixed random numbers, so that two policies share their luck.

    Raises UserError when there are fewer prompts than processes.
    """

    def __init__(self, trainer: PpoTrainer, rewards: Rewards, prompts: list[list[int]]) -> None:
        processes = trainer.accelerator.num_processes
        if len(prompts) < processes:
            raise UserError(
                f"held_out has {len(prompts)} prompts for {processes} processes: raise "
                "held_out.num_prompts, or hold more prompts out when the data set is curated"
            )
        self.trainer, self.rewards = trainer, rewards
        # Equally many for every process.
        self.prompts = prompts[: len(prompts) // processes * processes]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Means over the prompts of all processes: held_out_score (after the treatment of missing end
        tokens), held_out_kl (k1, nats per response), held_out_eos_rate, held_out_length, held_out/<reward
        source>.
        """
        trainer, config = self.trainer, self.trainer.config
        accelerator = trainer.accelerator
        mine = list(range(accelerator.process_index, len(self.prompts), accelerator.num_processes))
        uniforms = episode_uniforms(config.seed + UNIFORMS_SEED, 0, len(self.prompts), config.max_new_tokens)
        rollout = trainer.respond(mine, self.prompts, uniforms[mine])
        batch = RewardBatch(rollout.prompts, rollout.responses, rollout.finished, rollout.indices)
        with accelerator.autocast():
            result = self.rewards(batch)
        finished_B = torch.tensor(rollout.finished, device=accelerator.device)
        scores_B = shape_scores(
            result.total_B.to(accelerator.device), finished_B, config.missing_eos, config.reward_clip
        )
        trainer.check_scores(scores_B, "the held-out scores", trainer.step)
        values = {
            "held_out_score": scores_B,
            "held_out_kl": self._kl(rollout.prompts, rollout.responses),
            "held_out_eos_rate": finished_B.float(),
            "held_out_length": torch.tensor([float(len(r)) for r in rollout.responses]),
            **{f"held_out/{name}": part for name, part in result.parts.items()},
        }
        sums = torch.stack([value.to(accelerator.device).float().sum() for value in values.values()])
        means = trainer.reduce(sums) / len(self.prompts)
        return dict(zip(values, means.tolist(), strict=True))

    def _kl(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """k1 summed over each response, [B]."""
        trainer, config = self.trainer, self.trainer.config
        networks, device = trainer.networks, trainer.accelerator.device
        kl_BR = torch.zeros(len(prompts), max(map(len, responses)), device=device)
        for micro in micro_batches(
            prompts,
            responses,
            range(len(prompts)),
            trainer.pad_id,
            device,
            config.micro_batch_tokens,
            packed=networks.packed,
        ):
            with trainer.accelerator.autocast():
                policy_N = networks.policy(micro.tokens, config.temperature).logprobs
                reference_N = networks.reference(micro.tokens, config.temperature)
            micro.put(kl_BR, kl_k1(policy_N, reference_N))
        return kl_BR.sum(-1)


@dataclass
class Best:
    """The state of the policy with the highest held-out score among those whose KL is under `max_kl`.

    file: where its weights are kept.
    """

    file: Path
    max_kl: float | None
    score: float | None = None
    step: int = 0

    @classmethod
    def of(cls, config: PpoStageConfig, checkpoints: Path) -> Best:
        """As `config.held_out` says, nothing seen yet."""
        limit = config.held_out.max_kl if config.held_out is not None else None
        return cls(checkpoints / "best.pt", config.kl_controller.target if limit is None else limit)

    def offer(self, step: int, metrics: dict[str, float]) -> bool:
        """Take a held-out evaluation into account; whether it is the best one so far."""
        if self.max_kl is not None and metrics["held_out_kl"] > self.max_kl:
            return False
        if self.score is not None and metrics["held_out_score"] <= self.score:
            return False
        self.score, self.step = metrics["held_out_score"], step
        return True

    def save(self, parameters: dict[str, nn.Parameter]) -> None:
        """Keep the weights of the policy."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_weights(self.file, parameters)

    @property
    def files(self) -> list[Path]:
        """What a checkpoint must take along: the weights, if any are kept."""
        return [self.file] if self.file.is_file() else []

    def recall(self, checkpoint: Path) -> None:
        """Go back to the weights that a checkpoint took along; those kept after it are of no state that is
        known any more.
        """
        kept = checkpoint / self.file.name
        if kept.is_file():
            share_file(kept, self.file)
        else:
            self.file.unlink(missing_ok=True)

    def restore(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put the kept weights back into the policy."""
        read_weights(self.file, parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step = state["score"], state["step"]
