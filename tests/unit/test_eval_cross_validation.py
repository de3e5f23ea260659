"""Out-of-fold accuracy of a reward model, from the file its stage leaves."""

from __future__ import annotations

import json

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
    assert report["baselines"]["shorter_wins"]["accuracy"]["value"] == 0.0


def test_no_folds_no_report(tmp_path, preference_data):
    assert cross_validation(tmp_path, preference_data, Settings()) is None


def test_folds_of_another_dataset_are_not_reported(reward_run, write_dataset, make_rows, tmp_path):
    other = write_dataset(tmp_path / "other", "preference", make_rows["preference"](3, 1), [])
    assert cross_validation(reward_run, other, Settings()) is None
