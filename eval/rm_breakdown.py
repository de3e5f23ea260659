"""Where a reward model is right: as a classifier, by its own confidence, by subset, and length aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from eval.classification import binary_report
from eval.statistics import Interval, mean_standard_error, proportion_interval
from eval.statistics.intervals import cluster_codes

CONFIDENT_SHARES = (1.0, 0.75, 0.5, 0.25)
MAX_SUBSETS = 20
OTHER_SUBSETS = "(other)"


def judge_outcomes(margins: np.ndarray) -> np.ndarray:
    """Whether each pair is judged right: 1, 0, or 0.5 where both answers score equally."""
    return np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))


def classification(margins: np.ndarray, better: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
    """The reward model as a classifier, twice.

    `pairs`: is the first answer better, every pair shown both ways round, at margin 0, equal scores half
    either way. By that symmetry precision, recall and F1 all equal the accuracy.

    `answers`: is a single answer one that was preferred, at score 0, all answers together. Scores compare
    across prompts here, which pairwise training does not ask for: it is what a fixed threshold on the score
    (best-of-n cut-offs, filters) would get.
    """
    ones = np.ones(len(margins), dtype=int)
    labels = np.concatenate([ones, 1 - ones])
    return {
        "pairs": binary_report(labels, np.concatenate([margins, -margins])),
        "answers": binary_report(labels, np.concatenate([better, worse])),
    }


def accuracy_by_confidence(
    margins: np.ndarray, prompts: Sequence[str], confidence: float
) -> list[dict[str, Any]]:
    """Accuracy on the pairs of largest absolute margin: all, three quarters, a half, a quarter of them.

    A model whose confidence means something gets better from row to row.
    """
    order = np.argsort(-np.abs(margins), kind="stable").tolist()
    outcomes = judge_outcomes(margins)
    rows = []
    for share in CONFIDENT_SHARES:
        kept = order[: max(1, round(share * len(order)))]
        accuracy = proportion_interval(outcomes[kept], [prompts[i] for i in kept], confidence)
        rows.append(
            {
                "share": share,
                "least_margin": float(np.abs(margins[kept[-1]])),
                "accuracy": accuracy.as_dict(),
            }
        )
    return rows


def accuracy_by_subset(
    margins: np.ndarray, subsets: Sequence[str], prompts: Sequence[str], confidence: float
) -> dict[str, dict[str, Any]]:
    """Accuracy in each subset, the largest first; beyond MAX_SUBSETS the small ones are one row.

    Empty where there is only one subset.
    """
    counts = Counter(subsets)
    if len(counts) < 2:
        return {}
    shown = {name for name, _ in counts.most_common(MAX_SUBSETS)}
    named = np.array([name if name in shown else OTHER_SUBSETS for name in subsets], dtype=object)
    outcomes = judge_outcomes(margins)
    report = {}
    for name, _ in Counter(named.tolist()).most_common():
        inside = np.flatnonzero(named == name).tolist()
        accuracy = proportion_interval(outcomes[inside], [prompts[i] for i in inside], confidence)
        report[name] = accuracy.as_dict()
    return report


def length_controlled_accuracy(
    margins: np.ndarray, length_difference: np.ndarray, prompts: Sequence[str], confidence: float
) -> dict[str, Any] | None:
    """Accuracy as it would be if the better answer were the longer one half of the time.

    The mean of the accuracy where the better answer is longer and the accuracy where it is shorter (direct
    standardisation by strata), pairs of equal length left out. A judge of length alone gets exactly 0.5,
    whichever way it leans. None where one of the two strata is empty.

    Args:
        margins: score of the better answer less the other's, shape (n,).
        length_difference: length of the better answer less the other's, shape (n,).
    """
    outcomes = judge_outcomes(margins)
    longer, shorter = length_difference > 0, length_difference < 0
    if not longer.any() or not shorter.any():
        return None
    strata = [
        proportion_interval(
            outcomes[inside], [prompts[i] for i in np.flatnonzero(inside).tolist()], confidence
        )
        for inside in (longer, shorter)
    ]
    kept = longer | shorter
    # Each stratum's mean is a ratio; half of its linearised deviations, over all pairs, is the whole's.
    size = np.where(longer, longer.sum(), shorter.sum())
    mean = np.where(longer, strata[0].value, strata[1].value)
    deviations = (kept.sum() / (2 * size) * (outcomes - mean))[kept]
    kept_prompts = [prompts[i] for i in np.flatnonzero(kept).tolist()]
    value = (strata[0].value + strata[1].value) / 2
    return {
        "accuracy": _bounded_interval(value, deviations, kept_prompts, confidence).as_dict(),
        "where_longer_is_better": strata[0].as_dict(),
        "where_shorter_is_better": strata[1].as_dict(),
        "equal_length": int((length_difference == 0).sum()),
    }


def _bounded_interval(
    value: float, deviations: np.ndarray, prompts: Sequence[str], confidence: float
) -> Interval:
    error = mean_standard_error(deviations, prompts)
    groups = int(cluster_codes(prompts, deviations.size).max()) + 1
    half = float(stats.t.ppf(0.5 + confidence / 2, groups - 1)) * error if groups > 1 else 0.0
    error = error if groups > 1 else 0.0
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    return Interval(value, low, high, deviations.size, "t-stratified", error)
