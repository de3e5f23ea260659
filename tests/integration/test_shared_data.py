"""Public data as it is published: rows as the manifest counts them, ingested by the configuration that
`posttrain data doctor` writes for the path alone.
"""

from __future__ import annotations

import csv
import io
import os
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.doctor.command import diagnose
from data_prep.files import read_rows
from posttrain.cli_check import check_file
from posttrain.stage import execute_stage
from posttrain.stage_file import load_stage_file

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
HEADERLESS = ("abstract_algebra_test.csv", "high_school_us_history_test.csv", "sociology_test.csv")
"""MMLU's files have no header; the manifest took their first row for one."""
HANDFUL = (
    "hh_rlhf/harmless-base/test.jsonl.gz",
    "gsm8k/grade_school_math/data/test.jsonl",
    "alpaca_seed/seed_tasks.jsonl",
    "ifeval/data/input_data.jsonl",
    "mt_bench/fastchat/llm_judge/data/mt_bench/question.jsonl",
    "truthfulqa/datasets/TruthfulQA.csv",
    "llamafactory_demo/data/kto_en_demo.json",
    "llamafactory_demo/data/reason_tool_use_demo_50.jsonl",
    "llamafactory_demo/data/v1_dpo_demo.jsonl",
    "llamafactory_demo/data/wiki_demo.txt",
    "decontaminator/data/rephrase/sociology_test.csv",
)
NO_TEXT = ("dataset_info.json", "average-accuracy-values.csv")
"""A registry of data sets, and a table of figures: rows, but nothing to train on."""


@cache
def counts() -> dict[str, int]:
    """Rows of every file of the manifest that has a number of them, by path."""
    manifest = SHARED / "MANIFEST.tsv"
    if not manifest.is_file():
        return {}
    with manifest.open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    found = {f"{row['name']}/{row['path']}": row["rows"] for row in rows}
    # A licence is no data; the manifest counts its lines.
    numbers = {name: int(n) for name, n in found.items() if n.isdigit() and "LICENSE" not in name}
    return {name: n + (Path(name).name in HEADERLESS) for name, n in numbers.items()}


def shared(name: str) -> Path:
    """A file of the shared test data, or a skip that says why."""
    if not (SHARED / name).is_file():
        pytest.skip(
            f"{SHARED / name} is not here; set POSTTRAIN_SHARED_DATA to the folder of shared test data"
        )
    return SHARED / name


def test_rows_equal_the_manifest() -> None:
    shared("MANIFEST.tsv")
    present = {name: n for name, n in counts().items() if (SHARED / name).is_file()}
    read = {name: sum(1 for _ in read_rows(SHARED / name)) for name in present}
    assert read == present and len(present) > 100


def test_files_that_the_manifest_could_not_read() -> None:
    """Lines that end with a carriage return alone; as many rows as the translations of MMLU's questions."""
    rows = list(read_rows(shared("hate_davidson/lexicons/refined_ngram_dict.csv")))
    assert len(rows) == 178 and rows[0] == (2, {"ngram": "allah akbar", "prophate": "0.87"})
    for name in HEADERLESS:
        file = shared(f"decontaminator/data/rephrase/{name}")
        translated = file.with_name(file.name.replace(".csv", "_chinese.jsonl"))
        assert sum(1 for _ in read_rows(file)) == sum(1 for _ in read_rows(translated))


@pytest.mark.parametrize("name", HANDFUL)
def test_the_doctor_writes_the_configuration_that_ingests(tmp_path: Path, name: str) -> None:
    ingest_with_the_doctor(shared(name), counts()[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(counts()) - set(HANDFUL)))
def test_every_other_file(tmp_path: Path, name: str) -> None:
    ingest_with_the_doctor(shared(name), counts()[name], tmp_path)


def ingest_with_the_doctor(file: Path, rows: int, tmp_path: Path) -> None:
    """Doctor, check and curate a file: all rows are read, and all are kept, dropped or rejected."""
    config = tmp_path / "config.yaml"
    found = diagnose([str(file)], config)
    assert found.readable and found.files[0].rows == rows
    if file.name in NO_TEXT:
        assert found.config is None
        return
    assert check_file(config).problems == []
    block = load_stage_file("curate", config)
    done = execute_stage("curate", block.config, tmp_path / "run", console=Console(file=io.StringIO()))
    metrics = done.manifest["metrics"]
    assert metrics["rows_in"] == rows
    assert metrics["rows_out"] + sum(metrics["drops"].values()) == rows
    asked_for = metrics["drops"].get("duplicate", 0)
    assert sum(metrics["drops"].values()) - asked_for == found.files[0].rejects.total()
    assert asked_for == found.files[0].contents.repeated
