"""Scores of a reward model over many dialogues, and the accuracy over pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from posttrain.models import score_ids

Pair = tuple[list[int], list[int]]


@torch.no_grad()
def score_dialogues(
    model: PreTrainedModel,
    calibration: dict[str, float],
    dialogues: Sequence[list[int]],
    batch_size: int = 64,
) -> torch.Tensor:
    """Calibrated reward of each dialogue, in the order given: float32, shape (N,), on the CPU.

    Dialogues of like length share a batch; the model is put in evaluation mode.
    """
    model.eval()
    pad = model.config.get_text_config().pad_token_id
    scores_N = torch.empty(len(dialogues))
    order = sorted(range(len(dialogues)), key=lambda index: len(dialogues[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(dialogues[index]) for index in chosen)
        ids_BT = torch.full((len(chosen), width), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(chosen):
            length = len(dialogues[index])
            ids_BT[row, :length] = torch.tensor(dialogues[index])
            mask_BT[row, :length] = 1
        scores_B = score_ids(model, calibration, ids_BT.to(model.device), mask_BT.to(model.device))
        scores_N[chosen] = scores_B.float().cpu()
    return scores_N


def score_pairs(
    model: PreTrainedModel, calibration: dict[str, float], pairs: Sequence[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and of the rejected side, each of shape (N,)."""
    flat = [dialogue for pair in pairs for dialogue in pair]
    scores_2N = score_dialogues(model, calibration, flat)
    return scores_2N[0::2], scores_2N[1::2]


def pair_accuracy(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> dict[str, float]:
    """``accuracy`` over all pairs, a tie counting one half, the number of ``ties``, Wilson's 95 % interval.

    The interval (Wilson 1927) takes pairs as independent; pairs that share a prompt make it too narrow.
    """
    total = len(chosen_N)
    ties = int((chosen_N == rejected_N).sum())
    accuracy = (int((chosen_N > rejected_N).sum()) + ties / 2) / total
    z = 1.959964
    centre = (accuracy + z * z / (2 * total)) / (1 + z * z / total)
    spread = accuracy * (1 - accuracy) / total + z * z / (4 * total * total)
    half = z * math.sqrt(spread) / (1 + z * z / total)
    return {
        "accuracy": accuracy,
        "accuracy_low": centre - half,
        "accuracy_high": centre + half,
        "ties": ties,
        "pairs": total,
    }
