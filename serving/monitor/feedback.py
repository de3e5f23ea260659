"""Votes and flagged samples of the monitoring database as data sets for training.

Votes become preferences (`dpo`, `reward`): one per prompt and pair of answers, decided by the majority of its
votes. Flagged samples become labelled answers (`kto`). Beside the rows goes `NAME.lineage.json`: where they
came from, what was left out, and a hash of the rows that were read.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.formats import FORMATS
from data_prep.records import InvalidRecord
from posttrain import __version__
from posttrain.errors import DataError, UserError
from posttrain.hashing import hash_file, hash_json
from posttrain.rundir import atomic_write_json, atomic_write_text
from serving.gateway.keys import ANONYMOUS as ANONYMOUS_KEY
from serving.monitor.database import connect_to_read

LINEAGE_VERSION = 1
ANONYMOUS = ANONYMOUS_KEY.name
LABELS = {"up": True, "down": False}
SAMPLE_TABLES = ("samples", "flagged_samples")
SAMPLE_COLUMNS = "request_id, time, model, version, messages, answer, flag, comment"


@dataclass
class Feedback:
    """Rows of a data set, and what is known about them. left_out: counts by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    read: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)


@dataclass
class Pair:
    """A prompt and two answers. votes: for each answer; versions: who gave it, as NAME@VERSION."""

    messages: list[dict[str, str]]
    votes: Counter[str] = field(default_factory=Counter)
    versions: dict[str, set[str]] = field(default_factory=dict)


