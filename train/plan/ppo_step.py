"""One rollout of PPO and the update on it, on tensors without data, with the networks that train."""

from __future__ import annotations

from typing import Any

import torch
from peft import TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import Cache, PreTrainedModel

from train.adapters import lora_config
from train.plan.fake import build, fake_mode, give_storage
from train.plan.request import Request, RewardModel
from train.plan.rollouts import sample
from train.plan.steps import autocast_of, scorer
from train.plan.tracker import ACTIVATIONS, LOGITS, MODELS, OPTIMIZER, STEP, WEIGHTS, MemoryTracker, Trace
from train.ppo.batches import TokenBatch
from train.ppo.engines.hf import GrowingLayer
from train.ppo.layouts import RewardAdapter, full_networks, shared_networks
from train.ppo.networks import Networks
from train.ppo.update import PARTS


def trace_ppo(request: Request) -> Trace:
    """What a rollout, its scoring and the update hold, from the second update on.

    request.rewards[0], if any, is the reward model that starts the value network; others only score.
    """
    assert request.rollout is not None
    mode = fake_mode()
    networks = build_networks(request)
    give_storage(networks, mode)
    batch = make_tokens(request, packed=networks.packed)
    scorers = [scorer(model, mode) for model in request.rewards[1:]]
    tracker = MemoryTracker()
    with mode, tracker:
        hold(networks, tracker)
        tracker.hold(scorers, MODELS)
        trained = networks.trained()
        optimizers = {
            part: torch.optim.AdamW(list(trained[part].values()), lr=1e-6, eps=1e-5, fused=True)
            for part in PARTS
        }
        passes = [PARTS] if networks.value_shares_trunk else [("policy",), ("value",)]
        for step in range(2):
            tracker.forget_peaks()
            with torch.no_grad(), autocast_of(request), networks.sampling() as policy:
                sample(policy, request, tracker, lambda: Cache(layer_class_to_replicate=GrowingLayer))
            collect(networks, batch, request, tracker)
            for parts in passes:
                for _ in range(2 if request.accumulates else 1):
                    accumulate(networks, parts, batch, request, tracker)
                with tracker.counting_as(STEP if step else OPTIMIZER):
                    for part in parts:
                        optimizers[part].step()
                        optimizers[part].zero_grad()
        return tracker.trace()


def build_networks(request: Request) -> Networks:
    """The networks on the meta device, as `make_ready` leaves them."""
    base: Any = build(request.config, TaskType.CAUSAL_LM, request.weights, request.kernel)
    lora = lora_config(request.peft, TaskType.CAUSAL_LM)
    reward = request.rewards[0] if request.rewards else None
    with torch.device("meta"):
        if request.layout == "shared":
            assert lora is not None
            adapter = None if reward is None else reward_adapter(reward, request.weights)
            networks = shared_networks(base, lora, adapter, request.value)
        else:
            classifier: Any = None
            if reward is not None:
                classifier = build(reward.config, TaskType.SEQ_CLS, request.weights, request.kernel)
            networks = full_networks(base, classifier, 0.0, lora, request.value)
    networks.fuse_adapters()
    networks.fused, networks.packed = True, request.device == "cpu"
    if request.autocast is not None:
        networks.hold_frozen_in(request.autocast)
    if request.checkpointing:
        networks.checkpoint_activations()
    return networks


def reward_adapter(reward: RewardModel, dtype: torch.dtype) -> RewardAdapter:
    """The reward model as an adapter without data. Call it under the meta device."""
    assert reward.adapter is not None
    lora = lora_config(reward.adapter, TaskType.SEQ_CLS)
    assert lora is not None
    model: Any = get_peft_model(build(reward.config, TaskType.SEQ_CLS, dtype), lora)  # type: ignore[arg-type]
    weights = get_peft_model_state_dict(model)
    [name] = [name for name in weights if name.endswith(".score.weight")]
    score = weights.pop(name)
    return RewardAdapter(model.peft_config["default"], weights, score, 0.0)


def make_tokens(request: Request, *, packed: bool) -> TokenBatch:
    """A micro-batch of the longest sequences there can be."""
    rollout = request.rollout
    assert rollout is not None
    response = min(rollout.response, request.length - 1)
    prompts = [[0] * (request.length - response)] * request.rows
    return TokenBatch.build(prompts, [[0] * response] * request.rows, 0, "cpu", packed=packed)


def hold(networks: Networks, tracker: MemoryTracker) -> None:
    """Weights: of policy and value network, or of the one base. Other models: reference and reward model."""
    trained = [networks.policy_trunk.model, networks.value_trunk.model, networks.value_head]
    tracker.hold(trained, WEIGHTS)
    tracker.hold([networks], MODELS)
    plain: list[PreTrainedModel] = [trunk.plain for trunk in (networks.policy_trunk, networks.value_trunk)]
    for model in {id(m): m for m in plain}.values():
        tracker.separate_head(model.base_model)


def collect(networks: Networks, batch: TokenBatch, request: Request, tracker: MemoryTracker) -> None:
    """Reward, reference, policy and values read the responses."""
    tracker.category = ACTIVATIONS
    with torch.no_grad(), autocast_of(request):
        if networks.reward_trunk is not None:
            networks.reward(batch)
        networks.reference(batch, 1.0)
        networks.policy_and_value(batch, 1.0, entropy=True)


def accumulate(
    networks: Networks, parts: tuple[str, ...], batch: TokenBatch, request: Request, tracker: MemoryTracker
) -> None:
    """Gradients of one micro-batch, as PpoUpdate takes them."""
    tracker.category = ACTIVATIONS
    with autocast_of(request):
        loss = _loss(networks, parts, batch, request)
    with tracker.counting_as(LOGITS):
        loss.backward()


def _loss(networks: Networks, parts: tuple[str, ...], batch: TokenBatch, request: Request) -> Tensor:
    if len(parts) == 2:
        tokens, values = networks.policy_and_value(batch, 1.0, entropy=request.entropy)
        return tokens.logprobs.exp().sum() + values.square().sum()
    if "value" in parts:
        return networks.value(batch).square().sum()
    tokens = networks.policy(batch, 1.0, entropy=request.entropy)
    return (tokens.logprobs.exp() - tokens.entropy).sum()
