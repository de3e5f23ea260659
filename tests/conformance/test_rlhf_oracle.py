"""A whole PPO update against an oracle that works it out from the definitions, token by token.

The trainer's networks run in float64, so that what is left between the two is rounding. Measured over all
cases: 7e-15 on what is known per token, 3e-11 on gradients and on the weights after the last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import PLACES, Oracle, Step
from ppo_tiny import BIAS, EOS, LAYOUTS, PAD, experience_of, ppo_config, ppo_trainer
from torch import Tensor
from transformers.models.llama import modeling_llama

from train.ppo.batches import TokenBatch
from train.ppo.engines.base import Samples
from train.ppo.engines.hf import HfSampler
from train.ppo.experience import Experience
from train.ppo.trainer import PpoTrainer

BOUND = 1e-8
COMMON = {"learning_rate": 0.02, "num_ppo_epochs": 3, "kl_coef": 0.3}
EVERYTHING: dict[str, Any] = {
    **COMMON,
    "num_mini_batches": 2,
    "dual_clip": 1.5,
    "entropy_coef": 0.02,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "loss_aggregation": "sequence",
    "truncated": "mask_last",
    "truncated_importance_sampling": 1.1,
    "whiten_rewards": True,
    "temperature": 0.8,
    "gamma": 0.97,
    "lam": 0.9,
    "max_grad_norm": 0.4,
    "weight_decay": 0.1,
    "value_learning_rate": 0.01,
    "vf_coef": 0.5,
    "missing_eos": {"mode": "penalty", "value": -0.7},
    "reward_clip": 0.5,
}
OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "paper": ({}, {"clip", "missing_eos"}),
    "dual_clip": ({"dual_clip": 1.3}, {"dual_clip"}),
    "entropy": ({"entropy_coef": 0.05}, set()),
    "kl_k2_in_loss": ({"kl_in": "loss", "kl_estimator": "k2"}, set()),
    "kl_k3_in_loss": ({"kl_in": "loss", "kl_estimator": "k3"}, set()),
    "kl_k3_in_reward": ({"kl_estimator": "k3"}, set()),
    "per_sequence": ({"loss_aggregation": "sequence"}, set()),
    "mask": ({"truncated": "mask"}, {"truncated"}),
    "mask_last": ({"truncated": "mask_last"}, {"truncated"}),
    "mask_per_sequence": ({"truncated": "mask", "loss_aggregation": "sequence"}, {"truncated"}),
    "importance": ({"truncated_importance_sampling": 1.05}, {"truncated_importance_sampling"}),
    "whitened_rewards": ({"whiten_rewards": True}, set()),
    "mini_batches": ({"num_mini_batches": 4}, set()),
    "one_row_at_a_time": ({"micro_batch_size": 1}, set()),
    "norm_clipping": ({"max_grad_norm": 0.1}, {"max_grad_norm"}),
    "stopped_early": ({"target_kl": 0.02, "learning_rate": 0.01, "num_ppo_epochs": 6}, {"target_kl"}),
    "value_clip": ({"cliprange_value": 0.02}, {"value_clip"}),
}


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers computes RMSNorm in float32 whatever it is given; here both sides stay in float64."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return (
            self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    return


class DistantEngine(HfSampler):
    """An engine whose probabilities differ from the trainer's, up and down by some percent."""

    def __call__(self, policy: Any, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        samples = super().__call__(policy, prompts, uniforms_BN)
        logprobs = [[p + 0.1 * (-1) ** i for i, p in enumerate(row)] for row in samples.logprobs]
        return Samples(samples.responses, logprobs)


@dataclass
class Case:
    """A trainer's update, recorded, and the oracle's of the same rollout."""

    trainer: PpoTrainer
    experience: Experience
    oracle: Oracle
    steps: list[Step]
    expected: list[Step]


def double_trainer(settings: dict[str, Any]) -> PpoTrainer:
    """A trainer in float64 whose policy and value network have moved away from where they began."""
    config = ppo_config(**settings)
    trainer = ppo_trainer(config, engine=DistantEngine(EOS, PAD, config.temperature))
    networks = trainer.networks.double()
    generator = torch.Generator().manual_seed(7)
    for parameters in networks.trained().values():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += noise * (0.1 if "lora_B" in name else 0.02)
    return trainer


def record(trainer: PpoTrainer, experience: Experience) -> tuple[list[Step], list[list[int]]]:
    """The trainer's own steps: metrics, gradients just before the optimizers use them, rows."""
    updater, steps, rows = trainer.updater, [], []
    gradients: dict[str, Tensor] = {}
    for part, optimizer in updater.optimizers.items():

        def keep(*_: Any, names: dict[str, Any] = updater.trained[part]) -> None:
            gradients.update({name: p.grad.clone() for name, p in names.items() if p.grad is not None})

        optimizer.register_step_pre_hook(keep)
    inner = updater._step

    def step(experience: Experience, micro_batches: Any, *rest: Any) -> tuple[dict[str, float], bool]:
        gradients.clear()
        metrics, stopped = inner(experience, micro_batches, *rest)
        rows.append([int(row) for micro in micro_batches for row in micro.rows])
        if not stopped:
            steps.append(Step(metrics, dict(gradients)))
        return metrics, stopped

    updater._step = step  # type: ignore[method-assign]
    updater.run(experience, trainer.step, trainer.kl_coefficient.value)
    return steps, rows


def case(layout: str, settings: dict[str, Any], fused: bool = True) -> Case:
    trainer = double_trainer({**COMMON, **settings, **LAYOUTS[layout]})
    trainer.networks.fused = fused
    networks = trainer.networks
    weights = {name: p.detach().clone() for name, p in networks.named_parameters()}
    experience = experience_of(trainer)
    oracle = Oracle(
        trainer.config,
        PLACES[layout],
        weights,
        {part: list(parameters) for part, parameters in networks.trained().items()},
        {"value": 0.0 if layout == "head" else BIAS_64, "reward": BIAS_64},
        experience.rollout.prompts,
        experience.rollout.responses,
        experience.rollout.sampled_logprobs,
        trainer.kl_coefficient.value,
    )
    steps, rows = record(trainer, experience)
    return Case(trainer, experience, oracle, steps, oracle.update(rows))


BIAS_64 = torch.tensor(BIAS).item()
"""The calibration bias as the networks hold it: rounded to float32."""


def padded(rows: list[list[float]], like: Tensor) -> Tensor:
    whole = torch.zeros_like(like)
    for row, values in enumerate(rows):
        whole[row, : len(values)] = torch.tensor(values, dtype=like.dtype)
    return whole


def check_experience(found: Case) -> float:
    """Every per-token number of the rollout; returns the largest deviation."""
    experience, oracle = found.experience, found.oracle
    assert experience.mask_BR.sum(-1).tolist() == [len(response) for response in oracle.responses]
    pairs = {
        "log-probabilities": (experience.logprobs_BR, oracle.old),
        "reference": (experience.reference_logprobs_BR, oracle.reference),
        "entropy": (experience.entropy_BR, oracle.old_entropy),
        "values": (experience.values_BR, oracle.old_values),
        "advantages": (experience.advantages_BR, oracle.advantages),
        "returns": (experience.returns_BR, oracle.returns),
    }
    worst = 0.0
    for name, (tensor, expected) in pairs.items():
        assert tensor.dtype == torch.float64, name
        deviation = (tensor - padded(expected, tensor)).abs().max().item()
        assert deviation < BOUND, (name, deviation)
        worst = max(worst, deviation)
    assert experience.scores_B.tolist() == pytest.approx(oracle.scores, rel=1e-6)
    assert experience.shaped_B.tolist() == pytest.approx(oracle.shaped, rel=1e-6)
    return worst


def check_update(found: Case) -> float:
    """Losses and gradients of every step and the weights at the end; returns the largest deviation."""
    assert len(found.steps) == len(found.expected)
    worst = 0.0
    for step, expected in zip(found.steps, found.expected, strict=True):
        for name, value in expected.metrics.items():
            assert step.metrics[name] == pytest.approx(value, abs=BOUND, rel=BOUND), name
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            deviation = (step.gradients[name] - gradient).abs().max().item()
            assert deviation < BOUND, (name, deviation)
            worst = max(worst, deviation)
    for parameters in found.trainer.updater.trained.values():
        for name, parameter in parameters.items():
            deviation = (parameter - found.oracle.weights[name]).abs().max().item()
            assert deviation < BOUND, (name, deviation)
            worst = max(worst, deviation)
    return worst


@pytest.mark.parametrize("option", OPTIONS)
def test_update_equals_the_oracle(option: str) -> None:
    settings, branches = OPTIONS[option]
    found = case("full", settings)
    check_experience(found)
    check_update(found)
    assert branches <= found.oracle.taken.keys(), "the case does not reach what it is there for"
    kl = found.experience.logprobs_BR - found.experience.reference_logprobs_BR
    assert kl.abs().max() > 0.05, "a policy that is its reference would test no KL"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["paper", "everything"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_the_oracle(name: str, settings: dict[str, Any], fused: bool) -> None:
    found = case(name, settings, fused)
    check_experience(found)
    check_update(found)
    assert len(found.steps) == (6 if settings else 3)
    if settings:
        assert {"truncated_importance_sampling", "truncated", "missing_eos", "max_grad_norm"} <= (
            found.oracle.taken.keys()
        )


def test_in_float32_the_rollout_stays_within_float32(layout: dict[str, Any]) -> None:
    """The same networks in float32, which is what runs are made in: the numbers agree to its rounding."""
    wide = double_trainer({**COMMON, **layout})
    rollout = experience_of(wide).rollout
    narrow = ppo_trainer(wide.config)
    narrow.networks.load_state_dict(wide.networks.state_dict())
    batch = TokenBatch.build(rollout.prompts, rollout.responses, PAD, "cpu")
    with torch.no_grad():
        for function in ("policy", "reference"):
            low, high = (getattr(each.networks, function)(batch, 1.0) for each in (narrow, wide))
            low, high = (part if isinstance(part, Tensor) else part.logprobs for part in (low, high))
            assert (low.double() - high).abs().max() < 2e-5
        assert (narrow.networks.value(batch).double() - wide.networks.value(batch)).abs().max() < 2e-5
