"""`posttrain data doctor` and `posttrain data show` from the command line; sources of Hub data sets."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from data_prep.browse import browse
from data_prep.config import CurateConfig
from data_prep.dataset import read_split
from posttrain.cli import app
from posttrain.cli_check import check_file
from posttrain.errors import DataError, UserError
from posttrain.stage import execute_stage

TALK = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}]}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talks(count: int) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Here."}]
    return [
        {"id": f"t{n}", "messages": [{**turns[0], "content": f"Where is {n}?"}, turns[1]]}
        for n in range(count)
    ]


def test_doctor_writes_a_configuration_that_check_accepts_and_curate_runs(tmp_path: Path) -> None:
    data = save(tmp_path / "talks.jsonl", [*talks(60), {"messages": []}])
    config = tmp_path / "out" / "ingest.yaml"
    done = run("data", "doctor", str(data), "--output", str(config))
    assert done.exit_code == 0, done.output
    assert "1 of 61 rows (1.6%) rejected as no_turns" in done.stderr and "wrote" in done.stderr
    assert check_file(config).problems == []
    done = run("curate", str(config), "--output", str(tmp_path / "run"), "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)["metrics"]
    assert (metrics["rows_in"], metrics["rows_out"], metrics["drops"]) == (61, 60, {"no_turns": 1})
    ids = {row["id"] for side in ("train", "eval") for row in read_split(tmp_path / "run", side).to_list()}
    assert ids == {f"t{n}" for n in range(60)}


def test_doctor_as_json_and_on_the_terminal(tmp_path: Path) -> None:
    data = save(tmp_path / "talks.jsonl", talks(30))
    done = run("data", "doctor", str(data), "--json")
    report = json.loads(done.stdout)
    assert report["files"][0]["rows"] == 30 and report["files"][0]["format"] == "messages"
    assert report["config"]["sources"] == [{"path": str(data), "format": "messages", "id_column": "id"}]
    done = run("data", "doctor", str(data))
    assert "roles: user 30, assistant 30" in done.stderr
    assert done.stdout.startswith("# Written by `posttrain data doctor")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.jsonl", None, "no such file"),
        ("a.jsonl", b"", "no rows"),
        ("a.parquet", b"x", "not a readable parquet file"),
        ("a.docx", b"x", "cannot read this file type"),
    ],
)
def test_doctor_exits_2_where_nothing_is_readable(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("data", "doctor", str(tmp_path / name))
    assert done.exit_code == 2 and says in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_doctor_looks_at_every_file_of_a_folder(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"{n}.jsonl", [{"text": f"text {n} {m}"} for m in range(20)])
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    done = run("data", "doctor", str(tmp_path))
    assert done.exit_code == 0
    assert "x.jsonl.gz: damaged or truncated gzip" in done.stderr.replace("\n", "")
    assert done.stdout.count("path:") == 1 and "*.jsonl" in done.stdout


def test_show_pages_and_searches(tmp_path: Path) -> None:
    data = save(tmp_path / "talks.jsonl", [*talks(30), {"messages": []}])
    found = json.loads(run("data", "show", str(data), "--rows", "2", "--from", "4", "--json").stdout)
    assert [(at["number"], at["messages"][0]["content"]) for at in found] == [
        (4, "Where is 3?"),
        (5, "Where is 4?"),
    ]
    found = json.loads(run("data", "show", str(data), "--grep", "where IS 2", "--json").stdout)
    assert [at["number"] for at in found] == [3, 21, 22, 23, 24]
    done = run("data", "show", str(data), "--from", "31")
    assert "31 (talks.jsonl:31)" in done.stdout and "rejected: no_turns" in done.stdout
    done = run("data", "show", str(data), "--grep", "nowhere")
    assert done.exit_code == 2 and "holds 'nowhere', of 31" in done.output


def test_show_does_not_let_data_steer_the_terminal(tmp_path: Path) -> None:
    data = save(tmp_path / "a.jsonl", [{"text": "\x1b[2J [bold]red \u202egnp.exe \u200fא"}])
    done = run("data", "show", str(data))
    assert "\x1b" not in done.stdout and "[bold]red" in done.stdout
    assert "\u202e" not in done.stdout and r"\u202egnp.exe" in done.stdout, "turns the rest of the line round"
    assert "\u200fא" in done.stdout


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """As `posttrain data show FILE --json | head -1` does; more is printed than a pipe holds."""
    data = save(tmp_path / "a.jsonl", [{"text": f"{n} " + "word " * 400} for n in range(100)])
    command = [sys.executable, "-m", "posttrain", "data", "show", str(data), "--rows", "100", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as show:
        assert show.stdout is not None and show.stderr is not None
        assert show.stdout.readline() == b"[\n"
        show.stdout.close()
        assert show.stderr.read() == b""
    assert show.returncode == 1


@pytest.mark.parametrize("kind", ["conversation", "preference", "labelled", "prompt", "text"])
def test_show_renders_every_kind_of_a_data_set(
    kind: str, tiny_model_dir: Path, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(f"{kind}_data")
    (shown,) = browse(str(data), rows=1, tokenizer=str(tiny_model_dir))
    titles = {
        "conversation": ["dialogue"],
        "preference": ["prompt", "chosen", "rejected"],
        "prompt": ["prompt"],
        "text": ["text"],
    }
    assert shown.record is not None
    expected = titles.get(
        kind, ["prompt", "desirable" if shown.record.turns()[-1][0] == "desirable" else "undesirable"]
    )
    assert [part.title for part in shown.rendered] == expected
    assert all(part.tokens > 0 for part in shown.rendered)


def test_show_tells_what_is_trained_on(
    conversation_data: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """With the template's generation markers: the assistant's turns and the end of turn, nothing else."""
    (shown,) = browse(str(conversation_data), rows=1, tokenizer=str(tiny_model_dir))
    assert shown.record is not None
    (part,) = shown.rendered
    answers = [content for role, content in shown.record.turns() if role == "assistant"]
    trained = [text for text, is_trained in part.pieces if is_trained]
    assert [text.split("<|im_end|>")[0] for text in trained] == answers
    assert part.trained == sum(len(tiny_tokenizer(text)["input_ids"]) for text in trained)
    console = Console(file=io.StringIO(), width=200)
    shown.print(console)
    assert f">>>{answers[0]}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_show_refuses(tmp_path: Path, text_data: Path, conversation_data: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'"):
        browse(str(text_data), split="test")
    with pytest.raises(DataError, match="no such file"):
        browse(str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no known format"):
        browse(str(save(tmp_path / "a.jsonl", [{"n": 1}])))
    with pytest.raises(UserError, match="no such model"):
        browse(str(text_data), tokenizer=str(tmp_path / "gone"))


def hub_folder(tmp_path: Path, count: int = 60) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("form", ["hub", "path"])
def test_a_data_set_is_read_through_datasets(tmp_path: Path, form: str) -> None:
    folder = hub_folder(tmp_path)
    source = {"hub": str(folder)} if form == "hub" else {"path": f"hub:{folder}"}
    config = CurateConfig.model_validate({"kind": "conversation", "sources": [{**source, "licence": "MIT"}]})
    digests = []
    for name in ("one", "two"):
        execute_stage("curate", config, tmp_path / name, console=Console(file=io.StringIO()))
        info = json.loads((tmp_path / name / "dataset.json").read_text())
        digests.append((info["content_hash"], info["sources"][0]["sha256"]))
    assert digests[0] == digests[1] and len(digests[0][1]) == 64
    (at,) = info["sources"]
    assert (at["name"], at["rows"], at["format"]) == ("hub/train", 60, "prompt_completion")
    assert at["licence"] == "MIT"
    split = CurateConfig.model_validate({**config.model_dump(), "sources": [{**source, "split": "test"}]})
    with pytest.raises(DataError, match="eval side empty"):
        execute_stage("curate", split, tmp_path / "three", console=Console(file=io.StringIO()))


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    source = {"hub": str(hub_folder(tmp_path)), "split": "validation"}
    config = CurateConfig.model_validate({"kind": "conversation", "sources": [source]})
    with pytest.raises(DataError, match="split validation: datasets does not load it"):
        execute_stage("curate", config, tmp_path / "run", console=Console(file=io.StringIO()))
