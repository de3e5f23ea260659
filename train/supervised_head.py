"""The language-model head only where there is a label, on a CPU.

TRL's fused head leaves out tokens without a label on devices with Triton, and computes every position
elsewhere. On a CPU the head is a large part of a small model's step, and prompts and padding have no label.
Two of torch's hooks hand TRL's head, which is left as it is, the labelled positions alone: the sums that loss
and metrics are made of are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from train.encode import IGNORED


def score_supervised_only(model: Any) -> bool:
    """From now on ``model(..., labels=..., fused_lm_head=True)`` computes the head only where a label is.

    model: what the trainer calls; TRL's `add_fused_lm_head` has been applied to it. Its per-token outputs are
    then [1, N] for the N tokens with a label instead of [B, T - 1]. Returns whether it applies: it does not
    where PEFT puts tokens of its own before the sequence.
    """
    causal_lm: Any = model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        causal_lm = model.get_base_model()
    chosen: list[Tensor] = []

    def take_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            return None
        targets_BT = kwargs["labels"][:, 1:]
        mask_BT = targets_BT != IGNORED
        chosen[:] = [mask_BT]
        # TRL drops the first label and the last hidden state: position t predicts label t + 1.
        first = targets_BT.new_full((1,), IGNORED)
        return args, kwargs | {"labels": torch.cat([first, targets_BT[mask_BT]])[None]}

    def take_states(module: nn.Module, args: Any, output: Any) -> Any:
        if chosen:
            hidden_BTD = output.last_hidden_state
            kept_ND = hidden_BTD[:, :-1][chosen.pop()]
            last = hidden_BTD.new_zeros(1, hidden_BTD.shape[-1])
            output.last_hidden_state = torch.cat([kept_ND, last])[None]
        return output

    model.register_forward_pre_hook(take_labels, with_kwargs=True)
    causal_lm.base_model.register_forward_hook(take_states)
    return True
