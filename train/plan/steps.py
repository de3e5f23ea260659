"""One optimizer step of each stage that trains with TRL, on tensors without data.

Forward passes, loss, backward passes and optimizer are the stage's own; what its trainer does around them is
written down here, in its order (TRL 1.16): dpo and kto hold the policy's activations while the reference
reads the batch, orpo and cpo compute whole logits, all the others go through TRL's fused head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from trl.trainer.utils import add_fused_lm_head, use_adapter

from train.plan.fake import UNMASKED, adapt, build, fake_mode, give_storage, tiles_in_place
from train.plan.request import Request, RewardModel
from train.plan.rollouts import sample, score
from train.plan.tracker import ACTIVATIONS, LOGITS, MODELS, OPTIMIZER, STEP, WEIGHTS, MemoryTracker, Trace

FUSED_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "pretrain": ("log_probs", "entropy", "is_top1"),
}
"""Per-token numbers that TRL's trainers ask the fused head for, where more than log-probabilities."""

Loss = Callable[[], Tensor]


@dataclass
class TrainedModel:
    """A model without data, ready for a step: fused head, adapters, activation checkpointing."""

    model: nn.Module
    plain: Any

    @classmethod
    def of(cls, request: Request, mode: Any, task: TaskType = TaskType.CAUSAL_LM) -> TrainedModel:
        """As load_policy and TRL's trainers make it."""
        plain: Any = build(request.config, task, request.weights, request.kernel)
        if task == TaskType.CAUSAL_LM and request.kind not in ("orpo", "cpo"):
            add_fused_lm_head(plain, outputs=FUSED_OUTPUTS.get(request.kind, ("log_probs", "entropy")))
        model = adapt(plain, request.peft, task, follow=request.adapters_follow)
        give_storage(model, mode)
        model.train()
        if request.labelled is not None:
            plain.base_model.register_forward_hook(_keep_labelled(request.labelled))
        if request.checkpointing:
            plain.activation_checkpointing_enable()
            if request.peft is not None:
                plain.enable_input_require_grads()
        return cls(model, plain)


def trace_step(request: Request) -> Trace:
    """What one step of a TRL stage holds, from the second step on."""
    mode = fake_mode()
    task = TaskType.SEQ_CLS if request.kind == "reward" else TaskType.CAUSAL_LM
    trained = TrainedModel.of(request, mode, task)
    reference = None
    if request.reference and request.peft is None:
        reference = TrainedModel.of(request, mode, task)
        reference.model.requires_grad_(False)
    scorers = [scorer(model, mode) for model in request.rewards]
    tracker = MemoryTracker()
    with mode, tiles_in_place(request.device == "cuda"), tracker:
        tracker.hold([trained.model], WEIGHTS)
        tracker.separate_head(trained.plain.base_model)
        if reference is not None:
            tracker.hold([reference.model], MODELS)
            tracker.separate_head(reference.plain.base_model)
        tracker.hold(scorers, MODELS)
        batch = make_batch(request)
        loss = LOSSES.get(request.kind, fused_loss)
        optimizer = torch.optim.AdamW([p for p in trained.model.parameters() if p.requires_grad], fused=True)
        for step in range(2):
            tracker.forget_peaks()
            if request.rollout is not None:
                with autocast_of(request):
                    sample(trained.model, request, tracker, DynamicCache)
                for model, network in zip(request.rewards, scorers, strict=True):
                    score(network, model.tokens, request)
            for _ in range(2 if request.accumulates else 1):
                backward(request, tracker, lambda: loss(request, trained, reference, batch))
            with tracker.counting_as(STEP if step else OPTIMIZER):
                optimizer.step()
            optimizer.zero_grad()
        return tracker.trace()


def backward(request: Request, tracker: MemoryTracker, loss: Loss) -> None:
    """Forward pass under the request's autocast, backward pass outside of it, as accelerate does."""
    tracker.category = ACTIVATIONS
    with autocast_of(request):
        value = loss()
    with tracker.counting_as(LOGITS):
        value.backward()


def autocast_of(request: Request) -> AbstractContextManager[Any]:
    """The autocast that the stage computes under."""
    return nullcontext() if request.autocast is None else torch.autocast("cpu", request.autocast)


def scorer(model: RewardModel, mode: Any) -> Any:
    """A frozen reward model as grpo and rloo hold it: whole, in float32."""
    network: Any = give_storage(build(model.config, TaskType.SEQ_CLS, torch.float32), mode)
    return network.requires_grad_(False)


