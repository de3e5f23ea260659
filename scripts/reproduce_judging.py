"""Figures of docs/judging.md: length control against AlpacaEval, judges against the people of PandaLM.

    python scripts/reproduce_judging.py --alpaca DIR --pandalm DIR [--output FILE.json]

DIR of AlpacaEval: preferences.parquet (instruction_sha1, generator_2, len_1, len_2, preference from 1, the
baseline, to 2) and leaderboard.csv. DIR of PandaLM: the repository's data/ with the test set and the verdicts
of two judges. Neither is part of this repository.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.special import expit
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from eval.agreement import cohen_kappa
from eval.judging.length_control import PENALTY, fit

PENALTIES = (0.0, 0.001, 0.003, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.03, 0.05)
ALPACA = ("preferences.parquet", "leaderboard.csv")
PANDALM = ("testset-v1.json", "gpt-3.5-turbo-testset-v1.json", "pandalm-7b-testset-v1.json")
ANNOTATORS = ("annotator1", "annotator2", "annotator3")


def length_control(directory: Path) -> dict[str, Any]:
    """Mean absolute distance to the official length-controlled rates, in points, by penalty and method."""
    rows = pq.read_table(directory / "preferences.parquet").to_pylist()
    with (directory / "leaderboard.csv").open(newline="") as stream:
        board = list(csv.DictReader(stream))
    name_column = next(iter(board[0]))
    official = {
        row[name_column]: float(row["length_controlled_winrate"])
        for row in board
        if row["length_controlled_winrate"]
    }
    models = sorted({row["generator_2"] for row in rows} & set(official))
    raw, errors = [], np.zeros((len(models), len(PENALTIES)))
    for i, model in enumerate(models):
        mine = [row for row in rows if row["generator_2"] == model]
        outcomes = np.array([row["preference"] - 1 for row in mine])
        lengths = np.array([row["len_2"] - row["len_1"] for row in mine], dtype=np.float64)
        raw.append(abs(100 * outcomes.mean() - official[model]))
        for j, penalty in enumerate(PENALTIES):
            intercept, _ = fit(outcomes, np.tanh(lengths / lengths.std()), np.ones((1, len(mine))), penalty)
            errors[i, j] = abs(100 * expit(intercept[0]) - official[model])
    held_out = [errors[i, np.delete(errors, i, axis=0).mean(axis=0).argmin()] for i in range(len(models))]
    chosen = PENALTIES.index(PENALTY)
    return {
        "models": len(models),
        "raw": {"mae": float(np.mean(raw)), "largest": float(np.max(raw))},
        "no penalty": {"mae": float(errors[:, 0].mean()), "largest": float(errors[:, 0].max())},
        "ours": {"mae": float(errors[:, chosen].mean()), "largest": float(errors[:, chosen].max())},
        "ours, penalty chosen without the model": {
            "mae": float(np.mean(held_out)),
            "largest": float(np.max(held_out)),
        },
        "by penalty": dict(zip(map(str, PENALTIES), errors.mean(axis=0).tolist(), strict=True)),
    }


def pandalm(directory: Path) -> dict[str, Any]:
    """Verdicts (1, 2, 0 for a tie) against the majority of three people; unreadable ones are ties."""
    items = json.loads((directory / "testset-v1.json").read_text(encoding="utf-8"))
    people = []
    for item in items:
        label, count = Counter(item[name] for name in ANNOTATORS).most_common(1)[0]
        people.append(int(label) if count > 1 else 0)
    found: dict[str, Any] = {"items": len(items)}
    for judge, file, key in (
        ("gpt-3.5-turbo", "gpt-3.5-turbo-testset-v1.json", "gpt_result"),
        ("PandaLM-7B", "pandalm-7b-testset-v1.json", "pandalm_result"),
    ):
        verdicts = [row[key] for row in json.loads((directory / file).read_text(encoding="utf-8"))]
        labels = [int(verdict) if str(verdict) in ("1", "2") else 0 for verdict in verdicts]
        precision, recall, f1, _ = precision_recall_fscore_support(people, labels, average="macro")
        kappa = cohen_kappa(people, labels)
        found[judge] = {
            "accuracy": float(accuracy_score(people, labels)),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "kappa": [kappa.value, kappa.low, kappa.high],
            "unreadable": sum(str(verdict) not in ("0", "1", "2", "Tie") for verdict in verdicts),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alpaca", type=Path, help="AlpacaEval's preferences and leaderboard")
    parser.add_argument("--pandalm", type=Path, help="PandaLM's data")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for folder, names in ((arguments.alpaca, ALPACA), (arguments.pandalm, PANDALM)):
        absent = [name for name in names if folder is not None and not (folder / name).is_file()]
        if absent:
            parser.error(f"{folder} has no {', '.join(absent)}")
    if arguments.alpaca:
        figures["length control"] = length_control(arguments.alpaca)
    if arguments.pandalm:
        figures["pandalm"] = pandalm(arguments.pandalm)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
