"""Corpus operations decide over sorted arrays and files; here they are held against plain dictionaries."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup import content_key
from data_prep.exact_join import exact_pairs
from data_prep.minhash import MinHashSettings, sign, sketch
from data_prep.near_duplicates import MAX_LEADERS, UnionFind, find_near_duplicates
from data_prep.operations.base import Dropped, MemoryViews, Row, Stays
from data_prep.operations.mixing import Mix
from data_prep.operations.near_duplicates import Duplicates, NearDuplicates
from data_prep.operations.preferences import PreferenceChecks
from data_prep.records import Message, PreferenceRecord, TextRecord
from data_prep.shingles import jaccard, mix, shingle
from data_prep.split import group_key
from tests.unit.corpus import decided_on, verdicts_on, views_of

Verdicts = list[Stays | Dropped]
Pairs = list[tuple[int, int, float]]
WORDS = "order kettle refund where is my the a ships monday blue 漢字 ! ...".split()
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
bodies = st.lists(sentences, min_size=1, max_size=30)
batches = st.integers(1, 31)


def texts(values: Sequence[str], sources: str = "") -> list[Row]:
    return [
        Row(TextRecord(value, id=f"r{line}", group="g"), "f", line, sources[line % 7 : line % 7 + 1])
        for line, value in enumerate(values, start=1)
    ]


@settings(deadline=None)
@given(bodies, batches)
def test_duplicates_are_those_of_a_dictionary(values: list[str], batch: int) -> None:
    rows = texts(values)
    first: dict[str, int] = {}
    expected: Verdicts = []
    for row in rows:
        line = first.setdefault(content_key(row.record), row.line)
        same = Dropped("duplicate", f"same content as f:{line}")
        expected.append(Stays() if line == row.line else same)
    assert decided_on(Duplicates(), rows, batch) == (expected, {})


def plain_search(values: Sequence[str], setting: MinHashSettings) -> tuple[list[int], Pairs, int]:
    """Band by band, bucket by bucket, pair by pair, as it is defined: (clusters, pairs, candidates)."""
    signatures = sign(values, setting).astype(np.uint64)
    sets = [shingle([value], setting.words).of(0) for value in values]
    filled = [index for index, each in enumerate(sets) if len(each)]
    union, pairs, candidates = UnionFind(len(values)), [], 0
    for band in range(setting.bands):
        found: defaultdict[int, list[int]] = defaultdict(list)
        for index in filled:
            key = np.zeros(1, dtype=np.uint64)
            for column in range(band * setting.rows, (band + 1) * setting.rows):
                key = mix(key ^ signatures[index, column])
            found[int(key[0]) >> len(filled).bit_length()].append(index)
        for _, bucket in sorted(found.items()):
            leaders: list[int] = []
            for index in bucket:
                for leader in leaders:
                    if union.find(leader) == union.find(index):
                        break
                    candidates += 1
                    similarity = jaccard(sets[leader], sets[index])
                    if similarity >= setting.threshold:
                        union.join(leader, index)
                        pairs.append((leader, index, similarity))
                        break
                else:
                    if len(leaders) < MAX_LEADERS:
                        leaders.append(index)
    return [union.find(index) for index in range(len(values))], sorted(pairs), candidates


SETTINGS = st.builds(
    MinHashSettings,
    threshold=st.sampled_from([0.3, 0.6, 1.0]),
    words=st.integers(1, 3),
    bands=st.integers(1, 6),
    rows=st.integers(1, 3),
    seed=st.integers(0, 9),
)


def plain_verdicts(
    operation: NearDuplicates, cluster: list[int], pairs: Pairs, candidates: int
) -> tuple[Verdicts, dict[str, Any]]:
    sizes = Counter(cluster)
    likeness = {later: similarity for _, later, similarity in pairs}
    verdicts: Verdicts = []
    for index, leader in enumerate(cluster):
        if sizes[leader] == 1:
            verdicts.append(Stays())
        elif operation.keep == "first" and index != leader:
            near = f" (similarity {likeness[index]:.2f} to a row of its cluster)" if index in likeness else ""
            verdicts.append(Dropped("near_duplicate", f"in one cluster with f:{leader + 1}{near}"))
        else:
            name = f"r{leader + 1}"
            tags = {"cluster": name} if operation.keep == "all" else {}
            verdicts.append(Stays(ties=(f"near:{name}",) if operation.tie else (), tags=tags))
    several = [size for size in sizes.values() if size > 1]
    facts = {
        "clusters": len(several),
        "rows_in_clusters": sum(several),
        "largest_cluster": max(several, default=0),
        "pairs_compared": candidates,
        "cluster_sizes": {str(size): several.count(size) for size in sorted(set(several))},
        "largest_clusters": [
            {"first": f"f:{leader + 1}", "rows": size}
            for leader, size in sorted(sizes.items(), key=lambda at: (-at[1], at[0]))[:5]
            if size > 1
        ],
    }
    return verdicts, facts


@settings(deadline=None)
@given(bodies, batches, SETTINGS, st.sampled_from(["first", "all"]), st.booleans())
def test_near_duplicates_are_those_of_the_plain_search(
    values: list[str], batch: int, setting: MinHashSettings, keep: Any, tie: bool
) -> None:
    """In memory and by files: the same clusters, pairs and comparisons as pair by pair."""
    cluster, pairs, candidates = plain_search(values, setting)
    found = find_near_duplicates(values, setting)
    assert (found.cluster.tolist(), found.pairs, found.candidates) == (cluster, pairs, candidates)
    operation = NearDuplicates(setting, "whole", keep, tie)
    expected = plain_verdicts(operation, cluster, pairs, candidates)
    assert decided_on(operation, texts(values), batch) == expected


@settings(deadline=None)
@given(bodies, batches, st.sampled_from([0.3, 0.7]), st.booleans())
def test_the_exact_search_is_that_of_the_join(
    values: list[str], batch: int, threshold: float, tie: bool
) -> None:
    joined = exact_pairs(values, threshold)
    union = UnionFind(len(values))
    for left, right, _ in joined.pairs:
        union.join(left, right)
    cluster = [union.find(index) for index in range(len(values))]
    operation = NearDuplicates(MinHashSettings(threshold), "whole", "first", tie, exact=True)
    expected = plain_verdicts(operation, cluster, list(joined.pairs), joined.candidates)
    assert decided_on(operation, texts(values), batch) == expected


def test_a_crowd_of_unlike_texts_is_read_from_files_as_from_memory() -> None:
    """More leaders than are compared with, and texts longer than a block of a batch."""
    rng = np.random.default_rng(0)
    head = " ".join(f"h{number}" for number in range(60))
    values = [f"{head} {' '.join(map(str, rng.integers(0, 400, 60)))}" for _ in range(120)]
    values += [values[50] + " more", " ".join(map(str, range(20_000)))] * 2
    setting = MinHashSettings(bands=8, rows=1)
    cluster, pairs, candidates = plain_search(values, setting)
    assert candidates > MAX_LEADERS * 80
    expected = plain_verdicts(
        operation := NearDuplicates(setting, "whole", "first"), cluster, pairs, candidates
    )
    assert decided_on(operation, texts(values), 33) == expected


@settings(deadline=None)
@given(bodies, st.integers(1, 4))
def test_a_sketch_has_the_set_of_every_text(values: list[str], words: int) -> None:
    found = sketch(values, MinHashSettings(words=words, bands=2, rows=2)).sets
    sets = [shingle([value], words).of(0).tolist() for value in values]
    assert [found.hashes[begin:end].tolist() for begin, end in pairwise(found.starts.tolist())] == sets


SIDES = st.sampled_from(
    ["The red one.", "the RED one", "The blue one.", "Yes!", "yes", "...", "?!", "No, no."]
)
pairs_of_sides = st.tuples(st.sampled_from(["Which?", "which", "Why?"]), SIDES, SIDES)


@settings(deadline=None)
@given(st.lists(pairs_of_sides.filter(lambda at: at[1] != at[2]), max_size=30), batches)
def test_preference_checks_are_those_of_a_dictionary(asked: list[tuple[str, str, str]], batch: int) -> None:
    rows, keys = [], []
    for line, (ask, chosen, rejected) in enumerate(asked, start=1):
        turns = [[Message("user", ask)], [Message("assistant", chosen)], [Message("assistant", rejected)]]
        rows.append(Row(PreferenceRecord(*turns, id=f"r{line}", group="g"), "f", line))
        keys.append((group_key(f"user\x1f{ask}"), group_key(chosen), group_key(rejected)))
    expected: Verdicts = []
    for (prompt, chosen, rejected), sides in zip(keys, asked, strict=True):
        bare = [
            name
            for name, text in zip(("chosen", "rejected"), sides[1:], strict=True)
            if not any(map(str.isalnum, text))
        ]
        if bare:
            expected.append(Dropped("side_without_words", f"{' and '.join(bare)}: no letter or digit"))
        elif chosen == rejected:
            said = "chosen and rejected differ in case and punctuation only"
            expected.append(Dropped("sides_alike", said))
        elif (prompt, rejected, chosen) in keys:
            at = f"f:{keys.index((prompt, rejected, chosen)) + 1}"
            said = f"{at} prefers the other of the same two answers"
            expected.append(Dropped("contradictory_pairs", said))
        else:
            expected.append(Stays(ties=(f"prompt:{prompt}",)))
    verdicts, facts = decided_on(PreferenceChecks(), rows, batch)
    assert verdicts == expected
    kept = [index for index, verdict in enumerate(expected) if isinstance(verdict, Stays)]
    lengths = [(len(asked[index][1]), len(asked[index][2])) for index in kept]
    unlike = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    several = sum(count > 1 for count in Counter(keys[index][0] for index in kept).values())
    assert facts["prompts_with_several_pairs"] == several
    assert facts.get("chosen_longer") == (round(sum(unlike) / len(unlike), 4) if unlike else None)
    if unlike:
        mean = sum(chosen for chosen, _ in lengths) / len(lengths)
        assert facts["mean_characters_chosen"] == round(mean, 1)


MIXES = st.builds(
    Mix,
    temperature=st.sampled_from([1.0, 3.0]),
    max_epochs=st.sampled_from([1.0, 2.5]),
    quotas=st.sampled_from([{}, {"a": 2}]),
    rows=st.sampled_from([None, 3, 12, 40]),
    seed=st.integers(0, 5),
)


@settings(deadline=None)
@given(st.integers(0, 40), batches, MIXES)
def test_a_mix_is_that_of_sorted_hashes(count: int, batch: int, operation: Mix) -> None:
    rows = texts(["t"] * count, "abbaacc")
    sizes = Counter(row.source for row in rows)
    targets = operation.targets(sizes)
    expected: Verdicts = [Stays()] * count
    for source, size in sizes.items():
        ranked = sorted(
            (hashlib.sha256(f"{operation.seed}\0{row.record.id}".encode()).digest(), row.line - 1)
            for row in rows
            if row.source == source
        )
        for place, (_, index) in enumerate(ranked):
            copies = targets[source] // size + (place < targets[source] % size)
            said = f"{targets[source]} of {size} rows of {source} are used"
            expected[index] = Stays(copies=copies) if copies else Dropped("over_target", said)
    verdicts, facts = decided_on(operation, rows, batch)
    assert verdicts == expected
    shares = facts.get("sources", {})
    assert {name: at["rows"] for name, at in shares.items()} == dict(targets)
    assert list(shares) == sorted(sizes)


@pytest.mark.parametrize(
    "operation",
    [Duplicates(), NearDuplicates(MinHashSettings(), "whole", "first"), PreferenceChecks(), Mix()],
)
def test_no_rows(operation: Any) -> None:
    assert decided_on(operation, [])[0] == []


@pytest.mark.parametrize("values", [[], ["..."], ["...", "one two three four", "!", "One two three four!"]])
@pytest.mark.parametrize("exact", [False, True])
def test_views_survive_a_file(values: list[str], exact: bool) -> None:
    """Also those without rows, or of rows without any word, for which a file holds no data."""
    operation = NearDuplicates(MinHashSettings(), "whole", "all", exact=exact)
    held = views_of(operation, texts(values), 1).held
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, held[0].schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for table in held:
            writer.write_table(table)
    reader = pa.ipc.open_file(sink.getvalue())
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    tables = [pa.Table.from_batches([batch]) for batch in batches] + [reader.schema.empty_table()]
    assert verdicts_on(operation, MemoryViews(tables)) == verdicts_on(operation, MemoryViews(held))
