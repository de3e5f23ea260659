"""How much a stage computes and writes: steps, tokens, FLOPs, hours, bytes on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import TaskType
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from train.base_config import BaseConfig
from train.config import KtoConfig, TrainingStageConfig
from train.online_config import OnlineConfig
from train.plan.fake import adapt, build
from train.plan.gpus import Gpu
from train.plan.layouts import Sizes
from train.plan.request import Request
from train.plan.stages import PAIRS, Described
from train.ppo.config import PpoStageConfig
from train.ppo.throughput import Attention, model_flops
from train.preflight.disk import ADAM, planned_steps

DECODING_BANDWIDTH = 0.6
"""Share of the memory bandwidth that reading weights and keys and values reaches in generation: assumed."""


@dataclass(frozen=True)
class Parameters:
    """Of one model in numbers: those that multiply every token, frozen and trained; of the output matrix, and
    whether it is trained; sizes for the layouts."""

    frozen: int
    trained: int
    head: int
    head_trained: bool
    sizes: Sizes


def count(request: Request) -> Parameters:
    """The parameters of the model that a stage trains, from its modules on the meta device."""
    task = TaskType.SEQ_CLS if request.kind == "reward" else TaskType.CAUSAL_LM
    plain: Any = build(request.config, task, request.weights)
    model = adapt(plain, request.peft, task)
    head_module = plain.get_output_embeddings()
    head = None if head_module is None else head_module.weight
    embedded = {id(p) for p in plain.get_input_embeddings().parameters()}
    seen = {False: 0, True: 0}
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.dim() >= 2 and id(parameter) not in embedded and parameter is not head:
            seen[parameter.requires_grad] += parameter.numel()
    return Parameters(
        seen[False],
        seen[True],
        0 if head is None else head.numel(),
        head is not None and head.requires_grad,
        sizes_of(model, head),
    )


def sizes_of(model: nn.Module, head: Any) -> Sizes:
    """What the layouts need to know of a model, which may be under LoRA."""
    parameters = list({id(p): p for p in model.parameters()}.values())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    linear = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and not m.weight.requires_grad and m.weight is not head
    ]
    return Sizes(
        trained=trained,
        frozen=total - trained,
        linear=sum(w.numel() for w in linear),
        layer=max(per_layer, default=total),
        root=total - sum(per_layer),
        matrix=max((w.numel() for w in linear), default=0),
    )


@dataclass(frozen=True)
class Work:
    """steps: optimizer steps, None while the number of rows is unknown. tokens_per_step: mean, and at most.
    flops_per_step: over all devices, recomputation not counted. decoded: tokens that one device generates one
    after the other in a step. checkpoint, final: bytes on the disk.
    """

    steps: int | None
    tokens_per_step: float
    most_tokens_per_step: float
    flops_per_step: float
    recomputed: float
    decoded: float
    checkpoint: float
    final: float

    @property
    def tokens(self) -> float | None:
        """In total."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    def seconds(self, gpu: Gpu, mfu: float, devices: int, held: float) -> float | None:
        """Of the whole stage, arithmetic at `mfu` of the device's rate; generation waits for the memory,
        which is read once per token. held: bytes of weights and of a half-filled cache. None: unknown.
        """
        if self.steps is None:
            return None
        arithmetic = (self.flops_per_step + self.recomputed) / (gpu.flops * mfu * devices)
        reading = self.decoded * held / (gpu.bandwidth * DECODING_BANDWIDTH) if gpu.bandwidth else 0.0
        return self.steps * (arithmetic + reading)


