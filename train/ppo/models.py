"""The networks of a PPO run: policy and value in one module, the frozen reference, and how they start."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.ppo.losses import token_entropy, token_logprobs


@dataclass(frozen=True)
class TokenBatch:
    """Prompts, padded on the left, followed by responses, padded on the right.

    input_ids_BT, attention_mask_BT: long, T = Q + R; response_mask_BR: bool, a non-empty prefix of each row.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    response_mask_BR: Tensor

    @property
    def response_ids_BR(self) -> Tensor:
        return self.input_ids_BT[:, -self.response_mask_BR.shape[1] :]

    @classmethod
    def build(
        cls, prompts: list[list[int]], responses: list[list[int]], pad_id: int, device: torch.device | str
    ) -> Self:
        """Pad to the longest prompt and the longest response given."""
        width_q, width_r = max(map(len, prompts)), max(map(len, responses))
        ids, mask = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            left, right = width_q - len(prompt), width_r - len(response)
            ids.append([pad_id] * left + prompt + response + [pad_id] * right)
            mask.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
        lengths = torch.tensor([len(response) for response in responses])
        return cls(
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            (torch.arange(width_r) < lengths.unsqueeze(1)).to(device),
        )


def position_ids(attention_mask_BT: Tensor) -> Tensor:
    """Positions counted from each row's first real token, so that padding on the left changes nothing."""
    return (attention_mask_BT.cumsum(-1) - 1).clamp(min=0)


def response_logprobs(
    model: nn.Module, batch: TokenBatch, temperature: float, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and, where asked for, entropies (else zeros), [B, R] each.

    Logits are computed for the R positions that predict the response only. Entries outside
    batch.response_mask_BR are those of padding: finite and meaningless.
    """
    width = batch.response_mask_BR.shape[1]
    logits_BRV = model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=position_ids(batch.attention_mask_BT),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    logprobs_BR, normaliser_BR = token_logprobs(logits_BRV, batch.response_ids_BR, temperature)
    if not with_entropy:
        return logprobs_BR, torch.zeros_like(logprobs_BR)
    return logprobs_BR, token_entropy(logits_BRV, normaliser_BR, temperature)


class ValueNetwork(nn.Module):
    """A reward model read at every position: its backbone, its score head and its calibration bias."""

    bias: Tensor

    def __init__(self, reward_model: PreTrainedModel, calibration: dict[str, float]) -> None:
        super().__init__()
        self.backbone = reward_model.base_model
        self.score = reward_model.get_submodule("score")
        self.register_buffer("bias", torch.tensor(float(calibration["bias"])))

    def forward(self, batch: TokenBatch) -> Tensor:
        """Value before each response token, [B, R]: position t has seen the prompt and t response tokens."""
        width = batch.response_mask_BR.shape[1]
        hidden_BTD = self.backbone(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=position_ids(batch.attention_mask_BT),
            use_cache=False,
        ).last_hidden_state
        return self.score(hidden_BTD[:, -width - 1 : -1]).squeeze(-1).float() - self.bias


class PolicyOutputs(NamedTuple):
    """Of one batch, [B, R] each; entropy is zeros unless it was asked for."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class PolicyAndValue(nn.Module):
    """Both trained networks in one module, so that there is one engine to wrap (DDP, DeepSpeed, FSDP).

    They share no weights. Kept in eval mode for the whole run: dropout is off in rollouts and updates alike.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, value: ValueNetwork) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.eval()

    def forward(self, batch: TokenBatch, temperature: float, with_entropy: bool = False) -> PolicyOutputs:
        logprobs_BR, entropy_BR = response_logprobs(
            self.policy, batch, temperature, with_entropy=with_entropy
        )
        return PolicyOutputs(logprobs_BR, entropy_BR, self.value(batch))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimizer moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_policy_and_value(
    sft_model: PreTrainedModel,
    reward_model: PreTrainedModel,
    calibration: dict[str, float],
    lora: LoraConfig | None,
) -> tuple[PolicyAndValue, PreTrainedModel]:
    """The trained pair and the frozen reference.

    The reference is a copy of the SFT model made before any adapter is attached. The value network is a
    copy of the reward model, which stays as it is for scoring. Zero-initialised LoRA leaves the policy
    equal to the reference to the bit.
    """
    reference = copy.deepcopy(sft_model).eval().requires_grad_(False)
    sft_model.requires_grad_(True)
    policy = sft_model if lora is None else get_peft_model(sft_model, lora)
    value = ValueNetwork(copy.deepcopy(reward_model), calibration).requires_grad_(True)
    return PolicyAndValue(policy, value), reference
