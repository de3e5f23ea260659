"""Operations and the engine: ledgers, any order, borders between batches and processes, the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.config import CurateConfig
from data_prep.dataset import SPLITS, to_row
from data_prep.operations.base import (
    VERDICT_SCHEMA,
    CorpusOperation,
    Decided,
    Dropped,
    MapOperation,
    Row,
    Stays,
    Views,
    tagged,
    verdict_of,
    verdict_table,
)
from data_prep.operations.build import Surroundings, build
from data_prep.operations.engine import Step
from data_prep.records import (
    ConversationRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)
from data_prep.sharded.arrow import row_schema, rows_of, table_of
from data_prep.sharded.groups import join_groups
from data_prep.sharded.store import read_table, write_table
from posttrain.errors import DataError
from tests.unit import chunked

ASK = "where is my order of the blue kettle that I placed on monday"


def row(record: Record, line: int = 1, **rest: Any) -> Row:
    return Row(
        replace(record, id=record.id or f"r{line}", group=record.group or f"g{line}"), "f", line, **rest
    )


def texts(*values: str) -> list[Row]:
    return [row(TextRecord(value), line) for line, value in enumerate(values, start=1)]


def pair(ask: str, chosen: str, rejected: str) -> PreferenceRecord:
    return PreferenceRecord(
        [Message("user", ask)], [Message("assistant", chosen)], [Message("assistant", rejected)]
    )


def config(*operations: dict[str, Any], kind: str = "text", **rest: Any) -> CurateConfig:
    block = {"kind": kind, "sources": [{"path": "f.jsonl"}], "operations": list(operations)}
    return CurateConfig.model_validate(block | rest)


def steps(*operations: dict[str, Any], by_cluster: bool = False, **paths: Path) -> list[Step]:
    def locate(field: str) -> Path:
        return paths[field.split(".")[2]]

    setting = config(*operations, kind="preference", sources=SOURCES)
    return build(setting.operations, Surroundings(locate, by_cluster=by_cluster))


def ran(rows: Sequence[Row], *operations: dict[str, Any]) -> chunked.Done:
    records = [row.record for row in rows]
    setting = config(*operations, kind=records[0].kind, sources=SOURCES, dedup=False)
    return chunked.curate(setting, records, steps(*operations))


def test_the_ledger_counts_and_shows_examples() -> None:
    done = ran(texts("a b", "A  b", "c", "a B", "a b"), {"op": "duplicates", "examples": 2})
    (ledger,) = done.ledgers
    said = ledger.as_json()
    assert (said["rows_in"], said["rows_out"], said["drops"]) == (5, 2, {"duplicate": 3})
    assert [example["at"] for example in said["examples"]["duplicate"]] == ["f:2", "f:4"]
    assert said["examples"]["duplicate"][0]["detail"] == "same content as f:1"
    assert [drop["line"] for drop in done.rejects] == [2, 4, 5]


def test_near_duplicates_keep_the_first_or_all() -> None:
    rows = texts(ASK, "something else entirely that nobody has ever asked", f"{ASK} please", ASK.upper())
    first = ran(rows, {"op": "near_duplicates"})
    assert first.lines() == [1, 2]
    assert "in one cluster with f:1" in first.rejects[0]["detail"]
    every = ran(rows, {"op": "near_duplicates", "keep": "all"})
    assert every.lines() == [1, 2, 3, 4]
    clusters = {row["source"]: '"cluster": "r1"' in row["meta"] for row in every.every}
    assert clusters == {"f:1": True, "f:2": False, "f:3": True, "f:4": True}
    assert every.ledgers[0].facts == {
        "clusters": 1, "rows_in_clusters": 3, "largest_cluster": 3, "pairs_compared": 2,
            "cluster_sizes": {"3": 1}, "largest_clusters": [{"first": "f:1", "rows": 3}],
    }  # fmt: skip


@pytest.mark.parametrize(("part", "left"), [("prompt", [1, 3]), ("answer", [1, 2]), ("whole", [1, 2, 3])])
def test_the_part_that_is_compared(part: str, left: list[int]) -> None:
    other = "how do I return a kettle that does not work any longer"
    long, longer = (
        "it ships on monday from our warehouse in the north",
        "we are sorry to hear that, please send it",
    )
    pairs = [pair(ASK, long, "no"), pair(ASK, longer, "yes"), pair(other, long, "no")]
    rows = [row(record, line) for line, record in enumerate(pairs, start=1)]
    done = ran(rows, {"op": "near_duplicates", "part": part, "threshold": 0.8})
    assert done.lines() == left


def test_ties_join_groups_and_order_does_not_matter(tmp_path: Path) -> None:
    rows = [
        row(TextRecord("a", group="g3"), 1, ties=("x",)),
        row(TextRecord("b", group="g2"), 2, ties=("x", "y")),
        row(TextRecord("c", group="g3"), 3),
        row(TextRecord("d", group="g9"), 4, ties=("y",)),
        row(TextRecord("e", group="g1"), 5),
    ]
    assert joined(tmp_path, rows) == ["g2", "g2", "g2", "g2", "g1"]
    assert joined(tmp_path, rows[::-1]) == ["g1", "g2", "g2", "g2", "g2"]


def joined(folder: Path, rows: Sequence[Row]) -> list[str]:
    """The groups after ties, two rows a chunk."""
    files, out = [], []
    for begin in range(0, len(rows), 2):
        files.append(folder / f"{begin}.rows")
        out.append(folder / f"{begin}.groups")
        out[-1].unlink(missing_ok=True)
        write_table(files[-1], table_of(rows[begin : begin + 2], "text"))
    join_groups(files, out)
    tables = [read_table(new if new.exists() else old) for old, new in zip(files, out, strict=True)]
    return [group for table in tables for group in table.column("group").to_pylist()]


def test_split_by_cluster_needs_clusters() -> None:
    config({"op": "near_duplicates", "keep": "all"}, split={"by": "cluster"})
    with pytest.raises(ValidationError, match="needs clusters"):
        config({"op": "duplicates"}, split={"by": "cluster"})
    with pytest.raises(ValidationError, match="near_duplicates"):
        config({"op": "near_duplicate"})


RECORDS = [
    TextRecord("a text", id="1", group="g", meta='{"tools": [1]}'),
    ConversationRecord([Message("system", "s"), Message("user", "u"), Message("assistant", "a")]),
    pair("u", "yes", "no"),
    UnpairedPreferenceRecord([Message("user", "u")], [Message("assistant", "a")], False),
    PromptRecord([Message("user", "u")]),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_rows_survive_the_way_through_arrow(record: Record) -> None:
    rows = [row(record, 3, source="mine", ties=("a", "b"), copy=2), row(tagged(record, x=[1]), 4)]
    table = table_of(rows, record.kind)
    assert table.equals(row_by_row(rows, record))
    assert rows_of(table, record.kind) == rows
    # Made again, which checks them: no record came out that cannot be trained on.
    assert [replace(at.record) for at in rows_of(table, record.kind)] == [at.record for at in rows]
    assert rows_of(table.slice(1), record.kind) == rows[1:]
    assert rows_of(table_of([], record.kind), record.kind) == []


def row_by_row(rows: Sequence[Row], record: Record) -> pa.Table:
    """The same table without any of the work column by column."""
    plain = [
        {
            **to_row(at.record),
            "file": at.file,
            "line": at.line,
            "name": at.source,
            "ties": list(at.ties),
            "copy": at.copy,
        }
        for at in rows
    ]
    return pa.Table.from_pylist(plain, schema=row_schema(record.kind))


WORDS = "order kettle refund where is my the a ships monday blue".split()
MAPS: list[dict[str, Any]] = [
    {"op": "unicode"},
    {"op": "language", "min_letters": 3, "keep": ["en"], "action": "drop"},
    {"op": "quality", "action": "drop", "rules": ["gopher_words_min", "c4_curly_bracket"]},
    {"op": "pii", "action": "redact"},
    {"op": "pii", "action": "drop", "types": ["EMAIL"]},
    {"op": "toxicity", "scorer": "tests.unit.test_operations:scores"},
]
ORDERED: list[dict[str, Any]] = [
    {"op": "duplicates"},
    {"op": "near_duplicates", "threshold": 0.5},
    {"op": "near_duplicates", "threshold": 0.4, "keep": "all", "part": "prompt"},
    {"op": "near_duplicates", "search": "exact", "part": "answer"},
    {"op": "preference_checks"},
    {"op": "mix", "weights": {"a.jsonl": 1}, "max_epochs": 2.5},
    {"op": "mix", "temperature": 3.0, "rows": 30, "max_epochs": 3.0, "quotas": {"b.jsonl": 4}},
]
sentences = st.lists(
    st.sampled_from([*WORDS, "\u200b", "ann@shop.example", "...", "{"]), min_size=1, max_size=6
)
asked = st.tuples(sentences, sentences, sentences).map(lambda parts: tuple(map(" ".join, parts)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(asked, min_size=1, max_size=25),
    order=st.permutations(ORDERED + MAPS),
    count=st.integers(1, 5),
    by=st.sampled_from(["group", "record", "cluster"]),
    dedup=st.booleans(),
    size=st.integers(1, 30),
)
def test_any_order_conserves_rows(
    rows: list[tuple[str, str, str]],
    order: list[dict[str, Any]],
    count: int,
    by: str,
    dedup: bool,
    size: int,
) -> None:
    """Whatever the operations and their order: in + repeated = out + drops, ids unique, splits disjoint."""
    chosen = order[:count]
    if by == "cluster" and not any(operation["op"] == "near_duplicates" for operation in chosen):
        chosen = [*chosen, {"op": "near_duplicates"}]
    block = {"by": by, "eval_fraction": 0.4}
    setting = config(*chosen, kind="preference", split=block, dedup=dedup, sources=SOURCES)
    kept = [(line, pair(*row)) for line, row in enumerate(rows) if usable(*row)]
    if not kept:
        return
    given = steps(*chosen, by_cluster=by == "cluster")
    places = [line % 2 for line, _ in kept]
    try:
        done = chunked.curate(setting, [record for _, record in kept], given, sources=places, chunk=size)
    except DataError:
        # What stands before it dropped all rows of the only source with a weight.
        assert any("weights" in operation for operation in chosen)
        return
    assert done.curated.conserved()
    assert done.curated.rows_in == len(kept)
    ids = [at["id"] for at in done.every]
    assert len(ids) == len(set(ids))
    held = {split: {at["group"] for at in done.rows[split]} for split in SPLITS}
    assert not held["train"] & held["eval"]
    assert done.curated.groups == {split: len(groups) for split, groups in held.items()}
    assert len(done.rejects) == done.curated.dropped().drops.total()
    left = len(kept) - done.curated.tallies[0].drops.total()
    for ledger in done.ledgers:
        assert ledger.tally.rows_in == left
        left = ledger.tally.rows_out


def usable(ask: str, one: str, other: str) -> bool:
    return one.split() != other.split() and all(map(str.strip, (ask, one, other)))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(asked, min_size=1, max_size=20), size=st.integers(1, 7), which=st.sampled_from(MAPS))
def test_map_operations_do_not_see_where_batches_begin(
    rows: list[tuple[str, str, str]], size: int, which: dict[str, Any]
) -> None:
    """One batch, or many that came through Arrow as between processes: the same verdicts."""
    whole = [
        row(pair(ask, one, other), line)
        for line, (ask, one, other) in enumerate(rows, start=1)
        if one.split() != other.split()
    ]
    (step,) = steps(which)
    (again,) = steps(which)
    assert isinstance(step.operation, MapOperation)
    assert isinstance(again.operation, MapOperation)
    parts = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
    travelled = [rows_of(table_of(part, "preference"), "preference") for part in parts]
    apart = [verdict for part in travelled for verdict in again.operation.apply(part)]
    assert list(step.operation.apply(whole)) == apart


SOURCES = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]


def scores(texts: Sequence[str]) -> list[float]:
    return [len(text) / 100 for text in texts]


class Every:
    """A corpus operation for the engine's own tests: every row that often, 0 drops it."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def view(self, batch: Sequence[Row]) -> pa.Table:
        return pa.table({"id": [row.record.id for row in batch]})

    def decide(self, views: Views, scratch: Path) -> Decided:
        verdict = Stays(copies=self.copies) if self.copies else Dropped("none", "asked for")
        return Decided([verdict_table([(row, verdict) for row in range(len(views))])])


