"""The study file, and the commands `posttrain annotate ...`."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from annotation_study import NOON, World, answers, make_world, run, vote_all, write_rows

from eval.annotate.database import Database
from eval.annotate.store import add_annotator, create_study, open_study
from eval.annotate.study import StudyConfig, load_items, load_study
from posttrain.errors import ConfigError, DataError, UserError

ROOT = Path(__file__).parents[3]


def test_items_of_both_forms_and_of_several_models(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi?", "answer_a": "x", "answer_b": "y", "model_a": "m", "gold": "b"},
        {"id": "three", "prompt": "Hi?", "answers": {"a": "1", "b": "2", "c": "2"}},
        {"id": "empty", "prompt": "Hi?", "answers": {"a": "1", "b": " "}},
    ]
    config = StudyConfig(name="t", items=write_rows(tmp_path / "items.jsonl", rows))
    loaded = load_items(config)
    assert [(item.models, item.gold) for item in loaded.items] == [
        (("m", "b"), "second"),
        (("a", "b"), None),
        (("a", "c"), None),
    ]
    assert loaded.left_out == {"identical_answers": 1, "empty_answer": 1}
    some = load_items(StudyConfig(name="t", items=config.items, max_items=1, pairs=[("a", "b")]))
    assert len([item for item in some.items if item.gold is None]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ('{"answers": {}}', "no object with a `prompt`"),
        ('{"prompt": "x", "answers": {"a": "1"}}', "two or more models"),
        ('{"prompt": "x", "answer_a": "1", "answer_b": 2}', "'answer_b' is no text"),
        ('{"prompt": "x", "answer_a": "1", "answer_b": "2", "gold": "c"}', "gold is 'c'"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "answer_a": "1", "answer_b": "2"}',
            "not 'user'",
        ),
    ],
)
def test_a_bad_item_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"prompt": "x", "answer_a": "1", "answer_b": "2"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load_items(StudyConfig(name="t", items=str(file)))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_mistakes_are_named_with_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = write_rows(tmp_path / "items.jsonl", [answers(0)])
    (tmp_path / "bad.yaml").write_text(f"name: t\nitems: {items}\noverlapp: 2\n")
    (tmp_path / "notes.txt").write_text("no database, but long enough to be one" * 40)
    for arguments, words in (
        (["create", "bad.yaml"], "did you mean 'overlap'?"),
        (["create", "gone.yaml"], "no such file"),
        (["create", "name=t", "items=gone.jsonl"], "no such file"),
        (["create", "name=t", f"items={items}", "--database", "mysql://x/y"], "no database of this kind"),
        (["create", "name=t", f"items={items}", "--database", "no/folder/x.db"], "no directory"),
        (["create", "name=t", f"items={items}", "--database", "notes.txt"], "cannot be used as an SQLite"),
        (["report", "--database", "new.db"], "holds no study"),
        (["report", "--database", "postgresql://u:secret@127.0.0.1:1/x"], "cannot be connected to"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert words in done.output
        assert "secret" not in done.output
    assert run("create", "name=t", f"items={items}").exit_code == 0
    assert "already" in run("create", "name=t", f"items={items}").output
    assert run("annotators", "add", "two words").exit_code == 2
    assert run("annotators", "revoke", "nobody").exit_code == 2
    assert "0.0.0.0" in run("serve", "--host", "0.0.0.0").output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.exit_code == 2
    assert "cannot be listened on" in done.output


def test_a_locked_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    world.database.close()
    monkeypatch.setattr("eval.annotate.database.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    done = run("serve", "--database", str(tmp_path / "study.db"))
    other.close()
    assert done.exit_code == 2
    assert "is locked by another program" in done.output


def test_the_commands_from_study_to_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "samples.jsonl", [answers(n) for n in range(3)])
    (tmp_path / "study.yaml").write_text("name: t\nitems: .\noverlap: 1\n")
    assert load_study(Path("study.yaml")).items == "."
    assert json.loads(run("create", "study.yaml", "--json").stdout)["items"] == 3
    token = run("annotators", "add", "ann").stdout.strip()
    assert token.startswith("pa-")
    assert token.encode() not in Path("annotate.db").read_bytes()
    database = Database("annotate.db")
    world = World(database, open_study(database), NOON)
    world.ids["ann"] = world.rows("SELECT id FROM annotators")[0]["id"]
    vote_all(world, "ann", {})
    database.close()
    listed = json.loads(run("annotators", "list", "--json").stdout)
    assert [(row["name"], row["votes"], row["revoked"]) for row in listed] == [("ann", 3, None)]
    assert run("export", "--output", "prefs.jsonl").exit_code == 0
    assert len(Path("prefs.jsonl").read_text().splitlines()) == 3
    assert "3 of 3 votes" in run("report").stdout
    assert run("export", "--to", "label-studio", "--output", "tasks.json").exit_code == 0
    assert "there_already 3" in run("import", "tasks.json", "--from", "label-studio").output
    assert run("annotators", "revoke", "ann").exit_code == 0
    assert "revoked" in run("annotators", "list").stdout


def test_a_name_that_tells_a_model_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "samples.jsonl", [answers(0)])
    done = run("create", "name=Zebra-70B_first", "items=.")
    assert done.exit_code == 0
    assert "warning: annotators see name" in done.output
    assert "name zebra-70b" in done.output
    assert "warning" not in run("create", "name=aardvark-7bb", "items=.").output


def test_two_studies_in_one_database(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    create_study(
        world.database,
        world.study.config.model_copy(update={"name": "second"}),
        load_items(world.study.config),
    )
    with pytest.raises(UserError, match="--study: second, test"):
        open_study(world.database)
    second = open_study(world.database, "second")
    assert second.id != world.study.id
    add_annotator(world.database, second, "ann")
    world.person("bob")
    assert [
        row["name"] for row in world.rows("SELECT name FROM annotators WHERE study = :s", s=second.id)
    ] == ["ann"]
    world.database.close()


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with world.database.writing() as session:
        session.run("UPDATE schema_version SET version = 99")
    with pytest.raises(UserError, match="version 99"):
        open_study(world.database)
    world.database.close()


def test_help_imports_neither_web_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys, posttrain.cli\nsys.argv = ['posttrain', 'annotate', 'serve', '--help']\n"
        "try:\n    posttrain.cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'fastapi', 'jinja2', 'pg8000'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError):
        load_study(None, ["name=t", "items=x", "criteria=[a,a]"])
    with pytest.raises(ConfigError):
        load_study(None, ["name=t", "items=x", "pairs=[[a,a]]"])