def export(database: Path, output: Path, *, flagged: bool = False, min_votes: int = 1) -> dict[str, Any]:
    """Write the data set and its lineage; the lineage is returned.

    Raises UserError for what is wrong with the paths or the database, DataError where nothing can be learned
    from what it holds.
    """
    if not output.name.endswith(".jsonl"):
        raise UserError(f"{output}: is no .jsonl file\n    give --output a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise UserError(f"{output}: there is no directory {output.parent}\n    make it first")
    with _opened(database) as connection:
        found = flagged_samples(connection) if flagged else preferences(_votes(connection), min_votes)
    if not found.rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(found.left_out.items()))
        what = "flagged sample" if flagged else "vote"
        raise DataError(
            f"{database}: no {what} makes a row ({len(found.read)} read{'; ' + reasons if reasons else ''})\n"
            "    collect more, with " + ("POST /v1/feedback" if flagged else "the web page or POST /v1/votes")
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    # What the database keeps for its owner only stays so.
    atomic_write_text(output, text, 0o600)
    lineage = _lineage(database, output, found, flagged, min_votes)
    atomic_write_json(lineage_path(output), lineage)
    return lineage


def lineage_path(output: Path) -> Path:
    """Where the lineage of a data set is."""
    return output.with_name(output.name.removesuffix(".jsonl") + ".lineage.json")


def preferences(votes: Iterable[dict[str, Any]], min_votes: int = 1) -> Feedback:
    """One preference per prompt and pair of answers that a majority decides.

    Of a key that voted twice on a pair only the last vote counts; `anonymous` is everybody, so all of its
    votes do. Ties and `both_bad` decide nothing. Pairs with as many votes for one answer as for the other, or
    with fewer than `min_votes`, are left out. Every vote is in one row's votes for `chosen`, or in left_out.
    """
    found = Feedback()
    pairs: dict[str, Pair] = {}
    last: dict[tuple[str, str], str] = {}
    for vote in votes:
        found.read.append(vote)
        found.counts["votes"] += 1
        messages = json.loads(vote["messages"])
        answers = [vote["answer_a"], vote["answer_b"]]
        name = hash_json([messages, sorted(answers)])
        pair = pairs.setdefault(name, Pair(messages))
        for letter, answer in zip("ab", answers, strict=True):
            pair.versions.setdefault(answer, set()).add(str(vote[f"version_{letter}"]))
        decided = vote["choice"] in ("a", "b")
        if not decided:
            found.left_out[str(vote["choice"])] += 1
        preferred = answers["ab".index(vote["choice"])] if decided else None
        _count(pair, last, (name, vote["key"]), preferred, found.left_out)
    for pair in pairs.values():
        _decide(pair, min_votes, found)
    return found


def _count(
    pair: Pair,
    last: dict[tuple[str, str], str],
    voter: tuple[str, str],
    answer: str | None,
    left_out: Counter[str],
) -> None:
    """Count a vote for an answer, or for none, in place of what the same key said of the pair before."""
    if voter[1] != ANONYMOUS:
        before = last.pop(voter, None)
        if before is not None:
            left_out["repeated" if before == answer else "changed"] += 1
            pair.votes[before] -= 1
        if answer is not None:
            last[voter] = answer
    if answer is not None:
        pair.votes[answer] += 1


def _decide(pair: Pair, min_votes: int, found: Feedback) -> None:
    """Make a row of a pair, or count why not. found.left_out counts votes here, found.counts pairs."""
    found.counts["pairs"] += 1
    answers = sorted(pair.versions, key=lambda answer: (-pair.votes[answer], answer))
    total = sum(pair.votes.values())
    if len(answers) != 2:
        found.left_out["identical_answers"] += total
        return
    chosen, rejected = answers
    won, lost = pair.votes[chosen], pair.votes[rejected]
    if lost:
        found.counts["contradictory_pairs"] += 1
    if not total:
        return
    if won == lost:
        found.left_out["undecided"] += total
        return
    if total < min_votes:
        found.left_out["too_few_votes"] += total
        return
    row = {
        "prompt": pair.messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "votes": {"chosen": won, "rejected": lost},
        "versions": {"chosen": sorted(pair.versions[chosen]), "rejected": sorted(pair.versions[rejected])},
    }
    if _valid(row, "preference", found.left_out, total):
        found.rows.append(row)
        found.left_out["outvoted"] += lost
        for answer in answers:
            found.versions.update(pair.versions[answer])


def flagged_samples(connection: sqlite3.Connection) -> Feedback:
    """The samples that a client called good or bad, as labelled answers. Raises UserError: no such table."""
    found = Feedback()
    for table in SAMPLE_TABLES:
        query = f"SELECT {SAMPLE_COLUMNS} FROM {table} WHERE flag IS NOT NULL ORDER BY time, request_id"
        for sample in _read(connection, query, "set monitoring.samples of the gateway, and ask it something"):
            found.read.append(sample)
            found.counts["flagged"] += 1
            if sample["flag"] not in LABELS:
                found.left_out["other_flag"] += 1
                continue
            version = f"{sample['model']}@{sample['version']}"
            row = {
                "prompt": json.loads(sample["messages"]),
                "completion": [{"role": "assistant", "content": sample["answer"]}],
                "label": LABELS[sample["flag"]],
                "version": version,
                "comment": sample["comment"],
            }
            if _valid(row, "unpaired_preference", found.left_out, 1):
                found.rows.append(row)
                found.versions[version] += 1
                found.counts[sample["flag"]] += 1
    return found


def _valid(row: dict[str, Any], form: str, left_out: Counter[str], weight: int) -> bool:
    """Whether the curate stage takes the row."""
    try:
        FORMATS[form].parse(row)
    except InvalidRecord as error:
        left_out[error.reason] += weight
        return False
    return True


def _votes(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    query = "SELECT * FROM votes ORDER BY time, id"
    return _read(connection, query, "nobody has voted yet: open the gateway's web page")


def _read(connection: sqlite3.Connection, query: str, remedy: str) -> list[dict[str, Any]]:
    try:
        return [dict(row) for row in connection.execute(query)]
    except sqlite3.DatabaseError as error:
        place = (
            connection.execute("PRAGMA database_list").fetchone()[2] if "no such table" in str(error) else ""
        )
        raise UserError(f"{place or 'the database'}: cannot be read ({error})\n    {remedy}") from error


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads. Raises UserError."""
    if not database.is_file():
        raise UserError(
            f"{database}: no such file\n"
            "    name the file of `monitoring.database` in the gateway's configuration"
        )
    connection = connect_to_read(database)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
        yield connection
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{database}: cannot be read as an SQLite database ({error})\n"
            "    name the file of `monitoring.database` in the gateway's configuration"
        ) from error
    finally:
        connection.close()


def _lineage(database: Path, output: Path, found: Feedback, flagged: bool, min_votes: int) -> dict[str, Any]:
    times = [row["time"] for row in found.read]
    return {
        "schema": LINEAGE_VERSION,
        "posttrain": __version__,
        "source": {
            "database": str(database.resolve()),
            "tables": list(SAMPLE_TABLES) if flagged else ["votes"],
            "rows": len(found.read),
            "sha256": hash_json(found.read),
            "first": _iso(min(times)),
            "last": _iso(max(times)),
        },
        "min_votes": None if flagged else min_votes,
        "counts": dict(sorted(found.counts.items())),
        "left_out": dict(sorted((+found.left_out).items())),
        "versions": dict(sorted(found.versions.items())),
        "output": {"file": output.name, "rows": len(found.rows), "sha256": hash_file(output)},
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
