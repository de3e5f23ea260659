"""What is kept beside a reward model so that its scores can be read: a zero point and a temperature."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.dataset import read_split
from posttrain.calibration import calibration_report, fit_temperature, out_of_fold_temperature, two_folds
from posttrain.stage import StageContext
from train.config import RewardConfig
from train.encode import encode_whole
from train.reward_scores import score_dialogues

CALIBRATION_FILE = "reward_calibration.json"
UNCALIBRATED = {"bias": 0.0}


def measure_bias(
    config: RewardConfig, context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """``bias``, the mean raw score over ``n`` demonstrations; 0 over none without ``calibration_data``."""
    if config.calibration_data is None:
        return {**UNCALIBRATED, "n": 0}
    rows = read_split(context.path("calibration_data"), "train", "conversation")
    count = min(config.calibration_rows, len(rows))
    rows = rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))
    dialogues = encode_whole(tokenizer, list(rows["messages"]), list(rows["id"]))
    scores_N = score_dialogues(model, UNCALIBRATED, dialogues)
    return {"bias": scores_N.double().mean().item(), "n": count}


def measure_temperature(
    margins: np.ndarray, groups: Sequence[str], fold: Sequence[int] | None, seed: int
) -> dict[str, Any]:
    """The temperature of P(chosen wins) = sigmoid(margin / T), and what it does to the calibration error.

    The final model's temperature is that of scores it could not have memorised: out-of-fold scores of all
    training pairs where there are folds (as scikit-learn's CalibratedClassifierCV with ``ensemble=False``),
    else its own scores of the eval pairs. The errors after it are of temperatures fitted on other pairs than
    they are judged on: the other folds, or the other half of the groups.

    Args:
        margins: score of chosen less score of rejected, shape (N,).
        groups: of each pair.
        fold: of each pair; None for margins of eval pairs.

    Returns:
        ``temperature``, ``temperature_from`` ("folds" or "eval"), ``temperature_pairs``, and ``ece`` and
        ``log_loss`` (nats) ``_before`` and ``_after``.
    """
    crossed = out_of_fold_temperature(margins, two_folds(groups, seed) if fold is None else np.asarray(fold))
    before, after = calibration_report(margins, 1.0), calibration_report(margins, crossed)
    return {
        "temperature": fit_temperature(margins),
        "temperature_from": "eval" if fold is None else "folds",
        "temperature_pairs": len(margins),
        "ece_before": before["ece"],
        "ece_after": after["ece"],
        "log_loss_before": before["log_loss"],
        "log_loss_after": after["log_loss"],
    }
