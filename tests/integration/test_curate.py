"""The curate stage from files to a dataset directory: exact files, same bytes again, and its refusals."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_prep.config import CurateConfig
from data_prep.curate import run
from data_prep.dataset import DATASET_FILES, columns, read_split
from posttrain.context import StageContext
from posttrain.errors import DataError
from posttrain.stage import execute_stage

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
RECORDS = {"manifest.json", "config.yaml"}


def shared(relative: str) -> str:
    """A file of the shared test data, or a skip that says why."""
    file = SHARED / relative
    if not file.is_file():
        pytest.skip(f"{file} is not here; set POSTTRAIN_SHARED_DATA to the folder of shared test data")
    return str(file)


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}!"} for n in range(count)
    ]


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(kind: str, *paths: str, **block: Any) -> CurateConfig:
    return CurateConfig.model_validate({"kind": kind, "sources": [{"path": path} for path in paths]} | block)


def curate(settings: CurateConfig, directory: Path) -> tuple[dict[str, Any], str]:
    """Run the stage by itself: its metrics, and what it said."""
    directory.mkdir()
    console = Console(file=io.StringIO(), width=400)
    metrics = run(settings, StageContext(run_dir=directory, config=settings, inputs={}, console=console))
    return metrics, console.file.getvalue()


def digests(directory: Path) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in DATASET_FILES}


def test_stage_writes_exactly_the_dataset_directory(tmp_path: Path) -> None:
    rows = [*pairs(60), pairs(1)[0], {**pairs(1)[0], "prompt": "question  0?"}]
    settings = config("preference", save(tmp_path / "a.jsonl", rows), seed=7)
    result = execute_stage("curate", settings, tmp_path / "run", console=Console(file=io.StringIO()))
    assert result.status == "completed"
    visible = {file.name for file in (tmp_path / "run").iterdir() if not file.name.startswith(".")}
    assert visible == {*DATASET_FILES, *RECORDS}
    info = json.loads((tmp_path / "run/dataset.json").read_text())
    assert info["rows_in"] == 62 and info["drops"] == {"duplicate": 2}
    assert sum(info["rows_out"].values()) == 60
    assert result.manifest["metrics"]["content_hash"] == info["content_hash"]
    assert result.manifest["outputs"]["dataset"] == info["content_hash"]
    train, held_out = (read_split(tmp_path / "run", side, "preference") for side in ("train", "eval"))
    assert train.column_names == columns("preference") == info["columns"]
    assert (train.num_rows, held_out.num_rows) == (info["rows_out"]["train"], info["rows_out"]["eval"])
    assert not set(train["group"]) & set(held_out["group"])
    assert train[0]["source"].startswith("a.jsonl:")
    dropped = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert [(at["file"], at["line"], at["reason"]) for at in dropped] == [
        ("a.jsonl", 61, "duplicate"),
        ("a.jsonl", 62, "duplicate"),
    ]
    assert dropped[0]["detail"] == "same content as a.jsonl:1"
    again = execute_stage("curate", settings, tmp_path / "run", console=Console(file=io.StringIO()))
    assert again.status == "skipped"


@pytest.mark.parametrize("kind", ["text", "conversation", "preference", "prompt"])
def test_same_data_elsewhere_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    found = []
    for place in ("one", "another"):
        (tmp_path / place).mkdir()
        source = save(tmp_path / place / "a.jsonl", pairs(60))
        curate(config(kind, source), tmp_path / place / "out")
        found.append(digests(tmp_path / place / "out"))
    assert found[0] == found[1]
    other = save(tmp_path / "a.jsonl", pairs(60)[::-1])
    curate(config(kind, other), tmp_path / "out")
    hashes = [
        json.loads((at / "dataset.json").read_text())["content_hash"]
        for at in (tmp_path / "out", tmp_path / "one/out")
    ]
    assert hashes[0] != hashes[1]


def test_kinds_made_from_one_file_split_alike(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", pairs(80))
    held_out = {}
    for kind in ("text", "conversation", "preference", "prompt"):
        curate(config(kind, source), tmp_path / kind)
        held_out[kind] = read_split(tmp_path / kind, "eval", kind)["source"][:]
    assert held_out["text"] == held_out["conversation"] == held_out["preference"] == held_out["prompt"]


def test_shortened_dialogues_stay_on_their_side(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "and why?"},
                {"role": "assistant", "content": f"because of {n}"},
            ]
        }
        for n in range(40)
    ]
    source = save(tmp_path / "a.jsonl", rows)
    curate(config("conversation", source), tmp_path / "whole")
    curate(config("conversation", source, last_user_turns=1), tmp_path / "short")
    for split in ("train", "eval"):
        whole = read_split(tmp_path / "whole", split, "conversation")
        short = read_split(tmp_path / "short", split, "conversation")
        assert short["group"][:] == whole["group"][:]
        for before, after in zip(whole["messages"], short["messages"], strict=True):
            assert after == [before[0], *before[3:]]
    assert "last 1 turns of the user" in (tmp_path / "short" / "card.md").read_text()
    assert "Shortened" not in (tmp_path / "whole" / "card.md").read_text()


def test_sources_are_read_in_order_with_their_own_settings(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(
            tmp_path / f"part-{name}.jsonl",
            [{"ask": f"{name} {n}", "say": "Yes.", "who": n % 7} for n in range(20)],
        )
    save(tmp_path / "other.jsonl", pairs(20))
    columns_ = {"prompt": "ask", "completion": "say"}
    globbed = {"path": str(tmp_path / "part-*.jsonl"), "columns": columns_, "group_column": "who", "rows": 30}
    rejected = {"path": str(tmp_path / "other.jsonl"), "use": "rejected"}
    settings = config("conversation", sources=[globbed, rejected], split={"eval_fraction": 0.3})
    metrics, said = curate(settings, tmp_path / "out")
    assert metrics["rows_in"] == 50
    info = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [(at["name"], at["format"], at["rows"]) for at in info["sources"]] == [
        ("part-a.jsonl", "prompt_completion", 20),
        ("part-b.jsonl", "prompt_completion", 10),
        ("other.jsonl", "preference", 20),
    ]
    assert info["sources"][2]["use"] == "rejected"
    assert "part-a.jsonl: 20 rows, format prompt_completion" in said
    rows = [row for side in ("train", "eval") for row in read_split(tmp_path / "out", side)]
    by_source = {row["source"]: row for row in rows}
    assert by_source["part-a.jsonl:9"]["group"] == "1"
    assert by_source["other.jsonl:1"]["messages"][-1]["content"] == "No, 0!"


def test_a_new_file_behind_a_glob_reruns_the_stage(tmp_path: Path) -> None:
    settings = config("preference", str(tmp_path / "part-*.jsonl"))
    save(tmp_path / "part-1.jsonl", pairs(60))
    sink = Console(file=io.StringIO())
    assert execute_stage("curate", settings, tmp_path / "run", console=sink).status == "completed"
    assert execute_stage("curate", settings, tmp_path / "run", console=sink).status == "skipped"
    save(tmp_path / "part-2.jsonl", pairs(80))
    again = execute_stage("curate", settings, tmp_path / "run", console=sink)
    assert (again.status, again.manifest["metrics"]["rows_out"]) == ("completed", 80)


def test_generator_rows_keep_their_facts(tmp_path: Path) -> None:
    source = {"generator": "support_desk", "rows": 120, "options": {"label_noise": 0.5}}
    curate(config("preference", sources=[source], seed=3), tmp_path / "one")
    curate(config("preference", sources=[source], seed=3), tmp_path / "two")
    curate(config("preference", sources=[{**source, "seed": 4}], seed=3), tmp_path / "three")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one")["train.parquet"] != digests(tmp_path / "three")["train.parquet"]
    meta = json.loads(read_split(tmp_path / "one", "train", "preference")[0]["meta"])
    assert {"facts", "gold_chosen", "gold_rejected", "flipped"} <= set(meta)


def test_length_filters_count_what_they_drop(tmp_path: Path) -> None:
    texts = [{"text": f"{n:03}" * length} for n in range(20) for length in (1, 3, 9)]
    settings = config(
        "text",
        save(tmp_path / "a.jsonl", texts),
        filters={"min_chars": 5, "max_chars": 20},
        split={"eval_fraction": 0.5},
    )
    metrics, _ = curate(settings, tmp_path / "out")
    assert metrics["drops"] == {"too_long": 20, "too_short": 20} and metrics["rows_out"] == 20


def test_a_few_bad_rows_are_dropped_and_written_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    save(file, pairs(300))
    with file.open("a") as stream:
        stream.write('{"prompt": "x", "chosen": \n{"prompt": "x", "chosen": "<b>", "rejected": "<b>"}\n')
    metrics, said = curate(config("preference", str(file)), tmp_path / "out")
    assert metrics["drops"] == {"identical_sides": 1, "malformed_json": 1}
    assert "dropped 1 of 302 rows: identical_sides" in said
    dropped = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(at["line"], at["reason"]) for at in dropped] == [
        (301, "malformed_json"),
        (302, "identical_sides"),
    ]
    assert dropped[0]["excerpt"] == '{"prompt": "x", "chosen":'


def test_report_escapes_the_data_and_needs_no_network(tmp_path: Path) -> None:
    rows = [{"text": f"<script>alert({n})</script> & more"} for n in range(40)]
    curate(config("text", save(tmp_path / "<i>.jsonl", rows)), tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;alert(" in page
    assert not re.search(r"(src|href|url|@import)\s*[=(:]", page)
    assert page.count('class="turn text"') == 9 and page.count("<svg") == 1


BAD_ROLE = {"messages": [{"role": "wizard", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
GOOD_TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_labelled_answers(tmp_path: Path) -> None:
    """The label is part of the content: the same answer with both labels is kept twice, with one once."""
    rows = [
        {"prompt": f"Question {n}?", "completion": f"Answer {n}.", "label": n % 4 != 0} for n in range(40)
    ]
    rows += [rows[1], {**rows[1], "label": False}]
    settings = config("unpaired_preference", save(tmp_path / "a.jsonl", rows))
    metrics, said = curate(settings, tmp_path / "run")
    assert "a.jsonl: 42 rows, format unpaired_preference" in said
    assert (metrics["rows_out"], metrics["drops"]) == (41, {"duplicate": 1})
    kept = [row for split in ("train", "eval") for row in read_split(tmp_path / "run", split).to_list()]
    assert list(kept[0]) == columns("unpaired_preference")
    assert {(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in kept} == {
        (row["prompt"], row["completion"], row["label"]) for row in rows
    }
    info = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert info["lengths"]["desirable_share"] == pytest.approx(30 / 41, abs=1e-4)
    assert info["lengths"]["undesirable"]["min"] == len("Answer 0.")
    for file in ("card.md", "report.html"):
        assert "73.2% of the answers are labelled desirable." in (tmp_path / "run" / file).read_text()
    assert "<b>undesirable</b>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "rows", "block", "says"),
    [
        (
            "conversation",
            [GOOD_TALK, BAD_ROLE],
            {},
            r"unknown_role \(1\), first at a.jsonl:2: unknown role 'wizard'",
        ),
        (
            "conversation",
            [BAD_ROLE],
            {"max_reject_fraction": 1.0},
            r"none of the 1 rows is left \(unknown_role 1\)",
        ),
        ("text", [], {}, "a.jsonl: no rows"),
        ("text", [{"text": "a"}], {"filters": {"min_chars": 5}}, "none of the 1 rows is left"),
        ("text", [{"body": "a"}], {}, "cannot tell the format from the fields body"),
        (
            "conversation",
            [{**GOOD_TALK, "label": True}],
            {},
            r"unpaired_preference rows, which cannot become kind conversation\n.*the rows labelled true",
        ),
        (
            "unpaired_preference",
            [{**GOOD_TALK, "label": True}, {**GOOD_TALK, "label": "good"}],
            {},
            r"label_not_boolean \(1\), first at a.jsonl:2: the label must be true or false, got str: good",
        ),
        (
            "unpaired_preference",
            [{"prompt": "Hi", "completion": "Hello", "label": True}, {"prompt": "Hi", "label": False}],
            {},
            r"missing_field \(1\), first at a.jsonl:2: no field 'completion' or 'response'",
        ),
        ("preference", [{"text": "a"}], {}, "holds text rows, which cannot become kind preference"),
        ("conversation", [GOOD_TALK], {}, "a split by group needs several groups"),
        (
            "text",
            [{"text": str(n)} for n in range(5)],
            {"split": {"eval_fraction": 0.001}},
            "leaves the eval side empty",
        ),
        (
            "text",
            [{"text": str(n)} for n in range(5)],
            {"split": {"eval_fraction": 0.999}},
            "leaves the train side empty",
        ),
    ],
)
def test_refusals_write_nothing(
    tmp_path: Path, kind: str, rows: list[Any], block: dict[str, Any], says: str
) -> None:
    settings = config(kind, save(tmp_path / "a.jsonl", rows), **block)
    with pytest.raises(DataError, match=says) as caught:
        execute_stage("curate", settings, tmp_path / "run", console=Console(file=io.StringIO()))
    assert caught.value.exit_code == 2
    assert "\n    " in str(caught.value)
    assert not {file.name for file in (tmp_path / "run").iterdir()} & set(DATASET_FILES)
    assert not list((tmp_path / "run").glob(".staging-*"))
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "failed"


def test_generator_refusals(tmp_path: Path) -> None:
    cases = {"label_noise": 2.0, "label_nois": 0.1}
    for number, (name, value) in enumerate(cases.items()):
        source = {"generator": "support_desk", "rows": 5, "options": {name: value}}
        with pytest.raises(DataError, match=name):
            curate(config("preference", sources=[source]), tmp_path / str(number))


def test_hh_rlhf_ingests_for_every_kind(tmp_path: Path) -> None:
    source = shared("hh_rlhf/harmless-base/test.jsonl.gz")
    unusable = {"empty_content": 4, "prompt_mismatch": 5, "roles_not_alternating": 4}
    for kind in ("text", "conversation", "preference", "prompt"):
        metrics, said = curate(config(kind, source), tmp_path / kind)
        assert metrics["rows_in"] == 2312
        assert {reason: metrics["drops"][reason] for reason in unusable} == unusable
        assert metrics["rows_out"] == 2312 - sum(metrics["drops"].values())
        assert "format hh" in said
    assert metrics["drops"] == {"duplicate": 2, **unusable}
    rows = [row for side in ("train", "eval") for row in read_split(tmp_path / "preference", side)]
    row = next(row for row in rows if row["source"] == "test.jsonl.gz:1")
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert row["chosen"][0]["content"].startswith("No, sorry!  All of these involve a pen")


@pytest.mark.parametrize(
    ("name", "kind", "form", "rows_in", "drops"),
    [
        ("alpaca_en_demo.json", "conversation", "alpaca", 999, {"duplicate": 14}),
        ("alpaca_zh_demo.json", "conversation", "alpaca", 1000, {"duplicate": 8}),
        ("dpo_en_demo.json", "preference", "preference", 300, {"duplicate": 5}),
        ("glaive_toolcall_en_demo.json", "conversation", "sharegpt", 300, {"duplicate": 35}),
        ("v1_sft_demo.jsonl", "conversation", "messages", 500, {"duplicate": 1}),
        ("c4_demo.jsonl", "text", "text", 300, {}),
    ],
)
def test_public_files_ingest_by_path_alone(
    tmp_path: Path, name: str, kind: str, form: str, rows_in: int, drops: dict[str, int]
) -> None:
    metrics, said = curate(config(kind, shared(f"llamafactory_demo/data/{name}")), tmp_path / "out")
    assert (metrics["rows_in"], metrics["drops"]) == (rows_in, drops)
    assert f"format {form}" in said


def test_gsm8k_ingests_with_renamed_columns(tmp_path: Path) -> None:
    path = shared("gsm8k/grade_school_math/data/test.jsonl")
    source = {
        "path": path,
        "format": "prompt_completion",
        "columns": {"prompt": "question", "completion": "answer"},
    }
    metrics, _ = curate(config("conversation", sources=[source]), tmp_path / "out")
    assert (metrics["rows_in"], metrics["rows_out"]) == (1319, 1319)
