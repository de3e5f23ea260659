"""`posttrain feedback`: votes and flagged samples as data sets that the curate stage takes."""

from __future__ import annotations

import io
import json
import random
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_prep.config import CurateConfig, SourceConfig
from data_prep.dataset import read_split
from posttrain.cli import app
from posttrain.errors import DataError, UserError
from posttrain.hashing import hash_file
from posttrain.stage import execute_stage
from serving.monitor.feedback import export, preferences
from serving.monitor.store import Conversation, Entry, RequestRow, Store

NOON = 1_790_000_000.0
COLUMNS = (
    "id TEXT PRIMARY KEY, time REAL, model TEXT, messages TEXT, version_a TEXT, version_b TEXT, "
    "answer_a TEXT, answer_b TEXT, choice TEXT, sampling TEXT, key TEXT, comment TEXT"
)


def ask(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Where is order K{number}?"}]


def vote(
    choice: str, *, number: int = 0, key: str = "anonymous", swap: bool = False, **more: Any
) -> dict[str, Any]:
    """A vote between "old" and "new" answers; with `swap` the new one stands left."""
    found = {
        "messages": json.dumps(ask(number)),
        "version_a": "desk@v1",
        "version_b": "desk@v2",
        "answer_a": f"old {number}",
        "answer_b": f"new {number}",
        "choice": choice,
        "key": key,
        "time": NOON + number,
        **more,
    }
    if swap:
        for name in ("version", "answer"):
            found[f"{name}_a"], found[f"{name}_b"] = found[f"{name}_b"], found[f"{name}_a"]
    return found


def write_votes(path: Path, votes: list[dict[str, Any]]) -> Path:
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE votes ({COLUMNS})")
    fixed = {"model": "desk", "sampling": "{}", "comment": None}
    for number, row in enumerate(votes):
        full = {"id": f"vote-{number:04}", **fixed, **row}
        names = ", ".join(full)
        places = ", ".join("?" * len(full))
        connection.execute(f"INSERT INTO votes ({names}) VALUES ({places})", list(full.values()))
    connection.commit()
    connection.close()
    return path


def left_out(votes: list[dict[str, Any]], min_votes: int = 1) -> dict[str, int]:
    return dict(+preferences(votes, min_votes).left_out)


def curate(path: Path, kind: str, run: Path) -> Any:
    config = CurateConfig(kind=kind, sources=[SourceConfig(path=str(path))], split={"eval_fraction": 0.2})
    return execute_stage("curate", config, run, console=Console(file=io.StringIO()))


def test_votes_become_a_data_set_that_is_curated(tmp_path):
    votes = [vote("b", number=number) for number in range(30)] + [vote("tie"), vote("both_bad", number=1)]
    output = tmp_path / "prefs.jsonl"
    lineage = export(write_votes(tmp_path / "m.db", votes), output)
    assert stat.S_IMODE(output.stat().st_mode) == 0o600, "as the database"
    row = json.loads(output.read_text(encoding="utf-8").splitlines()[3])
    assert row == {
        "prompt": ask(3),
        "chosen": [{"role": "assistant", "content": "new 3"}],
        "rejected": [{"role": "assistant", "content": "old 3"}],
        "votes": {"chosen": 1, "rejected": 0},
        "versions": {"chosen": ["desk@v2"], "rejected": ["desk@v1"]},
    }
    assert lineage == json.loads((tmp_path / "prefs.lineage.json").read_text(encoding="utf-8"))
    assert lineage["source"]["rows"] == 32
    assert (lineage["source"]["first"], lineage["source"]["last"]) == (
        "2026-09-21T14:13:20+00:00",
        "2026-09-21T14:13:49+00:00",
    )
    assert lineage["left_out"] == {"both_bad": 1, "tie": 1}
    assert lineage["versions"] == {"desk@v1": 30, "desk@v2": 30}
    assert lineage["output"] == {"file": "prefs.jsonl", "rows": 30, "sha256": hash_file(output)}
    done = curate(output, "preference", tmp_path / "run")
    assert done.status == "completed"
    train, held_out = (read_split(tmp_path / "run", split, "preference") for split in ("train", "eval"))
    assert len(train) + len(held_out) == 30
    assert {side["chosen"][0]["content"][:3] for side in train} == {"new"}


def test_the_same_rows_have_the_same_hash_and_others_another(tmp_path):
    hashes = []
    for name, choices in (("a", "ab"), ("b", "ab"), ("c", "bb")):
        votes = [vote(choice, number=number) for number, choice in enumerate(choices)]
        lineage = export(write_votes(tmp_path / f"{name}.db", votes), tmp_path / f"{name}.jsonl")
        hashes.append(lineage["source"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_majority_decides_wherever_the_answers_stood():
    (row,) = preferences([vote("b"), vote("a", swap=True), vote("a")]).rows
    assert row["chosen"][0]["content"] == "new 0"
    assert row["votes"] == {"chosen": 2, "rejected": 1}


@pytest.mark.parametrize(
    ("votes", "reasons"),
    [
        ([vote("a"), vote("b")], {"undecided": 2}),
        ([vote("a"), vote("a"), vote("b")], {"outvoted": 1}),
        ([vote("a", key="ann"), vote("a", key="ann")], {"repeated": 1}),
        ([vote("a", key="ann"), vote("b", key="ann")], {"changed": 1}),
        ([vote("a", key="ann"), vote("tie", key="ann")], {"changed": 1, "tie": 1}),
        ([vote("a", key="ann"), vote("b", key="bob")], {"undecided": 2}),
        ([vote("a", answer_b="old 0")], {"identical_answers": 1}),
        ([vote("a", answer_b="old  0")], {"identical_sides": 1}),
        ([vote("a", answer_b=" ")], {"empty_content": 1}),
        ([vote("a", messages='[{"role": "assistant", "content": "Hi"}]')], {"first_turn_not_user": 1}),
    ],
)
def test_what_is_left_out_is_counted(votes, reasons):
    assert left_out(votes) == reasons


def test_too_few_votes():
    votes = [vote("a"), vote("a"), vote("a", number=1)]
    assert left_out(votes, 2) == {"too_few_votes": 1}
    assert [row["prompt"] for row in preferences(votes, 2).rows] == [ask(0)]


def test_every_vote_is_counted_once():
    rng = random.Random(0)
    votes = [
        vote(
            rng.choice(["a", "b", "tie", "both_bad"]),
            number=rng.randrange(12),
            key=rng.choice(["anonymous", "ann", "bob"]),
            swap=rng.random() < 0.5,
        )
        for _ in range(300)
    ]
    found = preferences(votes, 4)
    assert found.rows
    assert sum(found.left_out.values()) + sum(row["votes"]["chosen"] for row in found.rows) == 300
    assert found.counts["contradictory_pairs"] > 0


def flagged_database(path: Path) -> Path:
    store = Store(path, 50, 30, clock=lambda: NOON)
    fields = {"time": NOON, "model": "desk", "version": "v1", "endpoint": "/v1/completions", "status": 200}
    for number in range(20):
        request = RequestRow(id=f"r{number}", stream=False, key="ann", **fields)
        store.write([Entry(request, Conversation(ask(number), f"answer {number}"))])
    for number in range(12):
        store.flag(f"r{number}", "ann", ("up", "down", "drift")[number % 3], "so it is")
    store.close()
    return path


def test_flagged_samples_become_labelled_answers_that_are_curated(tmp_path):
    database, output = flagged_database(tmp_path / "m.db"), tmp_path / "labelled.jsonl"
    done = CliRunner().invoke(
        app, ["feedback", str(database), "--flagged", "--output", str(output), "--json"]
    )
    assert done.exit_code == 0, done.output
    lineage = json.loads(done.stdout)
    assert lineage["counts"] == {"down": 4, "flagged": 12, "up": 4}
    assert lineage["left_out"] == {"other_flag": 4}
    assert lineage["versions"] == {"desk@v1": 8}
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows[1]["label"] is False
    assert rows[1]["completion"] == [{"role": "assistant", "content": "answer 1"}]
    assert curate(output, "unpaired_preference", tmp_path / "run").status == "completed"
    assert len(read_split(tmp_path / "run", "train", "unpaired_preference")) >= 4


def test_nothing_to_learn_from_is_an_error(tmp_path):
    database = write_votes(tmp_path / "m.db", [vote("tie"), vote("a", number=1), vote("b", number=1)])
    with pytest.raises(DataError, match=r"no vote makes a row \(3 read; tie: 1, undecided: 2\)"):
        export(database, tmp_path / "prefs.jsonl")
    assert not (tmp_path / "prefs.jsonl").exists()


@pytest.mark.parametrize(
    ("database", "arguments", "message"),
    [
        ("absent.db", [], "absent.db: no such file"),
        ("text.db", [], "cannot be read as an SQLite database"),
        ("empty.db", [], "no such table: votes"),
        ("empty.db", ["--flagged"], "no such table: samples"),
        ("votes.db", ["--output", "x/prefs.jsonl"], "there is no directory x"),
        ("votes.db", ["--output", "prefs.json"], "is no .jsonl file"),
        ("votes.db", ["--min-votes", "2"], "too_few_votes: 1"),
    ],
)
def test_a_mistake_is_named_and_exits_with_2(tmp_path, monkeypatch, database, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("text.db").write_text("not a database\n" * 100)
    sqlite3.connect("empty.db").close()
    Path("empty.db").touch()
    write_votes(Path("votes.db"), [vote("a")])
    done = CliRunner().invoke(app, ["feedback", database, "--output", "prefs.jsonl", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(Path().glob("**/prefs*"))


def test_reading_does_not_change_the_database(tmp_path):
    database = write_votes(tmp_path / "m.db", [vote("a")])
    before = hash_file(database)
    export(database, tmp_path / "prefs.jsonl")
    assert hash_file(database) == before
    with pytest.raises(UserError):
        export(database, tmp_path / "prefs.txt")
