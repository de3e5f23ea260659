"""`posttrain data export`: every type through TRL's own functions, and back through our reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from trl.data_utils import (
    extract_prompt,
    is_conversational,
    maybe_apply_chat_template,
    unpair_preference_dataset,
)
from typer.testing import CliRunner

from data_prep.config import SourceConfig
from data_prep.dataset import CONTENT_COLUMNS, Kind, read_split
from data_prep.export import STYLES, TYPES, Exported, export
from data_prep.ingest import read_file
from posttrain.cli import app
from posttrain.errors import UserError
from tests.integration.test_curate import config, curate, save

ROWS: dict[Kind, list[dict[str, Any]]] = {
    "text": [{"text": f'Line {n}\n"quoted" \u2028 ü'} for n in range(40)],
    "conversation": [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"Why {n}?"},
                {"role": "assistant", "content": "So."},
                {"role": "user", "content": " And? "},
                {"role": "assistant", "content": f"Answer {n}\n"},
            ]
        }
        for n in range(40)
    ],
    "preference": [
        {"prompt": f"Why {n}?", "chosen": f"Because {n}.", "rejected": f"No {n}."} for n in range(40)
    ],
    "unpaired_preference": [
        {"prompt": f"Why {n}?", "completion": f"Because {n}.", "label": n % 3 > 0} for n in range(40)
    ],
    "prompt": [{"prompt": f"Why {n}?"} for n in range(40)],
}
ASKED = [(to, kind) for to, kinds in TYPES.items() for kind in kinds]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for kind, rows in ROWS.items():
        curate(config(kind, save(folder / f"{kind}.jsonl", rows)), folder / kind)
    return {kind: folder / kind for kind in ROWS}


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return [
            {name: value for name, value in row.items() if value is not None}
            for row in pq.read_table(file).to_pylist()
        ]
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("to", "kind"), ASKED)
def test_conversational_rows_are_what_trl_takes(
    sets: dict[Kind, Path], tmp_path: Path, tiny_model_dir: Path, to: str, kind: Kind, suffix: str
) -> None:
    file = tmp_path / f"out{suffix}"
    done = export(sets[kind], to, file, split="both")
    rows = read(file)
    assert done.rows_out == len(rows) == (80 if (to, kind) == ("unpaired-preference", "preference") else 40)
    assert all(is_conversational(row) for row in rows) == (kind != "text")
    whole = [*read_split(sets[kind], "train").to_list(), *read_split(sets[kind], "eval").to_list()]
    if to == "preference-implicit":
        explicit = [extract_prompt(row) for row in rows]
        assert explicit == [{name: row[name] for name in CONTENT_COLUMNS["preference"]} for row in whole]
    if (to, kind) == ("unpaired-preference", "preference"):
        import datasets

        pairs = datasets.Dataset.from_list([{n: r[n] for n in CONTENT_COLUMNS["preference"]} for r in whole])
        theirs = unpair_preference_dataset(pairs).to_list()
        assert sorted(map(json.dumps, theirs)) == sorted(
            json.dumps({n: row[n] for n in theirs[0]}) for row in rows
        )
    standard = tmp_path / f"standard{suffix}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    said = export(sets[kind], to, standard, split="both", style="standard", tokenizer=str(tiny_model_dir))
    assert said.style == "standard"
    assert read(standard) == [maybe_apply_chat_template(row, tokenizer) for row in rows]


BACK: list[tuple[str, Kind]] = [
    ("language-modeling", "text"),
    ("language-modeling", "conversation"),
    ("prompt-completion", "conversation"),
    ("preference", "preference"),
    ("preference-implicit", "preference"),
    ("unpaired-preference", "unpaired_preference"),
    ("prompt-only", "prompt"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("to", "kind"), BACK)
def test_nothing_is_lost_on_the_way_back(
    sets: dict[Kind, Path], tmp_path: Path, to: str, kind: Kind, suffix: str
) -> None:
    file = tmp_path / f"out{suffix}"
    export(sets[kind], to, file)
    _, pairs = read_file(SourceConfig(path=str(file)), kind, file, file.name, None)
    records = [record for _, record in pairs]
    assert [record.content_columns() for record in records] == [  # type: ignore[union-attr]
        {name: row[name] for name in CONTENT_COLUMNS[kind]} for row in read_split(sets[kind], "train")
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_come_along(tmp_path: Path, suffix: str) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    rows = [{**row, "tools": tools} if n % 2 else row for n, row in enumerate(ROWS["conversation"])]
    curate(config("conversation", save(tmp_path / "a.jsonl", rows)), tmp_path / "set")
    file = tmp_path / f"out{suffix}"
    export(tmp_path / "set", "language-modeling", file, split="both")
    assert [json.loads(row["tools"]) for row in read(file) if "tools" in row] == [tools] * 20
    _, pairs = read_file(SourceConfig(path=str(file)), "conversation", file, file.name, None)
    found = [json.loads(record.meta).get("tools") for _, record in pairs]  # type: ignore[union-attr]
    assert sum(isinstance(text, str) and json.loads(text) == tools for text in found) == 20


def test_bad_wishes_are_told_and_nothing_is_written(sets: dict[Kind, Path], tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    for to, kind, said in (
        ("preference", "conversation", "give --to one of language-modeling, prompt-only, prompt-completion"),
        ("stepwise-supervision", "preference", "no kind of record holds the steps of an answer"),
        ("sft", "text", "--to sft: not known"),
    ):
        with pytest.raises(UserError, match=said):
            export(sets[kind], to, file)
    with pytest.raises(UserError, match="give --tokenizer"):
        export(sets["preference"], "preference", file, style="standard")
    with pytest.raises(UserError, match="name it .jsonl or .parquet"):
        export(sets["preference"], "preference", tmp_path / "out.csv")
    with pytest.raises(UserError, match="no such folder"):
        export(sets["preference"], "preference", tmp_path / "no" / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_when_asked(sets: dict[Kind, Path], tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("mine")
    arguments = ["data", "export", str(sets["prompt"]), "--to", "prompt-only", "--output", str(file)]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "is already there" in refused.output
    assert file.read_text() == "mine"
    done = CliRunner().invoke(app, [*arguments, "--force", "--json"])
    assert done.exit_code == 0, done.output
    assert Exported(**json.loads(done.stdout)).rows_out == len(read(file))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    help_ = CliRunner().invoke(app, ["data", "export", "--help"]).output
    assert all(name in " ".join(help_.split()) for name in TYPES if TYPES[name])
    assert all(style in help_ for style in STYLES)
