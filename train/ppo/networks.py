"""The networks of a PPO run behind one interface, whatever they share: policy, value, reference and reward.

Layouts (`layout` in the configuration):
- full: policy and value network of their own weights; with LoRA the value network is still trained in full.
- shared: one frozen base in memory. Policy, value network and reward model are adapters on it (the last two
  with a head each), the reference is the base itself or, where SFT was not merged, a frozen copy of its
  adapter.
With `value: head` the value is read off the policy's own hidden states, in the same forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.ppo.batches import TokenBatch
from train.ppo.logprobs import linear_logprobs, plain_head, wide
from train.ppo.lora_linear import fuse_lora
from train.ppo.losses import token_entropy, token_logprobs
from train.ppo.packing import packed_attention, packed_positions
from train.ppo.recompute import checkpoint_layers, restored_by

POLICY_ADAPTER = "default"
"""peft saves the adapter of this name at the top of the model directory."""
VALUE_ADAPTER, REWARD_ADAPTER, REFERENCE_ADAPTER = "value", "reward", "reference"
TRIAL_TOKENS = 16
PATH_TOLERANCE = 2e-3
"""Nats per token by which a faster way through the model may differ from its own logits (bf16 autocast is
not on when it is tried).
"""
ADAPTER_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class Trunk:
    """A backbone with one of its adapters switched on.

    adapter: its name, None for the bare base; ignored where the model carries no adapters at all.
    """

    model: PreTrainedModel | PeftModel
    adapter: str | None = None

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model itself; LoRA layers sit inside it."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    def sees(self, tokens: int | None) -> bool:
        """Whether attention reaches over so many tokens; None asks for nothing."""
        window = self.plain.config.get_text_config().to_dict().get("sliding_window")
        return tokens is None or window is None or window >= tokens

    @contextmanager
    def active(self, part: nn.Module | None = None) -> Iterator[None]:
        """Switch this trunk's adapter on, and back afterwards. What is trainable does not change.

        part: a module of the model, to switch nothing else. peft ties the two together (a switched-on adapter
        becomes trainable), so the flags are put back.
        """
        if not isinstance(self.model, PeftModel):
            yield
            return
        layers = [module for module in (part or self.model).modules() if isinstance(module, ADAPTER_LAYERS)]
        before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        if all(state == self._wanted(layer) for state, layer in zip(before, layers, strict=True)):
            yield
            return
        with _flags_kept(layers):
            for layer in layers:
                _switch(layer, *self._wanted(layer))
        try:
            yield
        finally:
            with _flags_kept(layers):
                for layer, state in zip(layers, before, strict=True):
                    _switch(layer, *state)

    def _wanted(self, layer: Any) -> tuple[list[str], bool]:
        return (layer.active_adapters, True) if self.adapter is None else ([self.adapter], False)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states at every place of the batch, [B * T, D]."""
        with self._over(batch) as positions:
            hidden_BTD = self.plain.base_model(
                input_ids=batch.input_ids_BT, use_cache=False, **positions
            ).last_hidden_state
        return hidden_BTD.flatten(0, 1)

    def logits(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The model's own logits at every place, [B * T, V], and its last hidden states, [B * T, D]."""
        with self._over(batch) as positions:
            outputs = self.plain(
                input_ids=batch.input_ids_BT, use_cache=False, output_hidden_states=True, **positions
            )
        return outputs.logits.flatten(0, 1), outputs.hidden_states[-1].flatten(0, 1)

    @contextmanager
    def _over(self, batch: TokenBatch, part: nn.Module | None = None) -> Iterator[dict[str, Tensor]]:
        """What a forward pass over the batch runs under; gives the model's arguments besides the ids."""
        with (
            self.active(part),
            _layout_of(batch, self.plain) as positions,
            restored_by(lambda layer: self._over(batch, layer)),
        ):
            yield positions


@contextmanager
def _layout_of(batch: TokenBatch, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What a forward pass over the batch needs besides its ids."""
    if not batch.packed:
        yield {}
        return
    with packed_attention(model, batch.lengths):
        yield {"position_ids": packed_positions(batch.lengths).to(batch.input_ids_BT.device)}


def _switch(layer: Any, adapters: list[str], disabled: bool) -> None:
    layer.enable_adapters(not disabled)
    if not disabled:
        layer.set_adapter(adapters)


@contextmanager
def _flags_kept(layers: list[Any]) -> Iterator[None]:
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in flags:
            parameter.requires_grad_(trainable)


class ScoreHead(nn.Module):
    """A reward model's head: one number per hidden state, less the calibration bias."""

    bias: Tensor

    def __init__(self, score: nn.Module, bias: float) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("bias", torch.tensor(float(bias)))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Scores, float32 (float64 of a model in float64), [N]; computed in that type under autocast too:
        a score of 5 in bfloat16 is only known to 0.03.
        """
        dtype = wide(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.score(hidden_ND.to(dtype)).squeeze(-1) - self.bias


class PolicyTokens(NamedTuple):
    """Of the response tokens of one batch, rows in order, float32 [N] each; entropy is zeros unless
    asked for.
    """

    logprobs: Tensor
    entropy: Tensor


class Networks(nn.Module):
    """What PPO trains and what it is held against.

    Kept in eval mode for the whole run: dropout is off in rollouts and updates alike.
    """

    def __init__(
        self,
        policy: Trunk,
        value: Trunk,
        value_head: ScoreHead,
        reference: Trunk,
        reward: Trunk | None,
        reward_head: ScoreHead | None,
        layout: Literal["full", "shared"] = "full",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.policy_trunk, self.value_trunk = policy, value
        self.reference_trunk, self.reward_trunk = reference, reward
        # Registered once each, so that a base that several trunks share is one module with one set of names.
        self.policy_model = policy.model
        others = [trunk.model for trunk in (value, reference, reward) if trunk is not None]
        self.models = nn.ModuleList(_distinct(policy.model, *others)[1:])
        self.value_head, self.reward_head = value_head, reward_head
        self.eval()
        self.fused = self.packed = False

    @property
    def value_shares_trunk(self) -> bool:
        """Whether one forward pass gives log-probabilities and values."""
        return self.value_trunk == self.policy_trunk

    @contextmanager
    def sampling(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The policy, its adapter on, for a rollout engine to sample from."""
        with self.policy_trunk.active():
            yield self.policy_model

    def policy(self, batch: TokenBatch, temperature: float, *, entropy: bool = False) -> PolicyTokens:
        """Log-probabilities of the response tokens and, where asked for, entropies."""
        return self._read(self.policy_trunk, batch, temperature, entropy)[0]

    def policy_and_value(
        self, batch: TokenBatch, temperature: float, *, entropy: bool = False
    ) -> tuple[PolicyTokens, Tensor]:
        """Both; from one forward pass where the value head sits on the policy's trunk."""
        tokens, hidden_ND = self._read(self.policy_trunk, batch, temperature, entropy)
        return tokens, self.value_head(hidden_ND) if self.value_shares_trunk else self.value(batch)

    def value(self, batch: TokenBatch) -> Tensor:
        """The value before each response token, [N]: it has seen the prompt and the tokens before."""
        return self.value_head(self.value_trunk.hidden(batch).index_select(0, batch.predict_N))

    @torch.no_grad()
    def reference(self, batch: TokenBatch, temperature: float) -> Tensor:
        """The reference's log-probabilities of the response tokens, [N]."""
        return self._read(self.reference_trunk, batch, temperature, False)[0].logprobs

    @torch.no_grad()
    def reward(self, batch: TokenBatch) -> Tensor:
        """The reward model's score at the last token of each row, [B]."""
        assert self.reward_trunk is not None and self.reward_head is not None
        return self.reward_head(self.reward_trunk.hidden(batch).index_select(0, batch.last_B))

    def fuse_adapters(self) -> None:
        """Let LoRA layers compute what they compute in fewer passes over memory; see `lora_linear`."""
        for model in _distinct(*(trunk.model for trunk in self._trunks())):
            fuse_lora(model)

    def checkpoint_activations(self) -> None:
        """Compute the layers of trained models again in the backward pass instead of keeping activations.

        Raises UserError where a model's layers do not allow it.
        """
        for model in _distinct(self.policy_trunk.plain, self.value_trunk.plain):
            checkpoint_layers(cast(PreTrainedModel, model))

    @torch.no_grad()
    def hold_frozen_in(self, dtype: torch.dtype) -> None:
        """Keep the matrices of linear layers that are never trained in the type that autocast gives them.

        Under autocast in that type nothing changes, to the bit: it would round the same float32 weights the
        same way in every forward pass. Adapters, heads, norms and embeddings keep their type. They are copied
        out of the memory-mapped weight file, which would stay mapped, and its float32 matrices resident, for
        as long as one tensor of it lives.
        """
        kept = {id(trunk.plain.get_input_embeddings().weight) for trunk in self._trunks()}
        for head in (self.value_head, self.reward_head):
            kept |= {id(p) for p in head.parameters()} if head is not None else set()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                weight = module.weight
                if not weight.requires_grad and id(weight) not in kept:
                    weight.data = weight.data.to(dtype)
        for parameter in self.parameters():
            if parameter.dtype != dtype:
                parameter.data = parameter.data.clone()

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters that the optimizers move, by part ("policy", "value") and name."""
        value_ids = {id(p) for p in self.value_head.parameters()}
        if self.value_trunk.model is not self.policy_model:
            value_ids |= {id(p) for p in self.value_trunk.model.parameters()}
        elif not self.value_shares_trunk:
            named = self.value_trunk.model.named_parameters()
            value_ids |= {id(p) for name, p in named if f".{VALUE_ADAPTER}." in name}
        parts: dict[str, dict[str, nn.Parameter]] = {"policy": {}, "value": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parts["value" if id(parameter) in value_ids else "policy"][name] = parameter
        return parts

    @torch.no_grad()
    def choose_paths(
        self, prompts: list[list[int]], pad_id: int, *, packing: bool, longest: int | None = None
    ) -> None:
        """Use the faster ways through the models from now on where they give what the plain one gives.

        fused: `linear_logprobs` instead of the model's logits; models that do more to their logits than one
        matrix (soft caps, scales, adapters on the head) keep the logits. packed: sequences end to end, if
        `packing` asks for it; models whose attention is of another kind keep padded rows, and so do those
        with a sliding window shorter than `longest`, the most tokens a sequence of the run can have.
        prompts: token ids to try it on, none empty; the last few of each are used.
        """
        self.fused = self.packed = False
        asked = [prompts[0][-TRIAL_TOKENS:], prompts[-1][-TRIAL_TOKENS // 2 :]]
        answers = [prompt[::-1][:4] for prompt in asked]
        device = self.value_head.bias.device
        padded, packed = (
            TokenBatch.build(asked, answers, pad_id, device, packed=packed) for packed in (False, True)
        )
        expected = self.policy(padded, 1.0).logprobs
        if plain_head(self.policy_trunk.plain.get_output_embeddings()):
            self.fused = True
            self.fused = _close(self.policy(padded, 1.0).logprobs, expected)
        if not packing or not all(trunk.sees(longest) for trunk in self._trunks()):
            return
        try:
            ways = [(self.policy(packed, 1.0).logprobs, expected), (self.value(packed), self.value(padded))]
            if self.reward_trunk is not None:
                ways.append((self.reward(packed), self.reward(padded)))
            self.packed = all(_close(found, wanted) for found, wanted in ways)
        except NotImplementedError:
            self.packed = False

    def _trunks(self) -> list[Trunk]:
        trunks = [self.policy_trunk, self.value_trunk, self.reference_trunk, self.reward_trunk]
        return [trunk for trunk in trunks if trunk is not None]

    def _read(
        self, trunk: Trunk, batch: TokenBatch, temperature: float, entropy: bool
    ) -> tuple[PolicyTokens, Tensor]:
        """What a trunk says of the response tokens, and the hidden states [N, D] that it is read off."""
        if not self.fused:
            logits_NV, hidden_ND = (whole.index_select(0, batch.predict_N) for whole in trunk.logits(batch))
            return _from_logits(logits_NV, batch, temperature, entropy), hidden_ND
        hidden_ND = trunk.hidden(batch).index_select(0, batch.predict_N)
        weight_VD = trunk.plain.get_output_embeddings().weight
        fused = linear_logprobs(hidden_ND, weight_VD, batch.target_N, temperature, with_entropy=entropy)
        return PolicyTokens(*fused), hidden_ND


def _from_logits(logits_NV: Tensor, batch: TokenBatch, temperature: float, entropy: bool) -> PolicyTokens:
    logprobs_N, normaliser_N = token_logprobs(logits_NV, batch.target_N, temperature)
    if not entropy:
        return PolicyTokens(logprobs_N, torch.zeros_like(logprobs_N))
    return PolicyTokens(logprobs_N, token_entropy(logits_NV, normaliser_N, temperature))


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= PATH_TOLERANCE)


def _distinct(*models: nn.Module) -> list[nn.Module]:
    return list({id(model): model for model in models}.values())