def work_of(described: Described, parameters: Parameters, devices: int) -> Work:
    """Everything about a stage that does not depend on the device's kind."""
    config, request = described.block.config, described.request
    trained_bytes = parameters.sizes.trained * request.weights.itemsize
    whole = request.peft is None
    final = parameters.sizes.total * request.weights.itemsize if whole else parameters.sizes.trained * 4
    checkpoint = trained_bytes + ADAM / 4 * trained_bytes
    if isinstance(config, PpoStageConfig):
        checkpoint *= 1 if config.value == "head" else 2
        work = _ppo_work(config, described, parameters, devices)
    elif isinstance(config, BaseConfig):
        tokens = float(config.batch_size * config.max_length)
        work = (
            config.steps,
            tokens,
            tokens,
            _pass(described, parameters, tokens, True),
            0.0,
        )
    else:
        assert isinstance(config, TrainingStageConfig)
        work = _trl_work(config, described, parameters, devices)
    steps, tokens, most, flops, decoded = work
    recomputed = 0.0
    if request.checkpointing:
        passes = config.num_ppo_epochs if isinstance(config, PpoStageConfig) else 1
        passes *= 2 if isinstance(config, PpoStageConfig) and config.value == "model" else 1
        recomputed = passes * _pass(described, parameters, tokens, False)
    return Work(steps, tokens, most, flops, recomputed, decoded, checkpoint, final)


Amounts = tuple[int | None, float, float, float, float]


def _trl_work(
    config: TrainingStageConfig, described: Described, parameters: Parameters, devices: int
) -> Amounts:
    """Steps, tokens per step (mean, most), FLOPs per step, tokens decoded one after the other in a step."""
    args, lengths, request = described.args, described.lengths, described.request
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    rows = lengths.rows
    if isinstance(config, OnlineConfig):
        rows = None if rows is None else rows * args.num_generations
    elif request.packed and rows is not None:
        rows = max(int(rows * lengths.mean // args.max_length), 1)
    elif isinstance(config, KtoConfig) and rows is not None and lengths.paired:
        rows *= 2
    trainer = config.trainer | {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": args.num_train_epochs,
    }
    steps = planned_steps(trainer, rows) or None
    sides = 2 if isinstance(config, PAIRS) else 1
    mean: float = args.max_length if request.packed else lengths.mean
    longest: float = request.length
    if isinstance(config, OnlineConfig):
        mean += args.max_completion_length
    tokens, most = batch * sides * mean, batch * sides * longest
    flops = _pass(described, parameters, tokens, True)
    forwards = (2 if config.__class__ is KtoConfig and request.reference else 1) * request.reference
    forwards += isinstance(config, KtoConfig)
    decoded = 0.0
    if isinstance(config, OnlineConfig):
        reuse = args.num_iterations
        forwards += 1 / reuse + len(request.rewards)
        decoded = args.max_completion_length * args.gradient_accumulation_steps
        decoded /= args.steps_per_generation * reuse
    flops += forwards * _pass(described, parameters, tokens, False)
    return steps, tokens, most, flops, decoded


def _ppo_work(config: PpoStageConfig, described: Described, parameters: Parameters, devices: int) -> Amounts:
    """Per rollout: the passes of policy and value network, and what reads the responses once."""
    lengths, request = described.lengths, described.request
    mean = lengths.mean + config.max_new_tokens
    tokens = config.batch_size * mean
    networks = 1 if config.value == "head" else 2
    trained = config.num_ppo_epochs * networks * _pass(described, parameters, tokens, True)
    once = (1 + networks + 1 + len(request.rewards)) * _pass(described, parameters, tokens, False)
    turns = -(-config.batch_size // devices // request.rollout.rows) if request.rollout else 1
    return (
        config.num_updates,
        tokens,
        config.batch_size * float(request.length),
        trained + once,
        float(turns * config.max_new_tokens),
    )


def _pass(described: Described, parameters: Parameters, tokens: float, trained: bool) -> float:
    """One pass over so many tokens: frozen and trained weights, attention, output matrix."""
    request = described.request
    text: PreTrainedConfig = request.config.get_text_config()
    context = described.lengths.mean + (0 if request.rollout is None else request.rollout.response)
    attention = Attention(text.num_hidden_layers, text.hidden_size, context)
    flops = model_flops(parameters.frozen, tokens, trained=trained, frozen_backbone=True, attention=attention)
    flops += model_flops(parameters.trained, tokens, trained=trained)
    return flops + model_flops(
        parameters.head, tokens, trained=trained, frozen_backbone=not parameters.head_trained
    )
