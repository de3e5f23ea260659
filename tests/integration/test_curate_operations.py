"""Operations in the curate stage: files, ledgers, splits without leaks on real data, no secret in outputs."""

from __future__ import annotations

import hashlib
import html
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from rich.console import Console

from data_prep.config import CurateConfig
from data_prep.dataset import DATASET_FILES, SPLITS, read_split
from data_prep.operations.base import Row
from data_prep.operations.length import Length, _tokenizer
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


def planted() -> list[tuple[str, str]]:
    """(text that holds it, secret) of every sample of every type: those the patterns are tested on."""
    from tests.unit.test_pii import AROUND, FOUND

    return [
        (f"{AROUND.get(value, ('', ''))[0]}{value}{AROUND.get(value, ('', ''))[1]}", value)
        for samples in FOUND.values()
        for value in samples
    ]


def traces(secret: str) -> set[str]:
    """What must stand in no output: the secret as it is written in text, JSON and HTML, and most of it."""
    written = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    written |= {html.escape(each) for each in written}
    return written | {each[:-3] for each in written if len(each) > 15}


def with_secrets() -> list[Any]:
    """Rows with every secret in every field, in each way in which a row is dropped or cannot be used."""
    rows: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n} for {'the kettle ' * (n % 7)}"},
                {"role": "assistant", "content": f"Answer {n}"},
            ],
            "who": f"g{n}",
            "key": f"k{n}",
            "about": n,
        }
        for n in range(400)
    ]
    for number, (text, _) in enumerate(planted()):
        plain = [{"role": "user", "content": f"Nothing {number}"}, {"role": "assistant", "content": "No."}]
        turns = [
            {"role": "system", "content": f"Number {number}. {text}"},
            {"role": "user", "content": f"{text} is mine, number {number}, and so is {'x' * 90} {text} ."},
            {"role": "assistant", "content": f"I see\n{text}\n{{"},
        ]
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
        common = {"who": f"s{number}", "key": f"r{number}", "about": "-"}
        rows += [{**common, "messages": turns, "who": text}] * 2
        rows += [{**common, "messages": [{"role": "wizard", "content": text}]}]
        rows += [{**common, "messages": [{"role": "user", "content": text}], text: text}]
        rows += [{**common, "messages": [*turns[:2], {"role": "assistant", "content": f"{text} {{ other"}]}]
        rows += [{**common, "messages": plain, "about": {"a": [text, {text: 1}]}, "tools": [tool]}]
        rows += [
            {**common, "messages": [{**plain[0], "content": f"{number} {end}"}, plain[1]], "key": text}
            for end in ("first", "second", "third")
        ]
        rows += [{**common, "messages": [{**plain[0], "content": f"{text} {'long ' * 200}"}, plain[1]]}]
    card = {"role": "user", "content": "A card as a number"}
    rows += [{"messages": [card, plain[1]], "who": "n", "key": "n", "about": 4111111111111111}]
    return rows


def outputs(directory: Path, said: str) -> dict[str, str]:
    """Every file of a run directory by name, parquet as JSON too, and what was said."""
    texts = {"console": said}
    for file in directory.rglob("*"):
        if file.is_file():
            texts[file.name] = file.read_bytes().decode("utf-8", "replace")
            if file.suffix == ".parquet":
                texts[f"{file.name} read"] = json.dumps(pq.read_table(file).to_pylist())
    return texts


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("action", ["redact", "drop"])
def test_no_secret_reaches_any_output(tmp_path: Path, action: str, first: bool) -> None:
    """Every type, planted in turns, tools, meta, ids, groups, dropped and unreadable rows and evaluation
    items; in every file of the run directory and in what is said. first: personal data before the rest.
    """
    (tmp_path / "key").write_text("sixteen bytes and more")
    exam = save(tmp_path / "exam.jsonl", [{"q": f"{planted()[0][0]} is mine, number 0, and so is this"}])
    personal = {"op": "pii", "action": action, "key_file": str(tmp_path / "key")}
    others = [
        {"op": "decontaminate", "against": [exam], "ngram": 5, "review_above": 0.05},
        {"op": "near_duplicates", "keep": "all"},
        {"op": "quality", "rules": ["c4_curly_bracket"], "part": "answer", "action": "drop"},
    ]
    source = save(tmp_path / "a.jsonl", with_secrets())
    settings = config(
        "conversation",
        sources=[{"path": source, "group_column": "who", "id_column": "key", "meta_columns": ["about"]}],
        filters={"max_chars": 900},
        max_reject_fraction=0.3,
        operations=[personal, *others, {"op": "duplicates"}]
        if first
        else [*others, personal, {"op": "duplicates"}],
    )
    info, said = curate(settings, tmp_path / "out")
    assert {"duplicate", "too_long", "unknown_role"} <= set(info["drops"]), info["drops"]
    texts = outputs(tmp_path / "out", said)
    assert {"rejects.jsonl", "report.html", "train.parquet read", "manifest.json", "console"} <= set(texts)
    assert first or "review.jsonl" in texts
    leaks = {
        (name, secret)
        for name, text in texts.items()
        for _, secret in planted()
        for trace in traces(secret)
        if trace in text
    }
    assert leaks == set()
    rows = texts["train.parquet read"] + texts["eval.parquet read"]
    assert ("[SSN_1]" in rows) == (action == "redact")
    assert "4111111111111111" not in rows


