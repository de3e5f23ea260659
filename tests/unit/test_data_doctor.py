"""The parts of `posttrain data doctor`: what it suggests for which columns, what it finds, which licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.doctor.advice import configuration
from data_prep.doctor.command import diagnose
from data_prep.doctor.examine import REMEMBERED, Examined, Reservoir, Seen, examine
from data_prep.doctor.findings import as_json, findings
from data_prep.doctor.licences import licence_beside
from data_prep.doctor.suggest import suggest

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "kind", "settings"),
    [
        ({"question": "Why?", "answer": "So."}, "conversation", {"format": "question_answer"}),
        (
            {"Question": "Why?", "Best Answer": "So."},
            "conversation",
            {"format": "prompt_completion", "columns": {"prompt": "Question", "completion": "Best Answer"}},
        ),
        (
            {"instruction": "Sum up", "context": "Once.", "response": "It was."},
            "conversation",
            {"format": "alpaca", "columns": {"input": "context", "output": "response"}},
        ),
        (
            {"query": "Why?", "preferred": "So.", "dispreferred": "No."},
            "preference",
            {
                "format": "preference",
                "columns": {"prompt": "query", "chosen": "preferred", "rejected": "dispreferred"},
            },
        ),
        ({"full_text": "Once."}, "text", {"format": "text", "columns": {"text": "full_text"}}),
        ({"query": "Why?"}, "prompt", {"format": "prompt", "columns": {"prompt": "query"}}),
        (
            {"dialog": [USER, ANSWER]},
            "conversation",
            {"format": "messages", "columns": {"messages": "dialog"}},
        ),
        (
            {"a": [{"b": "a long text it is"}], "c": "short one"},
            "text",
            {"format": "text", "columns": {"text": "a[0].b"}},
        ),
        ({"id": "x1", "text": "Once."}, "text", {"format": "text", "id_column": "id"}),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]},
            "conversation",
            {"format": "messages", "reasoning": "think_tags"},
        ),
    ],
)
def test_suggestions(row: dict[str, Any], kind: str, settings: dict[str, Any]) -> None:
    found = suggest([(1, row)], "a.jsonl")
    assert found is not None and (found.kind, found.settings) == (kind, settings)


def test_nothing_is_suggested_without_text_and_a_guess_is_called_one() -> None:
    assert suggest([(1, {"n": 1, "name": "word"})], "a.csv") is None
    assert suggest([], "a.csv") is None
    found = suggest([(1, {"x": "some words", "y": "a few more words"})], "a.csv")
    assert found is not None and found.settings["columns"] == {"text": "y"}
    assert "a guess" in found.why and found.notes == ["other places with text: x"]


def test_an_ambiguous_file_is_said_to_be_one() -> None:
    row = {"messages": [USER, ANSWER], "prompt": "Hi", "completion": "Bye"}
    found = suggest([(1, row)], "a.jsonl")
    assert found is not None and found.settings == {"format": "messages"}
    assert "can be read as messages and as prompt_completion" in found.notes[0]


def test_an_id_that_repeats_is_not_one() -> None:
    found = suggest([(n, {"id": 7, "text": "Once."}) for n in (1, 2)], "a.jsonl")
    assert found is not None and "id_column" not in found.settings


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def said(found: Examined) -> str:
    return "\n".join(f"{severity}: {text}" for severity, text in findings(found))


def test_findings_name_reason_count_and_place(tmp_path: Path) -> None:
    good = [{"prompt": f"{n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}!!"} for n in range(18)]
    rows = [*good, {**good[0], "rejected": "Yes, 0."}, "{\n", good[1], {**good[2], "chosen": " "}]
    found = examine(save(tmp_path / "a.jsonl", rows))
    text = said(found)
    assert (found.rows, found.good, found.rejects.total()) == (22, 19, 3)
    assert (
        "1 of 22 rows (4.5%) rejected as identical_sides (chosen and rejected are the same): a.jsonl:19"
        in text
    )
    assert "rejected as malformed_json (not JSON): a.jsonl:20" in text
    assert "rejected as empty_content (a turn or answer is empty): a.jsonl:22" in text
    assert "1 of 22 rows (4.5%) repeat the content of an earlier row, first a.jsonl:21" in text
    assert "the chosen answer is the longer one in 0.0% of the pairs" in text
    report = as_json(found)
    assert report["characters"]["chosen"] == {"min": 7, "p50": 7, "p95": 8, "max": 8}
    assert report["columns"]["chosen"]["types"] == {"text": 0.9545}
    assert report["rejects"] == {"identical_sides": 1, "malformed_json": 1, "empty_content": 1}
    assert configuration([found]) == {
        "stage": "curate",
        "kind": "preference",
        "sources": [{"path": str(tmp_path / "a.jsonl"), "format": "preference"}],
        "max_reject_fraction": 0.14,
    } | ({} if found.groups.usable() == 0.1 else {"split": {"eval_fraction": found.groups.usable()}})


def test_many_bad_rows_come_first(tmp_path: Path) -> None:
    found = examine(save(tmp_path / "a.jsonl", ["{\n"] * 1500 + [{"text": "one"}]))
    assert (found.rows, found.good, found.rejects) == (1501, 1, {"malformed_json": 1500})
    assert found.suggestion is not None and found.suggestion.settings == {"format": "text"}


def test_labels_ids_roles_and_lost_bytes(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**ANSWER, "content": f"{n}"}], "label": n > 0} for n in range(20)]
    text = said(examine(save(tmp_path / "a.jsonl", rows)))
    assert "95.0% of the labels are true: one side is nearly missing" in text
    rows = [{"id": n, "text": f"text {n} \ufffd"} for n in range(1000)] + [{"id": 3, "text": "text"}]
    found = examine(save(tmp_path / "b.jsonl", rows))
    assert "1 of 1,001 rows (0.1%) repeat an id, first b.jsonl:1001" in said(found)
    assert "1,000 of 1,001 rows (99.9%) hold U+FFFD" in said(found)
    talk = {"messages": [USER, USER, ANSWER]}
    found = examine(save(tmp_path / "c.jsonl", [talk, {"messages": [USER, ANSWER]}]))
    assert "rejected as roles_not_alternating (turns of the user and the assistant do not alternate)" in said(
        found
    )
    assert found.roles == {"user": 1, "assistant": 1} and found.turns == {2: 1}


def test_meta_columns_are_those_that_every_row_has(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": n, "reference": n or None, "x": 1} for n in range(20)]
    found = examine(save(tmp_path / "a.jsonl", rows))
    assert found.suggestion is not None
    assert found.suggestion.settings == {"format": "prompt", "meta_columns": ["answer"]}


def test_a_split_that_leaves_no_side_empty(tmp_path: Path) -> None:
    rows = [{"prompt": "Always the same?", "completion": f"{n}"} for n in range(30)]
    config = configuration([examine(save(tmp_path / "a.jsonl", rows))])
    assert config is not None and config["split"]["by"] == "record"
    config = configuration(
        [examine(save(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}]))]
    )
    assert config is not None and config["split"] == {"eval_fraction": pytest.approx(0.5, abs=0.45)}


def test_a_folder_of_several_kinds_is_a_pipeline_and_shards_are_one_source(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"part-{n}.jsonl", [{"text": f"text {n} {m}"} for m in range(30)])
    save(tmp_path / "talk.json", [json.dumps([{"prompt": f"{n}?", "completion": "x"} for n in range(30)])])
    (tmp_path / "broken.jsonl.gz").write_bytes(b"x")
    found = diagnose([str(tmp_path)], tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == found.settings
    assert written["stages"]["text"]["sources"] == [{"path": str(tmp_path / "*.jsonl"), "format": "text"}]
    assert written["stages"]["conversation"]["kind"] == "conversation"
    assert [bool(at.error) for at in found.files] == [True, False, False, False, False]
    assert found.readable


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("LICENSE", "MIT License\n\nCopyright", "MIT"),
        ("LICENSE.txt", "   Apache License\n   Version 2.0, January 2004", "Apache-2.0"),
        ("DATA_LICENSE", "Attribution-NonCommercial 4.0 International", "CC-BY-NC-4.0"),
        ("README.md", "---\npretty_name: X\nlicense: cc-by-sa-4.0\n---\n# X", "cc-by-sa-4.0"),
        ("README.md", "It is under the MIT License.", None),
        ("LICENSE", "All rights reserved.", None),
    ],
)
def test_licence_beside_the_data(tmp_path: Path, name: str, text: str, licence: str | None) -> None:
    folder = tmp_path / "a" / "b" / "c" / "d" / "e"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / name).write_text(text)
    found = licence_beside(folder / "data.jsonl")
    assert (found and found[0]) == licence
    if licence and name != "DATA_LICENSE":
        (tmp_path / "a" / "b" / "c" / "DATA_LICENSE").write_text("CC0 1.0 Universal")
        nearest = licence_beside(folder / "data.jsonl")
        assert nearest is not None and nearest[0] == "CC0-1.0"


def test_samples_are_uniform_and_memory_is_bounded() -> None:
    sample = Reservoir(100)
    for n in range(10_000):
        sample.add(n)
    assert len(sample.kept) == 100 and 4000 < sum(sample.kept) / 100 < 6000
    seen = Seen(keys=set(range(REMEMBERED)))
    seen.add(-1, 1)
    seen.add(0, 2)
    assert (len(seen.keys), seen.repeated, seen.lines) == (REMEMBERED, 1, [2])