VERDICTS = [
    Stays(),
    Stays(3, ("a", "b"), {"cluster": "é", "n": [1]}, ("n1", "n2")),
    Dropped("reason", "a detail"),
]


def test_verdicts_survive_the_way_through_a_table() -> None:
    table = verdict_table(list(enumerate(VERDICTS)))
    assert table.schema == VERDICT_SCHEMA
    assert [row["row"] for row in table.to_pylist()] == [0, 1, 2]
    assert [verdict_of(row) for row in table.to_pylist()] == VERDICTS
    assert verdict_table([]).schema == VERDICT_SCHEMA


def test_repetitions_have_ids_of_their_own_and_are_not_evaluated_twice() -> None:
    setting = config({"op": "duplicates"}, split={"eval_fraction": 0.5})
    records = [row.record for row in texts(*map(str, range(20)))]
    done = chunked.curate(setting, records, [Step("every", Every(3))])
    held_out = len(done.rows["eval"])
    assert 0 < held_out < 20
    assert len(done.rows["train"]) == 3 * (20 - held_out)
    assert done.curated.dropped().drops == {"repeated_in_eval": 2 * held_out}
    assert {row["id"] for row in done.rows["train"] if row["source"] == "f:1"} in (
        {"r1", "r1-2", "r1-3"},
        set(),
    )


def test_the_two_shapes_are_told_apart() -> None:
    assert isinstance(Every(1), CorpusOperation)
    assert not isinstance(Every(1), MapOperation)
    for step in steps(*ORDERED, *MAPS):
        assert isinstance(step.operation, MapOperation) != isinstance(step.operation, CorpusOperation)
