"""Operations and the engine: ledgers, any order, borders between batches and processes, the split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.config import CurateConfig
from data_prep.curate import Curated, add, unique_id
from data_prep.dataset import SPLITS
from data_prep.operations import engine
from data_prep.operations.base import (
    CorpusOperation,
    Decided,
    Dropped,
    MapOperation,
    Row,
    Stays,
    from_arrow,
    tagged,
    to_arrow,
)
from data_prep.operations.build import Surroundings, build
from data_prep.operations.engine import Step, run_operations
from data_prep.operations.stage import conserved, groups, operate
from data_prep.records import (
    ConversationRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)
from posttrain.errors import DataError

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


def ran(rows: Sequence[Row], *operations: dict[str, Any], **paths: Path) -> engine.Ran:
    ids = Counter(row.record.id for row in rows)
    return run_operations(rows, steps(*operations, **paths), lambda wanted: unique_id(ids, wanted))


def test_the_ledger_counts_and_shows_examples() -> None:
    done = ran(texts("a b", "A  b", "c", "a B", "a b"), {"op": "duplicates", "examples": 2})
    (ledger,) = done.ledgers
    assert (ledger.rows_in, ledger.rows_out, ledger.drops) == (5, 2, {"duplicate": 3})
    assert [example["at"] for example in ledger.examples["duplicate"]] == ["f:2", "f:4"]
    assert ledger.examples["duplicate"][0]["detail"] == "same content as f:1"
    assert [(drop.row.line, drop.step) for drop in done.drops] == [(2, 1), (4, 1), (5, 1)]


def test_near_duplicates_keep_the_first_or_all() -> None:
    rows = texts(ASK, "something else entirely that nobody has ever asked", f"{ASK} please", ASK.upper())
    first = ran(rows, {"op": "near_duplicates"})
    assert [row.line for row in first.rows] == [1, 2]
    assert "in one cluster with f:1" in first.drops[0].detail
    every = ran(rows, {"op": "near_duplicates", "keep": "all"})
    assert [row.line for row in every.rows] == [1, 2, 3, 4]
    assert ['"cluster": "r1"' in row.record.meta for row in every.rows] == [True, False, True, True]
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
    assert [row.line for row in done.rows] == left


def test_ties_join_groups_and_order_does_not_matter() -> None:
    rows = [
        row(TextRecord("a", group="g3"), 1, ties=("x",)),
        row(TextRecord("b", group="g2"), 2, ties=("x", "y")),
        row(TextRecord("c", group="g3"), 3),
        row(TextRecord("d", group="g9"), 4, ties=("y",)),
        row(TextRecord("e", group="g1"), 5),
    ]
    assert groups(config(), rows) == ["g2", "g2", "g2", "g2", "g1"]
    assert groups(config(), rows[::-1]) == ["g1", "g2", "g2", "g2", "g2"]


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
    assert from_arrow(to_arrow(rows, record.kind), record.kind) == rows


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
)
def test_any_order_conserves_rows(
    rows: list[tuple[str, str, str]], order: list[dict[str, Any]], count: int, by: str, dedup: bool
) -> None:
    """Whatever the operations and their order: in + repeated = out + drops, ids unique, splits disjoint."""
    chosen = order[:count]
    if by == "cluster" and not any(operation["op"] == "near_duplicates" for operation in chosen):
        chosen = [*chosen, {"op": "near_duplicates"}]
    block = {"by": by, "eval_fraction": 0.4}
    setting = config(*chosen, kind="preference", split=block, dedup=dedup, sources=SOURCES)
    curated = Curated()
    read = 0
    for line, (ask, one, other) in enumerate(rows, start=1):
        if one.split() != other.split() and all(map(str.strip, (ask, one, other))):
            read += 1
            add(setting, curated, "f", line, pair(ask, one, other), SOURCES[line % 2]["path"])
    around = Surroundings(lambda field: pytest.fail(field), by_cluster=by == "cluster")
    try:
        operate(setting, curated, build(setting.operations, around), lambda w: unique_id(curated.ids, w))
    except DataError:
        # What stands before it dropped all rows of the only source with a weight.
        assert "weights" in str(chosen)
        return
    assert conserved(read, curated)
    ids = [at["id"] for split in SPLITS for at in curated.rows[split]]
    assert len(ids) == len(set(ids))
    held = {split: {at["group"] for at in curated.rows[split]} for split in SPLITS}
    assert not held["train"] & held["eval"]
    assert curated.operated is not None
    left = read - len(curated.dropped)
    for ledger in curated.operated.ledgers:
        assert ledger.rows_in == left
        left = ledger.rows_out


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
    travelled = [from_arrow(to_arrow(part, "preference"), "preference") for part in parts]
    apart = [verdict for part in travelled for verdict in again.operation.apply(part)]
    assert list(step.operation.apply(whole)) == apart


SOURCES = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]


def scores(texts: Sequence[str]) -> list[float]:
    return [len(text) / 100 for text in texts]


class Every:
    """A corpus operation for the engine's own tests: every row that often, 0 drops it."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def view(self, row: Row) -> str:
        return row.record.id

    def decide(self, views: Sequence[str]) -> Decided:
        verdict = Stays(copies=self.copies) if self.copies else Dropped("none", "asked for")
        return Decided([verdict] * len(views))


def test_repetitions_have_ids_of_their_own_and_are_not_evaluated_twice() -> None:
    setting = config({"op": "duplicates"}, split={"eval_fraction": 0.5})
    curated = Curated(pending=texts(*map(str, range(20))))
    curated.ids.update(row.record.id for row in curated.pending)
    operate(setting, curated, [Step("every", Every(3))], lambda wanted: unique_id(curated.ids, wanted))
    assert conserved(20, curated)
    held_out = len(curated.rows["eval"])
    assert 0 < held_out < 20
    assert len(curated.rows["train"]) == 3 * (20 - held_out)
    assert curated.drops == {"repeated_in_eval": 2 * held_out}


def test_the_two_shapes_are_told_apart() -> None:
    assert isinstance(Every(1), CorpusOperation)
    assert not isinstance(Every(1), MapOperation)
    for step in steps(*ORDERED, *MAPS):
        assert isinstance(step.operation, MapOperation) != isinstance(step.operation, CorpusOperation)