def test_no_secret_is_in_the_message_of_a_run_that_fails(tmp_path: Path) -> None:
    """Too many rows that cannot be used: the message shows one."""
    for number, (text, secret) in enumerate(planted()):
        rows = [*pairs(20), {"prompt": text, "chosen": text, "rejected": text}, {text: text}]
        source = save(tmp_path / f"{number}.jsonl", rows)
        settings = config("preference", source, operations=[{"op": "pii"}], max_reject_fraction=0)
        with pytest.raises(UserError) as caught:
            curate(settings, tmp_path / f"out{number}")
        texts = outputs(tmp_path / f"out{number}", str(caught.value))
        assert "cannot be used" in texts["console"]
        assert not [(name, each) for name, text in texts.items() for each in traces(secret) if each in text]


def test_equal_ids_and_groups_stay_equal_under_a_key(tmp_path: Path) -> None:
    """Hashes of personal ids depend on the key; the ordinary ones are left."""
    rows = [
        {
            "text": f"text {n}",
            "who": f"ann{n % 2}@shop.example" if n < 30 else f"g{n}",
            "key": "bob@shop.example",
        }
        for n in range(60)
    ]
    source = {"path": save(tmp_path / "a.jsonl", rows), "group_column": "who", "id_column": "key"}
    found = {}
    for name, key in (("none", None), ("one", "a" * 16), ("again", "a" * 16), ("two", "b" * 16)):
        operation: dict[str, Any] = {"op": "pii"}
        if key:
            (tmp_path / f"{name}.key").write_text(key)
            operation["key_file"] = str(tmp_path / f"{name}.key")
        curate(config("text", sources=[source], operations=[operation]), tmp_path / name)
        found[name] = sorted(
            (row["text"], row["group"], row["id"])
            for rows in rows_of(tmp_path / name).values()
            for row in rows
        )
        groups = {group for _, group, _ in found[name]}
        assert len(groups) == 32 and {f"g{n}" for n in range(30, 60)} < groups
        assert len({each for _, _, each in found[name]}) == 60, "ids stay unique"
    assert found["one"] == found["again"]
    assert found["one"] != found["two"] != found["none"]
    (tmp_path / "short.key").write_text("short")
    operation = {"op": "pii", "key_file": str(tmp_path / "short.key")}
    with pytest.raises(UserError, match="5 bytes are no key.*\n.*16"):
        curate(config("text", sources=[source], operations=[operation]), tmp_path / "short")
    (tmp_path / "folder").mkdir()
    operation = {"op": "pii", "key_file": str(tmp_path / "folder")}
    with pytest.raises(UserError, match="folder: cannot be read as a key.*\n.*16"):
        curate(config("text", sources=[source], operations=[operation]), tmp_path / "short")


def test_lengths_are_tokens_of_the_rendered_template(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(_tokenizer(tiny_model_dir), "model_max_length", 30)
    info, _ = curate(settings, tmp_path / "out")
    assert "indexing errors" not in caplog.text, "nothing is run through a model"
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
