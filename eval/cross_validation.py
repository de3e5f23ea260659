"""The reward model on all its pairs, each scored by a fold that had not seen it, beside judges that
understand nothing, cross-validated on the very same folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import read_split
from eval.rm_breakdown import judge_outcomes
from eval.rm_report import Settings, baseline_margins, judge_summary
from eval.statistics import paired_difference
from posttrain.calibration import calibration_report, fit_temperature, out_of_fold_temperature


def cross_validation(reward_run: Path, preferences: Path, settings: Settings) -> dict[str, Any] | None:
    """Report on ``folds.jsonl`` of a reward stage; None where it was trained without ``folds``.

    Args:
        reward_run: run directory of the reward stage.
        preferences: its preference dataset; the rows of the train split are matched by id.
        settings: of the intervals.

    Returns:
        ``folds``, ``pairs``, ``accuracy`` (with interval), ``ties``, ``auc``, ``baselines``, all out of fold
        and with groups resampled; beside each baseline the ``gain`` of the reward model over it; calibration
        ``before`` and ``after`` a temperature, which each fold has from the other folds; the ``temperature``
        of all folds together. None also where the folds are of another dataset than `preferences`.
    """
    scores_file = reward_run / "folds.jsonl"
    if not scores_file.is_file():
        return None
    scored = {row["id"]: row for row in map(json.loads, scores_file.read_text(encoding="utf-8").splitlines())}
    rows = [row for row in read_split(preferences, "train", "preference").to_list() if row["id"] in scored]
    if len(rows) != len(scored):
        return None
    margins = np.array([scored[row["id"]]["chosen"] - scored[row["id"]]["rejected"] for row in rows])
    fold = np.array([scored[row["id"]]["fold"] for row in rows])
    chosen, rejected = ([row[side][-1]["content"] for row in rows] for side in ("chosen", "rejected"))
    groups = [row["group"] for row in rows]
    baselines = baseline_margins(chosen, rejected, groups, fold.tolist()) if settings.baselines else {}
    return {
        "folds": len(set(fold.tolist())),
        "pairs": len(rows),
        **judge_summary(margins, groups, settings),
        "temperature": fit_temperature(margins),
        "before": calibration_report(margins, 1.0, settings.bins),
        "after": calibration_report(margins, out_of_fold_temperature(margins, fold), settings.bins),
        "baselines": _baselines(margins, baselines, groups, settings),
    }


def _baselines(
    margins: np.ndarray, others: dict[str, np.ndarray], groups: list[str], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Summary of each baseline, and the reward model's gain in accuracy over it, pair by pair."""
    reports = {}
    for name, other in others.items():
        gain = paired_difference(
            judge_outcomes(margins),
            judge_outcomes(other),
            groups,
            settings.confidence,
            settings.samples,
            settings.seed,
        )
        reports[name] = judge_summary(other, groups, settings) | {"gain": gain.as_dict()}
    return reports
