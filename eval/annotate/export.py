"""Votes as preferences for `reward` and `dpo`: one row per pair of answers that a majority decides.

`prefs.jsonl` is a file that the curate stage reads, with its lineage beside it. A name without .jsonl is a
data set directory as well, curated from that file: what `reward` and `dpo` take as `data`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.config import CurateConfig, SplitConfig
from data_prep.formats import FORMATS
from data_prep.records import InvalidRecord
from eval.annotate.database import Database, Row, shown
from eval.annotate.store import Study
from eval.annotate.votes import as_seen, standing_votes
from posttrain import __version__
from posttrain.errors import DataError, UserError
from posttrain.hashing import hash_file, hash_json
from posttrain.rundir import atomic_write_json, atomic_write_text

LINEAGE_VERSION = 1
EVAL_FRACTION = SplitConfig().eval_fraction
"""Share of the groups of prompts that are held out, where nothing else is said."""
META = ("votes", "models", "annotators", "agreement")


@dataclass
class Preferences:
    """Rows, and what is known about them. left_out: votes by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def preferences(votes: list[Row], min_votes: int = 1, min_gold_accuracy: float = 0.0) -> Preferences:
    """One preference per item that a majority of its deciding votes decides; ties decide nothing.

    min_gold_accuracy: votes of annotators who answered fewer of their gold checks correctly do not count.
    Every vote is in one row's votes for `chosen`, or in left_out.
    """
    found = Preferences(counts=Counter(votes=len(votes)))
    careless = _careless(votes, min_gold_accuracy)
    items: dict[str, list[Row]] = defaultdict(list)
    for vote in votes:
        if vote["is_gold"]:
            found.left_out["gold_check"] += 1
        elif vote["annotator"] in careless:
            found.left_out["gold_accuracy"] += 1
        else:
            items[vote["item"]].append(vote)
    for name, given in items.items():
        _decide(name, given, min_votes, found)
    return found


def _careless(votes: list[Row], min_gold_accuracy: float) -> set[str]:
    gold: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        if vote["is_gold"]:
            gold[vote["annotator"]].append(vote["preferred"] == vote["gold"])
    return {name for name, right in gold.items() if statistics.fmean(right) < min_gold_accuracy}


def _decide(name: str, given: list[Row], min_votes: int, found: Preferences) -> None:
    found.counts["items"] += 1
    labels = Counter(vote["preferred"] for vote in given)
    for label in ("tie", "both_bad"):
        found.left_out[label] += labels[label]
    won, lost = max(labels["first"], labels["second"]), min(labels["first"], labels["second"])
    if won == lost:
        found.left_out["undecided"] += won + lost
        return
    if won + lost < min_votes:
        found.left_out["too_few_votes"] += won + lost
        return
    chosen, rejected = ("first", "second") if labels["first"] > labels["second"] else ("second", "first")
    vote = given[0]
    row = {
        "id": name,
        "prompt": vote["prompt"],
        "chosen": [{"role": "assistant", "content": vote[f"{chosen}_answer"]}],
        "rejected": [{"role": "assistant", "content": vote[f"{rejected}_answer"]}],
        "votes": {"chosen": won, "rejected": lost, "tie": labels["tie"], "both_bad": labels["both_bad"]},
        "models": {"chosen": vote[f"{chosen}_model"], "rejected": vote[f"{rejected}_model"]},
        "annotators": sorted(vote["annotator"] for vote in given),
        "agreement": won / len(given),
    }
    try:
        FORMATS["preference"].parse(row)
    except InvalidRecord as error:
        found.left_out[error.reason] += won + lost
        return
    found.rows.append(row)
    found.left_out["outvoted"] += lost