def make_batch(request: Request) -> dict[str, Tensor | None]:
    """Token ids, and the mask that sequences of different lengths need."""
    rows, length = request.rows, request.length
    if request.packed:
        ids = torch.zeros(1, rows * length, dtype=torch.long)
        mask = None
        if request.kernel != UNMASKED:
            mask = torch.ones(1, 1, rows * length, rows * length, dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if request.padded else None}


def _keep_labelled(count: int) -> Callable[[nn.Module, Any, Any], Any]:
    """As `train.supervised_head`: the head sees `count` positions. Which ones takes no memory to say here."""

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        hidden_BTD = output.last_hidden_state
        flat = hidden_BTD[:, :-1].flatten(0, 1)
        kept_ND = flat[torch.zeros(count, dtype=torch.long)]
        last = hidden_BTD.new_zeros(1, hidden_BTD.shape[-1])
        output.last_hidden_state = torch.cat([kept_ND, last])[None]
        return output

    return keep


def fused_logprobs(model: Any, batch: dict[str, Any], labelled: int | None = None) -> Tensor:
    """Log-probabilities of every token, or of so many, through TRL's fused head."""
    labels = batch["input_ids"]
    if labelled is not None:
        labels = labels.new_zeros(1, labelled + 1)
    output = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
    logprobs: Tensor = output.log_probs
    return logprobs


def fused_loss(request: Request, trained: TrainedModel, reference: Any, batch: dict[str, Any]) -> Tensor:
    """sft, pretrain: negative log-likelihood."""
    return -fused_logprobs(trained.model, batch, request.labelled).sum()


def preference_loss(
    request: Request, trained: TrainedModel, reference: TrainedModel | None, batch: dict[str, Any]
) -> Tensor:
    """dpo, kto: the policy, then the reference while the policy's activations are held."""
    if request.kind == "kto":
        with torch.no_grad():
            fused_logprobs(trained.model, batch)
    logprobs = fused_logprobs(trained.model, batch)
    read_reference(request, trained, reference, batch)
    return -functional.logsigmoid(logprobs.sum(dim=1)).mean()


def online_loss(
    request: Request, trained: TrainedModel, reference: TrainedModel | None, batch: dict[str, Any]
) -> Tensor:
    """grpo, rloo: the reference reads the answers first; clipped ratios of the policy then."""
    read_reference(request, trained, reference, batch)
    logprobs = fused_logprobs(trained.model, batch)
    ratio = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()


@torch.no_grad()
def read_reference(
    request: Request, trained: TrainedModel, reference: TrainedModel | None, batch: dict[str, Any]
) -> None:
    """The reference's log-probabilities: of its own weights, or of the model with its adapter off."""
    if not request.reference:
        return
    if reference is not None:
        fused_logprobs(reference.model, batch)
        return
    assert isinstance(trained.model, PeftModel)
    with use_adapter(trained.model, adapter_name=None):
        fused_logprobs(trained.model, batch)


def reward_loss(request: Request, trained: TrainedModel, reference: Any, batch: dict[str, Any]) -> Tensor:
    """reward: Bradley-Terry on one score per side."""
    scores = trained.model(**batch, use_cache=False).logits.squeeze(-1)
    chosen, rejected = scores.chunk(2)
    return -functional.logsigmoid(chosen - rejected).mean()


def whole_logits_loss(
    request: Request, trained: TrainedModel, reference: Any, batch: dict[str, Any]
) -> Tensor:
    """orpo, cpo: cross-entropy and log-probabilities on whole logits."""
    logits = trained.model(**batch, use_cache=False).logits.float()  # accelerate returns float32
    targets = batch["input_ids"][:, 1:]
    logprobs = torch.gather(logits[:, :-1].log_softmax(-1), 2, targets.unsqueeze(2)).squeeze(2)
    chosen = request.rows // 2
    nll = functional.cross_entropy(logits[:chosen, :-1].flatten(0, 1), targets[:chosen].flatten())
    return nll - functional.logsigmoid(logprobs.sum(dim=1)).mean()


LOSSES: dict[str, Callable[[Request, TrainedModel, Any, dict[str, Any]], Tensor]] = {
    "dpo": preference_loss,
    "kto": preference_loss,
    "grpo": online_loss,
    "rloo": online_loss,
    "reward": reward_loss,
    "orpo": whole_logits_loss,
    "cpo": whole_logits_loss,
}
