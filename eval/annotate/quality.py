"""What the votes say about the items, the annotators and the models: `posttrain annotate report`, and /admin.

Labels of agreement are first, second, tie and both_bad. Which answer of an item is the first was drawn, so no
label is more frequent because a model is better. Gold checks count for an annotator's accuracy, nowhere else.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from data_prep.records import excerpt
from eval.agreement import UndefinedAgreement, cohen_kappa, fleiss_kappa, krippendorff_alpha
from eval.annotate.database import Database, Row, Session
from eval.annotate.store import Study
from eval.annotate.votes import standing_votes
from eval.statistics.proportions import wilson_interval
from eval.win_rate import counted_win_rate
from posttrain.hashing import hash_json

LABELS = ("first", "second", "tie", "both_bad")
SHOWN_DISAGREEMENTS = 50
MIN_COMMON = 2
"""Items that two annotators must have in common for a kappa."""


def report(database: Database, study: Study) -> dict[str, Any]:
    """Everything, as JSON values."""
    with database.reading() as session:
        votes = standing_votes(session, study)
        counts = _counts(session, study)
        people = session.run(
            "SELECT a.name, a.revoked, (SELECT COUNT(*) FROM assignments s WHERE s.annotator = a.id AND "
            "s.state = 'skipped') AS skipped FROM annotators a WHERE a.study = :study "
            "AND a.role = 'annotator'",
            study=study.id,
        )
    regular = [vote for vote in votes if not vote["is_gold"]]
    by_item: dict[str, list[Row]] = defaultdict(list)
    for vote in regular:
        by_item[vote["item"]].append(vote)
    return {
        "study": study.config.name,
        "progress": counts | {"votes": len(regular), "gold_votes": len(votes) - len(regular)},
        "choices": dict(sorted(Counter(vote["choice"] for vote in regular).items())),
        "agreement": _agreement(by_item),
        "annotators": [
            _annotator(person, votes, by_item) for person in sorted(people, key=lambda row: str(row["name"]))
        ],
        "models": _models(regular),
        "disagreements": _disagreements(by_item),
    }


def _counts(session: Session, study: Study) -> dict[str, Any]:
    (row,) = session.run(
        "SELECT (SELECT COUNT(*) FROM items WHERE study = :study AND is_gold = 0) AS items, "
        "(SELECT COUNT(*) FROM items WHERE study = :study AND is_gold = 1) AS gold_items, "
        "(SELECT COUNT(*) FROM votes v JOIN assignments s ON s.id = v.assignment JOIN items i ON "
        "i.id = s.item WHERE i.study = :study AND v.withdrawn IS NOT NULL) AS withdrawn, "
        "(SELECT COUNT(*) FROM items i WHERE i.study = :study AND i.is_gold = 0 AND (SELECT COUNT(*) FROM "
        "assignments s WHERE s.item = i.id AND s.state = 'voted') >= :overlap) AS complete",
        study=study.id,
        overlap=study.config.overlap,
    )
    skipped = session.run(
        "SELECT s.skip_reason AS reason, COUNT(*) AS n FROM assignments s JOIN items i ON i.id = s.item "
        "WHERE i.study = :study AND s.state = 'skipped' GROUP BY s.skip_reason",
        study=study.id,
    )
    wanted = row["items"] * study.config.overlap
    return {**row, "wanted": wanted, "skipped": {r["reason"]: r["n"] for r in sorted(skipped, key=str)}}


def _agreement(by_item: dict[str, list[Row]]) -> dict[str, Any]:
    names = sorted({vote["annotator"] for votes in by_item.values() for vote in votes})
    table = np.full((len(by_item), len(names)), np.nan)
    for number, votes in enumerate(by_item.values()):
        for vote in votes:
            table[number, names.index(vote["annotator"])] = LABELS.index(vote["preferred"])
    pairs: list[dict[str, Any]] = []
    for i, j in itertools.combinations(range(len(names)), 2):
        both = ~np.isnan(table[:, i]) & ~np.isnan(table[:, j])
        if both.sum() >= MIN_COMMON:
            kappa = _defined(cohen_kappa, table[both, i].astype(int), table[both, j].astype(int))
            pairs.append({"annotators": [names[i], names[j]], "items": int(both.sum()), "kappa": kappa})
    ratings = (~np.isnan(table)).sum(axis=1) if names else np.zeros(0, dtype=int)
    several = Counter(int(n) for n in ratings if n >= 2)
    fleiss = None
    if several:
        m = max(several, key=lambda n: (several[n], n))
        rows = table[ratings == m]
        counts = np.stack([(rows == label).sum(axis=1) for label in range(len(LABELS))], axis=1)
        found = _defined(fleiss_kappa, counts)
        fleiss = None if found is None else {**found, "ratings_per_item": m}
    kappas = [pair["kappa"]["value"] for pair in pairs if pair["kappa"] is not None]
    return {
        "cohen": {"mean": statistics.fmean(kappas) if kappas else None, "pairs": pairs},
        "fleiss": fleiss,
        "krippendorff": _defined(krippendorff_alpha, table) if several else None,
    }


def _defined(statistic: Any, *arguments: Any) -> dict[str, Any] | None:
    """The statistic as a dictionary; None where all ratings are equal, which says nothing about chance."""
    try:
        found: dict[str, Any] = statistic(*arguments).as_dict()
    except UndefinedAgreement:
        return None
    return found


def _annotator(person: Row, votes: list[Row], by_item: dict[str, list[Row]]) -> dict[str, Any]:
    mine = [vote for vote in votes if vote["annotator"] == person["name"]]
    gold = [vote["preferred"] == vote["gold"] for vote in mine if vote["is_gold"]]
    sided = [vote["choice"] == "a" for vote in mine if vote["choice"] in ("a", "b")]
    same = [
        vote["preferred"] == other["preferred"]
        for vote in mine
        if not vote["is_gold"]
        for other in by_item[vote["item"]]
        if other["annotator"] != person["name"]
    ]
    return {
        "name": person["name"],
        "revoked": person["revoked"] is not None,
        "votes": len(mine),
        "skipped": person["skipped"],
        "gold": _share(gold),
        "with_others": statistics.fmean(same) if same else None,
        "compared_votes": len(same),
        "median_seconds": statistics.median(vote["seconds"] for vote in mine) if mine else None,
        "chose_a": _share(sided),
    }


def _share(outcomes: list[bool]) -> dict[str, Any] | None:
    return wilson_interval(sum(outcomes), len(outcomes)).as_dict() if outcomes else None


def _models(votes: list[Row]) -> list[dict[str, Any]]:
    """Win rates of the model whose name comes first over the other; ties, both bad too, are half a win."""
    outcomes: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for vote in votes:
        models = (str(vote["first_model"]), str(vote["second_model"]))
        pair = (min(models), max(models))
        won = {"first": models[0], "second": models[1]}.get(vote["preferred"])
        value = 0.5 if won is None else float(won == pair[0])
        outcomes[pair].append((value, hash_json(vote["prompt"])))
    return [
        {"model": a, "against": b, **counted_win_rate([v for v, _ in found], [p for _, p in found]).as_dict()}
        for (a, b), found in sorted(outcomes.items())
    ]


def _disagreements(by_item: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """Items on which annotators differ, the most divided first: by the largest share of one label."""
    found = []
    for name, votes in by_item.items():
        models = {"first": str(votes[0]["first_model"]), "second": str(votes[0]["second_model"])}
        given = {vote["annotator"]: models.get(vote["preferred"], vote["preferred"]) for vote in votes}
        labels = Counter(given.values())
        if len(labels) > 1:
            found.append(
                {
                    "item": name,
                    "prompt": excerpt(votes[0]["prompt"][-1]["content"], 100),
                    "votes": dict(sorted(labels.items())),
                    "annotators": given,
                    "comments": [vote["comment"] for vote in votes if vote["comment"]],
                    "largest_share": max(labels.values()) / len(votes),
                }
            )
    return sorted(found, key=lambda row: (row["largest_share"], row["item"]))[:SHOWN_DISAGREEMENTS]
