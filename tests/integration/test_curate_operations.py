"""Operations in the curate stage: files, ledgers, splits without leaks on real data, no secret in outputs."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from rich.console import Console

from data_prep.config import CurateConfig
from data_prep.dataset import DATASET_FILES, SPLITS, read_split
from data_prep.operations.base import Row
from data_prep.operations.length import Length
from data_prep.records import Message, PreferenceRecord, PromptRecord, TextRecord
from data_prep.shingles import shingle
from posttrain.errors import UserError
from posttrain.stage import execute_stage
from tests.integration.test_curate import config, digests, pairs, save, shared


def curate(settings: CurateConfig, directory: Path) -> tuple[dict[str, Any], str]:
    """Run the stage as the command does: dataset.json, and what was said."""
    console = Console(file=io.StringIO(), width=400)
    execute_stage("curate", settings, directory, console=console)
    return json.loads((directory / "dataset.json").read_text()), console.file.getvalue()


def rows_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: read_split(directory, split).to_list() for split in SPLITS}


def test_without_operations_nothing_of_them_is_written(tmp_path: Path) -> None:
    """The bytes of what people read, pinned: what was curated before this list existed stays the same."""
    info, _ = curate(
        config("preference", save(tmp_path / "a.jsonl", [*pairs(60), pairs(1)[0]])), tmp_path / "out"
    )
    assert "operations" not in info
    assert "licences" not in info
    texts = {name: (tmp_path / "out" / name).read_bytes() for name in DATASET_FILES if ".parquet" not in name}
    found = {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}
    assert found == {
        "rejects.jsonl": "f3da7bfe20d82f63",
        "card.md": "c7e95d54e03ec5aa",
        "report.html": "dad811624d18b879",
        "dataset.json": "5d9f452e097e8552",
    }


def test_the_ledger_is_in_every_output(tmp_path: Path) -> None:
    long = "a question on the kettle that was sent to us some days ago"
    rows = [*pairs(60), *({**pairs(1)[0], "prompt": f"{long} {n // 30 * 'again'}"} for n in range(31))]
    operations = [
        {"op": "near_duplicates", "part": "prompt", "threshold": 0.8},
        {"op": "preference_checks"},
    ]
    settings = config("preference", save(tmp_path / "a.jsonl", rows), operations=operations, dedup=False)
    info, _ = curate(settings, tmp_path / "out")
    first, second = info["operations"]
    assert (first["op"], first["rows_in"], first["drops"]) == ("near_duplicates", 91, {"near_duplicate": 30})
    assert second["rows_in"] == first["rows_out"] == 61
    assert sum(info["rows_out"].values()) == second["rows_out"]
    assert info["drops"] == {"near_duplicate": 30}
    assert len(first["examples"]["near_duplicate"]) == 3
    assert first["settings"]["threshold"] == 0.8
    dropped = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [at["reason"] for at in dropped] == ["near_duplicate"] * 30
    assert dropped[0]["detail"].startswith("in one cluster with a.jsonl:61")
    card = (tmp_path / "out/card.md").read_text()
    assert "| near_duplicates | 30 | 0 | 61 |" in card
    assert "chosen_longer" in card
    assert "search for personal data" in card
    page = (tmp_path / "out/report.html").read_text()
    assert 'class="waterfall"' in page
    assert "a.jsonl:62" in page
    again = tmp_path / "again"
    curate(settings, again)
    assert digests(again) == digests(tmp_path / "out")


def near_pairs_across(texts: dict[str, list[str]], threshold: float = 0.7) -> tuple[int, int]:
    """(pairs of Jaccard similarity `threshold` across the split, eval texts in one): by a matrix product,
    not by the code under test.
    """
    both = shingle([*texts["train"], *texts["eval"]], 3)
    sets = [np.unique(both.of(index)) for index in range(len(both.starts) - 1)]
    sizes = np.array([len(each) for each in sets])
    _, columns = np.unique(np.concatenate(sets), return_inverse=True)
    matrix = scipy.sparse.csr_matrix(
        (np.ones(len(columns)), columns, np.concatenate(([0], np.cumsum(sizes)))),
        shape=(len(sets), columns.max() + 1),
    )
    edge = len(texts["train"])
    shared_ = (matrix[edge:] @ matrix[:edge].T).tocoo()
    union = sizes[edge:][shared_.row] + sizes[:edge][shared_.col] - shared_.data
    alike = shared_.data / union >= threshold - 1e-12
    return int(alike.sum()), len(set(shared_.row[alike].tolist()))


@pytest.mark.parametrize("search", ["minhash", "exact"])
def test_a_split_by_cluster_leaks_nothing_where_rows_leak(tmp_path: Path, search: str) -> None:
    """presidio_research, 1,911 texts: 30 of 209 held-out rows have a near-duplicate in train, then none."""
    source = shared("presidio_research/tests/data/generated_large.json")
    found = {}
    for by in ("record", "cluster"):
        settings = config(
            "text",
            sources=[{"path": source, "format": "text", "columns": {"text": "full_text"}}],
            operations=[{"op": "near_duplicates", "keep": "all", "search": search}],
            split={"by": by},
        )
        curate(settings, tmp_path / by)
        rows = rows_of(tmp_path / by)
        found[by] = near_pairs_across({split: [row["text"] for row in rows[split]] for split in SPLITS})
        assert sum(map(len, rows.values())) == 1911
    assert found == {"record": (381, 30), "cluster": (0, 0)}


SECRETS = {
    "EMAIL": "ann.planted@shop.example",
    "SSN": "536-22-8145",
    "CREDIT_CARD": "4556 7375 8689 9855",
    "KEY": "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6",
}


@pytest.mark.parametrize("action", ["redact", "drop"])
def test_no_secret_reaches_any_output(tmp_path: Path, action: str) -> None:
    """Planted in turns, tools, groups, dropped rows, unreadable rows and evaluation items."""
    rows: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n} for {'the kettle ' * (n % 7)}"},
                {"role": "assistant", "content": f"Answer {n}"},
            ],
            "who": str(n),
        }
        for n in range(300)
    ]
    for number, secret in enumerate(SECRETS.values()):
        turns = [
            {"role": "user", "content": f"{secret} is mine, number {number}, and so is {'x' * 90} {secret}"},
            {"role": "assistant", "content": f"I see {secret}. {{"},
        ]
        rows += [{"messages": turns, "who": secret}] * 2
        rows += [{"messages": [{"role": "wizard", "content": secret}], "who": "w"}]
        rows += [{"messages": [{"role": "user", "content": secret}], "who": "w", secret: secret}]
        rows += [
            {"messages": [*turns[:1], {"role": "assistant", "content": f"{secret} {{ other"}], "who": "v"}
        ]
    exam = save(tmp_path / "exam.jsonl", [{"q": f"{SECRETS['EMAIL']} is mine, number 0, and so is this"}])
    settings = config(
        "conversation",
        sources=[{"path": save(tmp_path / "a.jsonl", rows), "group_column": "who"}],
        max_reject_fraction=0.1,
        operations=[
            {"op": "decontaminate", "against": [exam], "ngram": 5, "review_above": 0.05},
            {"op": "near_duplicates", "keep": "all"},
            {"op": "quality", "rules": ["c4_curly_bracket"], "part": "answer", "action": "tag"},
            {"op": "pii", "action": action},
            {"op": "duplicates"},
        ],
    )
    _, said = curate(settings, tmp_path / "out")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"review.jsonl", *DATASET_FILES} <= {file.name for file in files}
    texts = {file.name: file.read_text() for file in files if file.suffix != ".parquet"}
    texts |= {split: json.dumps(rows) for split, rows in rows_of(tmp_path / "out").items()}
    for name, text in {**texts, "console": said}.items():
        for secret in SECRETS.values():
            assert secret not in text, name
            assert secret[:-3] not in text, name
    kept = texts["train"] + texts["eval"]
    assert ("[SSN_1]" in kept) == (action == "redact")


def test_lengths_are_tokens_of_the_rendered_template(tmp_path: Path, tiny_model_dir: Path) -> None:
    from posttrain.models import load_chat_tokenizer

    rows = [
        {
            "messages": [
                {"role": "user", "content": "where is my order"},
                {"role": "assistant", "content": " ".join(["it ships"] * n)},
            ]
        }
        for n in range(1, 41)
    ]
    tokenizer = load_chat_tokenizer(tiny_model_dir)
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) for row in rows
    ]
    bound = sorted(lengths)[30]
    length = {"op": "length", "tokenizer": str(tiny_model_dir), "max_tokens": bound, "tag": True}
    settings = config(
        "conversation", save(tmp_path / "a.jsonl", rows), operations=[length], split={"by": "record"}
    )
    info, _ = curate(settings, tmp_path / "out")
    assert info["drops"] == {"too_many_tokens": sum(length > bound for length in lengths)}
    kept = [row for rows in rows_of(tmp_path / "out").values() for row in rows]
    assert sorted(json.loads(row["meta"])["tags"]["tokens"] for row in kept) == sorted(lengths)[:31]


def test_a_preference_counts_as_its_longer_side_and_a_prompt_with_its_header(tiny_model_dir: Path) -> None:
    from posttrain.models import load_chat_tokenizer

    ask = [Message("user", "where is my order")]
    short, long = ([Message("assistant", "it ships" + " today" * n)] for n in (1, 9))
    records = [PreferenceRecord(ask, short, long), PreferenceRecord(ask, long, short)]
    operation = Length(tiny_model_dir)
    tokenizer = load_chat_tokenizer(tiny_model_dir)

    def tokens(turns: list[Message], **options: bool) -> int:
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        return len(tokenizer.apply_chat_template(plain, tokenize=True, **options)["input_ids"])

    assert operation.count([Row(record, "f", 1) for record in records]) == [tokens(ask + long)] * 2
    assert tokens(ask + long) > tokens(ask + short)
    (prompt,) = operation.count([Row(PromptRecord(ask), "f", 1)])
    assert prompt == tokens(ask, add_generation_prompt=True) > tokens(ask)
    (text,) = operation.count([Row(TextRecord("where is my order"), "f", 1)])
    assert text == len(tokenizer("where is my order")["input_ids"])


def test_a_mix_is_exact_and_said_with_its_licences(tmp_path: Path) -> None:
    for name, count in (("a", 80), ("b", 30)):
        save(tmp_path / f"{name}.jsonl", [{"text": f"text {n} of {name}"} for n in range(count)])
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "licence": "MIT", "name": "first"},
        {"path": str(tmp_path / "b.jsonl"), "licence": "CC-BY-NC-4.0"},
    ]
    mix = {"op": "mix", "weights": {"first": 1, "b.jsonl": 1}, "max_epochs": 2.0}
    settings = config("text", sources=sources, operations=[mix])
    info, _ = curate(settings, tmp_path / "out")
    facts = info["operations"][0]["facts"]["sources"]
    assert {name: at["rows"] for name, at in facts.items()} == {"first": 60, "b.jsonl": 60}
    assert info["rows_repeated"] == 30
    out, gone = sum(info["rows_out"].values()), sum(info["drops"].values())
    page = (tmp_path / "out/report.html").read_text()
    assert f"110 rows in, 30 repeated, {out} out, {gone} dropped" in page
    rows = rows_of(tmp_path / "out")
    for split, held in rows.items():
        counts = {name: at["rows"] for name, at in info["mixture"][split].items()}
        assert sum(counts.values()) == len(held)
        assert counts["first"] == sum(row["source"].startswith("a.jsonl") for row in held)
    assert info["rows_in"] + 30 == sum(info["rows_out"].values()) + sum(info["drops"].values())
    assert len({row["text"] for row in rows["eval"]}) == len(rows["eval"])
    assert info["licences"]["commercial"] is False
    assert "Not all of them are known to allow commercial use" in (tmp_path / "out/card.md").read_text()


def test_a_commercial_mix_says_its_licences_without_any_operation(tmp_path: Path) -> None:
    source = {"path": save(tmp_path / "a.jsonl", pairs(60)), "licence": "CC-BY-SA-4.0"}
    plain, _ = curate(config("preference", sources=[source]), tmp_path / "plain")
    info, _ = curate(config("preference", sources=[source], commercial=True), tmp_path / "out")
    assert info["content_hash"] == plain["content_hash"]
    assert info["licences"] == {
        "marked_commercial": True,
        "rows_by_licence": {"CC-BY-SA-4.0": 60},
        "commercial": True,
        "share_alike": ["CC-BY-SA-4.0"],
    }
    assert "Share-alike: CC-BY-SA-4.0" in (tmp_path / "out/card.md").read_text()


def test_what_this_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ftfy" else whole(name))
    settings = config("text", save(tmp_path / "a.jsonl", [{"text": "a"}]), operations=[{"op": "unicode"}])
    with pytest.raises(
        UserError, match=r"curate.operations.0: unicode needs the package ftfy.*\n.*posttrain.data."
    ):
        execute_stage("curate", settings, tmp_path / "out", console=Console(file=io.StringIO()))
