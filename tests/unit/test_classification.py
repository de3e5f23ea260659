"""Classifier metrics, against sklearn and hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from eval.classification import (
    binary_report,
    calibrated,
    multiclass_report,
    probability_report,
    reliability,
    temperature,
)


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.15).astype(int)
    return labels, np.round(rng.normal(labels * 1.2 - 0.5, 1.0), 2) + 0.001


def test_every_metric_equals_sklearns(scored) -> None:
    labels, scores = scored
    found, said = binary_report(labels, scores), scores > 0
    oracle = {
        "accuracy": metrics.accuracy_score(labels, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, said),
        "precision": metrics.precision_score(labels, said),
        "recall": metrics.recall_score(labels, said),
        "specificity": metrics.recall_score(labels, said, pos_label=0),
        "f1": metrics.f1_score(labels, said),
        "mcc": metrics.matthews_corrcoef(labels, said),
        "auc_roc": metrics.roc_auc_score(labels, scores),
        "average_precision": metrics.average_precision_score(labels, scores),
    }
    assert {name: found[name] for name in oracle} == pytest.approx(oracle, abs=1e-9)
    tn, fp, fn, tp = metrics.confusion_matrix(labels, said).ravel()
    assert found["confusion"] == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def test_weights_equal_sklearns(scored) -> None:
    labels, scores = scored
    weights = np.random.default_rng(1).random(400)
    found = binary_report(labels, scores, 0.2, weights)
    assert found["f1"] == pytest.approx(
        metrics.f1_score(labels, scores > 0.2, sample_weight=weights), abs=1e-9
    )
    assert found["prevalence"] == pytest.approx(np.average(labels, weights=weights))


def test_a_score_at_the_threshold_is_half_a_verdict() -> None:
    found = binary_report([1, 1, 0, 0], [1, 0, 0, -1])
    assert found["confusion"] == {"tp": 1.5, "fp": 0.5, "fn": 0.5, "tn": 1.5}
    assert (found["at_threshold"], found["accuracy"], found["precision"]) == (2, 0.75, 0.75)


def test_what_is_not_defined_is_none() -> None:
    found = binary_report([1, 1], [-1, -2])
    undefined = ("precision", "specificity", "balanced_accuracy", "mcc", "auc_roc", "average_precision")
    assert all(found[name] is None for name in undefined)
    assert (found["recall"], found["f1"]) == (0, 0)


def test_probabilities_against_sklearn_and_by_hand(scored) -> None:
    labels, scores = scored
    p = calibrated(scores, 2.0)
    found = probability_report(labels, p)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(labels, p), abs=1e-9)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, p), abs=1e-9)
    # Two bins of two: 0.9 against 1/2 and 0.2 against 0, both with half of the weight.
    assert probability_report([1, 0, 0, 0], [0.9, 0.9, 0.2, 0.2])["ece"] == pytest.approx(0.3)
    (row,) = reliability([1, 0], [1.0, 1.0])
    assert (row["low"], row["count"], row["accuracy"]) == (0.9, 2, 0.5)


def test_temperature_of_one_bin() -> None:
    # Logits 1 with 3 of 4 right: sigmoid(1 / T) = 0.75.
    assert temperature([1, 1, 1, 0], [1, 1, 1, 1]) == pytest.approx(1 / math.log(3), rel=1e-4)
    assert temperature([0, 0, 0, 1], [-1, -1, -1, -1]) == pytest.approx(1 / math.log(3), rel=1e-4)


def test_multiclass_equals_sklearn() -> None:
    rng = np.random.default_rng(2)
    truth = rng.choice(["tie", "first", "second"], p=[0.1, 0.4, 0.5], size=300)
    said = np.where(rng.random(300) < 0.7, truth, rng.permutation(truth))
    found = multiclass_report(truth, said)
    assert found["classes"] == ["first", "second", "tie"]
    assert found["confusion"] == metrics.confusion_matrix(truth, said).tolist()
    oracle = {
        "accuracy": metrics.accuracy_score(truth, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, said),
        "macro_f1": metrics.f1_score(truth, said, average="macro"),
        "weighted_f1": metrics.f1_score(truth, said, average="weighted"),
        "mcc": metrics.matthews_corrcoef(truth, said),
    }
    assert {name: found[name] for name in oracle} == pytest.approx(oracle, abs=1e-9)
    assert found["per_class"]["tie"]["support"] == (truth == "tie").sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_report([0, 2], [1, 1]), "labels are 0 and 1"),
        (lambda: binary_report([0, 1], [1]), "2 labels but 1 scores"),
        (lambda: probability_report([0], [1.2]), "1.2"),
        (lambda: multiclass_report([0, 1], [0]), "one shape"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