def export(
    database: Database,
    study: Study,
    output: Path,
    *,
    min_votes: int = 1,
    min_gold_accuracy: float = 0.0,
    eval_fraction: float = EVAL_FRACTION,
) -> dict[str, Any]:
    """Write the preferences and their lineage, which is returned; curated too unless `output` is a .jsonl.

    Raises UserError for the path, DataError where no vote makes a row, or the split leaves a side empty.
    """
    file = output if output.name.endswith(".jsonl") else output.with_name(f"{output.name}.jsonl")
    if not file.parent.is_dir():
        raise UserError(f"{output}: there is no directory {file.parent}\n    make it first")
    with database.reading() as session:
        votes = standing_votes(session, study)
    found = preferences(votes, min_votes, min_gold_accuracy)
    if not found.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted((+found.left_out).items()))
        raise DataError(
            f"{shown(database.url)}: of {len(votes)} votes none makes a row ({reasons or 'nothing voted'})\n"
            "    collect more with `posttrain annotate serve`"
        )
    # What the database keeps for its owner only stays so.
    atomic_write_text(file, as_text(found.rows), 0o600)
    lineage = {
        "schema": LINEAGE_VERSION,
        "posttrain": __version__,
        "source": {
            "database": shown(database.url),
            "study": study.config.name,
            "items": study.source,
            "votes": len(votes),
            "sha256": hash_json(votes),
            "first": _iso(min(vote["time"] for vote in votes)),
            "last": _iso(max(vote["time"] for vote in votes)),
        },
        "min_votes": min_votes,
        "min_gold_accuracy": min_gold_accuracy,
        "counts": dict(sorted(found.counts.items())),
        "left_out": dict(sorted((+found.left_out).items())),
        "output": {"file": file.name, "rows": len(found.rows), "sha256": hash_file(file)},
    }
    atomic_write_json(file.with_name(file.name.removesuffix(".jsonl") + ".lineage.json"), lineage)
    if file != output:
        _curate(file, output, study, eval_fraction)
    return lineage


def flat_votes(votes: list[Row], min_gold_accuracy: float = 0.0) -> tuple[list[dict[str, Any]], Counter[str]]:
    """One row a vote, as the judge `kind: votes` reads them, and how many votes are none, by reason.

    model_a is what stood left, as A; choice (a, b, tie, both_bad) and criteria (a, same, b) go by that.
    time: of the vote, in UTC; seconds: from showing the item until then. Gold checks are not among them.
    """
    careless = _careless(votes, min_gold_accuracy)
    left_out: Counter[str] = Counter()
    rows = []
    for vote in votes:
        if vote["is_gold"] or vote["annotator"] in careless:
            left_out["gold_check" if vote["is_gold"] else "gold_accuracy"] += 1
            continue
        models = vote["first_model"], vote["second_model"]
        ratings = sorted(vote["ratings"].items())
        rows.append(
            {
                "id": vote["item"],
                "prompt": vote["prompt"],
                "model_a": models[vote["swapped"]],
                "model_b": models[1 - vote["swapped"]],
                "choice": vote["choice"],
                "annotator": vote["annotator"],
                "comment": vote["comment"],
                "criteria": {name: as_seen(value, vote["swapped"]) for name, value in ratings},
                "time": _iso(vote["time"]),
                "seconds": vote["seconds"],
            }
        )
    return rows, left_out


def export_votes(
    database: Database, study: Study, file: Path, min_gold_accuracy: float = 0.0
) -> tuple[int, Counter[str]]:
    """Write `flat_votes` as JSON lines; how many, and who was left out. Raises UserError, DataError."""
    if not file.name.endswith(".jsonl") or not file.parent.is_dir():
        raise UserError(f"--votes {file}: must be a .jsonl file in a directory that is there")
    with database.reading() as session:
        rows, left_out = flat_votes(standing_votes(session, study), min_gold_accuracy)
    if not rows:
        raise DataError(
            f"{shown(database.url)}: holds no vote to export\n    collect some:  `posttrain annotate serve`"
        )
    atomic_write_text(file, as_text(rows), 0o600)
    return len(rows), left_out


def as_text(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def file_name(study: Study) -> str:
    """What a download of the study is called."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", study.config.name) + ".jsonl"


def _curate(file: Path, output: Path, study: Study, eval_fraction: float) -> None:
    from posttrain.stage import execute_stage

    source = {
        "path": str(file),
        "format": "preference",
        "id_column": "id",
        "name": study.config.name,
        "meta_columns": list(META),
    }
    config = CurateConfig.model_validate(
        {"kind": "preference", "sources": [source], "split": {"eval_fraction": eval_fraction}}
    )
    try:
        execute_stage("curate", config, output)
    except DataError as error:
        raise DataError(
            f"{error}\n    split.eval_fraction is --eval-fraction here; the pairs themselves are in {file}"
        ) from error


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
