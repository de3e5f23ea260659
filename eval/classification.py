"""Metrics of classifiers, in one place: of verdicts, of scores and of probabilities. Over sklearn.

docs/evaluation.md says which of them mean something on imbalanced data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn import metrics

from eval.statistics.intervals import Values, finite_array, unit_array
from posttrain.calibration import expected_calibration_error, fit_temperature

Labels = Sequence[int] | np.ndarray


def binary_report(
    labels: Labels,
    scores: Values,
    threshold: float = 0.0,
    weights: Values | None = None,
) -> dict[str, Any]:
    """How well scores, in any unit, tell positives from negatives.

    Args:
        labels: 0 or 1, shape (n,).
        scores: the higher, the more positive, shape (n,).
        threshold: a score above it is a positive verdict; scores equal to it are counted (`at_threshold`)
            and count half to either verdict.
        weights: of each item, shape (n,); 1 by default.

    Returns:
        `n`, `prevalence` (share of positives: what precision and average precision of a coin are),
        `confusion` (tp, fp, fn, tn), `accuracy`, `balanced_accuracy`, `precision`, `recall`, `specificity`,
        `f1`, `mcc`, `auc_roc`, `average_precision` (PR-AUC). None where one is not defined: AUCs, balanced
        accuracy and MCC with a single class, precision without a positive verdict.

    Raises ValueError for labels other than 0 and 1 or for different lengths.
    """
    y, s = _binary(labels), finite_array(scores)
    if y.size != s.size:
        raise ValueError(f"{y.size} labels but {s.size} scores")
    w = np.ones_like(s) if weights is None else finite_array(weights)
    positive = np.where(s == threshold, 0.5, (s > threshold).astype(np.float64))
    return {
        "n": int(y.size),
        "prevalence": float(np.average(y, weights=w)),
        "threshold": threshold,
        "at_threshold": int((s == threshold).sum()),
        **_from_confusion(
            tp=float((w * positive * y).sum()),
            fp=float((w * positive * (1 - y)).sum()),
            fn=float((w * (1 - positive) * y).sum()),
            tn=float((w * (1 - positive) * (1 - y)).sum()),
        ),
        "auc_roc": float(metrics.roc_auc_score(y, s, sample_weight=w)) if np.ptp(y) else None,
        "average_precision": float(metrics.average_precision_score(y, s, sample_weight=w))
        if np.ptp(y)
        else None,
    }


def _from_confusion(tp: float, fp: float, fn: float, tn: float) -> dict[str, Any]:
    """Rates of a 2 x 2 table whose cells may hold halves, as sklearn's functions do not take them."""

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    recall, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    balanced = None if recall is None or specificity is None else (recall + specificity) / 2
    return {
        "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "balanced_accuracy": balanced,
        "precision": ratio(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / spread**0.5 if spread > 0 else None,
    }


def probability_report(labels: Labels, probabilities: Values, bins: int = 10) -> dict[str, Any]:
    """How far probabilities of the positive class can be taken at their word.

    Returns `log_loss` (nats), `brier`, `ece` (expected calibration error) and the `bins` of the reliability
    plot behind it. Raises ValueError for probabilities outside [0, 1].
    """
    y, p = _binary(labels), unit_array(probabilities, "probabilities")
    rows = reliability(y, p, bins)
    return {
        "log_loss": float(metrics.log_loss(y, p, labels=[0, 1])),
        "brier": float(metrics.brier_score_loss(y, p, pos_label=1)),
        "ece": expected_calibration_error(rows),
        "bins": rows,
    }


def reliability(labels: Labels, probabilities: Values, bins: int = 10) -> list[dict[str, float | int]]:
    """Equal-width bins over [0, 1]: mean probability (`confidence`) and share of positives (`accuracy`).

    Empty bins are left out.
    """
    y, p = _binary(labels), finite_array(probabilities)
    index = np.minimum((p * bins).astype(int), bins - 1)
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "confidence": float(p[index == b].mean()),
            "accuracy": float(y[index == b].mean()),
            "count": int((index == b).sum()),
        }
        for b in range(bins)
        if (index == b).any()
    ]


def temperature(labels: Labels, logits: Values) -> float:
    """The T with the least log-loss of sigmoid(logit / T) (Guo et al. 2017); fit it on other data."""
    return fit_temperature(finite_array(logits) * (2 * _binary(labels) - 1))


def calibrated(logits: Values, at: float) -> np.ndarray:
    """sigmoid(logit / T), shape (n,)."""
    return np.asarray(expit(finite_array(logits) / at))


def multiclass_report(labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
    """Verdicts among any number of classes, for example a judge's against the people's majority.

    Returns `n`, `classes` (sorted), `confusion` (rows true, columns predicted), `per_class` precision,
    recall, f1 and support, `accuracy`, `balanced_accuracy`, `macro_f1`, `weighted_f1`, `mcc`. A class never
    predicted has precision 0.
    """
    truth, said = np.asarray(labels), np.asarray(predictions)
    if truth.ndim != 1 or truth.shape != said.shape or truth.size == 0:
        raise ValueError(f"labels and predictions need one shape (n,), got {truth.shape} and {said.shape}")
    classes = np.unique(np.concatenate([truth, said]))
    each = metrics.precision_recall_fscore_support(truth, said, labels=classes, zero_division=0)
    present = np.unique(truth)
    recalls = each[1][np.isin(classes, present)]
    return {
        "n": int(truth.size),
        "classes": classes.tolist(),
        "confusion": metrics.confusion_matrix(truth, said, labels=classes).tolist(),
        "per_class": {
            str(name): {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(count)}
            for name, p, r, f, count in zip(classes.tolist(), *each, strict=True)
        },
        "accuracy": float(metrics.accuracy_score(truth, said)),
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": float(each[2].mean()),
        "weighted_f1": float(np.average(each[2], weights=each[3])),
        "mcc": float(metrics.matthews_corrcoef(truth, said)),
    }


def _binary(labels: Labels) -> np.ndarray:
    y = finite_array(np.asarray(labels, dtype=np.float64))
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels are 0 and 1")
    return y
