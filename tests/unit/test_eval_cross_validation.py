"""Out-of-fold accuracy of a reward model, from the file its stage leaves."""

from __future__ import annotations

import json
import math

import pytest

from eval.cross_validation import cross_validation
from eval.rm_report import Settings


@pytest.fixture
def reward_run(tmp_path, preference_data):
    """Scores that get every pair right but the first, which ties."""
    from data_prep.dataset import read_split

    rows = read_split(preference_data, "train", "preference").to_list()
    lines = [
        {"id": row["id"], "group": row["group"], "fold": i % 5, "chosen": float(i > 0), "rejected": 0.0}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "folds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_accuracy_counts_a_tie_as_half(reward_run, preference_data):
    report = cross_validation(reward_run, preference_data, Settings())
    assert report["folds"] == 5
    assert report["ties"] == 1
    assert report["accuracy"]["value"] == pytest.approx((report["pairs"] - 0.5) / report["pairs"])
    assert set(report["baselines"]) == {"shorter_wins", "tfidf_bradley_terry"}
    shorter = report["baselines"]["shorter_wins"]
    assert shorter["accuracy"]["value"] == 0.0
    assert shorter["gain"]["value"] == pytest.approx(report["accuracy"]["value"])
    assert shorter["gain"]["low"] <= shorter["gain"]["value"] <= shorter["gain"]["high"]


def test_calibration_of_each_fold_comes_from_the_others(tmp_path, preference_data):
    """Margins of 4 in one fold, of 1 in the other, 3 of 4 right in both: neither's temperature suits both."""
    from data_prep.dataset import read_split

    rows = read_split(preference_data, "train", "preference").to_list()
    lines = [
        {
            "id": row["id"],
            "group": row["group"],
            "fold": int(i >= len(rows) // 2),
            "chosen": (1.0 if i % 4 else -1.0) * (4 if i < len(rows) // 2 else 1),
            "rejected": 0.0,
        }
        for i, row in enumerate(rows)
    ]
    (tmp_path / "folds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = cross_validation(tmp_path, preference_data, Settings())
    mine, other = 4 / math.log(3), 1 / math.log(3)
    assert report["after"]["temperature"] == pytest.approx((mine + other) / 2, rel=1e-3)
    confidence = 1 / (1 + math.exp(-4 / other))
    assert report["after"]["bins"][-1]["confidence"] == pytest.approx(confidence, rel=1e-3)


def test_no_folds_no_report(tmp_path, preference_data):
    assert cross_validation(tmp_path, preference_data, Settings()) is None


def test_folds_of_another_dataset_are_not_reported(reward_run, write_dataset, make_rows, tmp_path):
    other = write_dataset(tmp_path / "other", "preference", make_rows["preference"](3, 1), [])
    assert cross_validation(reward_run, other, Settings()) is None
