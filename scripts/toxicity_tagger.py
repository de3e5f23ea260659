"""A toxicity tag for `posttrain drift --tag`: TF-IDF and logistic regression on labelled tweets.

    python scripts/toxicity_tagger.py --data hate_davidson/data/labeled_data.csv --output toxicity.joblib
    export POSTTRAIN_TOXICITY_MODEL=toxicity.joblib PYTHONPATH=scripts
    posttrain drift traffic.jsonl --reference baseline.json --tag toxic_request=toxicity_tagger:request
    (and the same --tag when the baseline is made)

The data: Davidson et al. 2017, Automated Hate Speech Detection and the Problem of Offensive Language; classes
0 hate and 1 offensive count as toxic. Prints accuracy, F1 and AUC on a held-out fifth. It knows the words of
those tweets: good for a share that is compared with itself, not for judging a single text.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import joblib
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline

from eval.classification import binary_report, multiclass_report

VARIABLE = "POSTTRAIN_TOXICITY_MODEL"


def train(path: Path) -> tuple[Pipeline, dict[str, float]]:
    """The tagger fitted on four fifths of the file (columns class and tweet), and its figures on the rest."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    texts, labels = [row["tweet"] for row in rows], [row["class"] != "2" for row in rows]
    fit_x, test_x, fit_y, test_y = train_test_split(
        texts, labels, test_size=0.2, random_state=0, stratify=labels
    )
    tagger = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=3, ngram_range=(1, 2)),
        LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
    ).fit(fit_x, fit_y)
    verdicts = multiclass_report(test_y, tagger.predict(test_x))
    shares = tagger.predict_proba(test_x)[:, 1]
    return tagger, {
        "rows": len(rows),
        "accuracy": verdicts["accuracy"],
        "f1_weighted": verdicts["weighted_f1"],
        "auc": binary_report(test_y, shares, threshold=0.5)["auc_roc"],
    }


@cache
def _tagger() -> Pipeline:
    return joblib.load(os.environ[VARIABLE])


def request(record: dict[str, Any]) -> bool:
    """Whether the last message is tagged."""
    return bool(_tagger().predict([record["messages"][-1]["content"]])[0])


def answer(record: dict[str, Any]) -> bool:
    """Whether the answer is tagged."""
    return bool(_tagger().predict([record["answer"] or ""])[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="labeled_data.csv")
    parser.add_argument("--output", type=Path, default=Path("toxicity.joblib"))
    arguments = parser.parse_args()
    tagger, figures = train(arguments.data)
    joblib.dump(tagger, arguments.output)
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
