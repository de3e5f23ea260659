"""Measures of `posttrain conformance` that take gradients or steps; see `conformance_checks` for the scale.

Those from `first_ratio` on change the weights.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from train.ppo.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from train.ppo.conformance import Subject
from train.ppo.conformance_checks import by_row, larger
from train.ppo.experience import Experience, split_rollout
from train.ppo.networks import POLICY_ADAPTER
from train.ppo.timing import Stopwatch

TIMINGS = ("seconds", "tokens_per_second", "mfu")


def adapters(subject: Subject) -> float:
    """Parameters whose trainable flag changes when another adapter is switched on, that get a gradient from a
    pass they have no part in, or, of the adapters, that get none from their own.
    """
    networks, batch = subject.trainer.networks, subject.batch
    flags = {name: p.requires_grad for name, p in networks.named_parameters()}
    trunks = [networks.policy_trunk, networks.value_trunk, networks.reference_trunk, networks.reward_trunk]
    wrong = 0
    for trunk in trunks:
        with trunk.active() if trunk is not None else ExitStack():
            wrong += sum(p.requires_grad != flags[name] for name, p in networks.named_parameters())
    passes: dict[str, Callable[[], Tensor]] = {
        "policy": lambda: networks.policy(batch, 1.0).logprobs.sum(),
        "value": lambda: networks.value(batch).sum(),
    }
    for part, forward in passes.items():
        with subject.accelerator.autocast():
            total = forward()
        total.backward()
        touched = {name for name, p in networks.named_parameters() if p.grad is not None}
        own = set(networks.trained()[part])
        wrong += len(touched - own) + len({name for name in own - touched if "lora_" in name})
        wrong += not touched
        networks.zero_grad()
    return float(wrong + sum(p.requires_grad != flags[name] for name, p in networks.named_parameters()))


def micro_batches(subject: Subject) -> float:
    """Gradients of the losses with one response per forward pass against all in one, as a share of their
    norm, and the same for the losses; the worse of policy and value network.
    """
    trainer = subject.trainer
    whole = trainer.collect(subject.rollout, Stopwatch(subject.device))
    alone = trainer.config.model_copy(update={"micro_batch_size": 1})
    split = split_rollout(subject.rollout, alone, subject.pad_id, subject.device)
    first, gradients = _gradients(subject, whole)
    second, others = _gradients(subject, dataclasses.replace(whole, mini_batches=split))
    worst = max(abs(first[name] - second[name]) for name in ("loss_policy", "loss_value"))
    for names in trainer.updater.trained.values():
        norm = _norm([gradients[name] for name in names])
        distance = _norm([gradients[name] - others[name] for name in names])
        worst = larger(worst, distance / norm if norm else math.inf)
    return worst


def _gradients(subject: Subject, experience: Experience) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one pass over the rollout at a learning rate of 0."""
    trainer, updater = subject.trainer, subject.trainer.updater
    updater.config = updater.config.model_copy(update={"num_ppo_epochs": 1, "max_grad_norm": None})
    updater.set_learning_rates(0.0)
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for part, optimizer in updater.optimizers.items():

            def keep(*_: Any, named: dict[str, nn.Parameter] = updater.trained[part]) -> None:
                for name, p in named.items():
                    found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()

            stack.callback(optimizer.register_step_pre_hook(keep).remove)
        metrics = updater.run(experience, 0, trainer.kl_coefficient.value)
    updater.config = trainer.config
    return metrics, found


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def first_ratio(subject: Subject) -> float:
    return subject.first_update()["ratio_deviation_first"]


def kl_at_start(subject: Subject) -> float:
    metrics = subject.first_update()
    return larger(abs(metrics["kl"]), metrics["kl_k3"])


def resume(subject: Subject) -> float:
    """Two updates in a row against one, a checkpoint, everything loaded anew, and another one: the largest
    difference of a trained weight or of a metric.
    """
    subject.first_update()
    trainer = subject.trainer
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 1, _trained(subject), trainer.state_dict(), subject.accelerator, keep=1)
        metrics = trainer.run_update()
        weights = {name: p.detach().cpu().clone() for name, p in _trained(subject).items()}
        del trainer
        subject.rebuild()
        checkpoint = complete_checkpoints(Path(folder))[-1]
        state = load_checkpoint(checkpoint, _trained(subject), subject.accelerator)
    subject.trainer.load_state_dict(state)
    resumed, worst = subject.trainer.run_update(), 0.0
    for name, parameter in _trained(subject).items():
        worst = larger(worst, (parameter.detach().cpu() - weights[name]).abs().max().item())
    if subject.device.type == "cpu":
        for name, value in metrics.items():
            if not name.startswith(TIMINGS):
                worst = larger(worst, abs(resumed[name] - value))
    return worst


def _trained(subject: Subject) -> dict[str, nn.Parameter]:
    return {name: p for part in subject.trainer.updater.trained.values() for name, p in part.items()}


@torch.no_grad()
def merged(subject: Subject) -> float | None:
    """Log-probabilities with the adapter beside the weights and with it merged into them. The adapter is
    given random weights first; infinite when they do not change what the model says.
    """
    networks, batch = subject.trainer.networks, subject.batch
    model = networks.policy_model
    if not isinstance(model, PeftModel):
        return None
    generator = torch.Generator().manual_seed(0)
    for name, p in subject.trainer.updater.trained["policy"].items():
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5 * 0.05)
    with subject.accelerator.autocast():
        beside = networks.policy(batch, 1.0).logprobs
        if not (beside - networks.reference(batch, 1.0)).abs().max() > 1e-3:
            return math.inf
        model.merge_adapter([POLICY_ADAPTER])
        within = networks.policy(batch, 1.0).logprobs
        model.unmerge_adapter()
    rows = zip(by_row(batch, beside), by_row(batch, within), strict=True)
    return max((one - other).abs().mean().item() for one, other in rows)
