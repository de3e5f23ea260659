"""A small study for tests, with a clock that they set, who votes in it, and the web application."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from typer.testing import CliRunner

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.app import Annotation, make_app
from eval.annotate.assignment import Task
from eval.annotate.database import Database
from eval.annotate.security import Origins
from eval.annotate.store import Study, add_annotator, create_study
from eval.annotate.study import StudyConfig, load_items
from eval.annotate.votes import Opinion
from posttrain.cli import app

MODELS = ("aardvark-7b", "zebra-70b")
NOON = 1_790_000_000.0
URL = "http://127.0.0.1:8090"
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


def answers(number: int) -> dict[str, Any]:
    """One line as the eval stage writes it."""
    texts = {MODELS[0]: {"text": f"Left answer {number}."}, MODELS[1]: {"text": f"Right answer {number}!"}}
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"id": f"q{number:03}", "prompt": prompt, "answers": texts}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@dataclass
class World:
    """A study in a database, and a clock."""

    database: Database
    study: Study
    now: float = NOON
    ids: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def person(self, name: str, role: str = "annotator") -> str:
        """The id of an annotator, who is added the first time."""
        if name not in self.ids:
            self.tokens[name] = add_annotator(self.database, self.study, name, role)
            with self.database.reading() as session:
                rows = session.run("SELECT id FROM annotators WHERE name = :name", name=name)
            self.ids[name] = rows[0]["id"]
        return self.ids[name]

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            return session.run(sql, **values)

    def app(self, origins: Origins | None = None) -> Any:
        return make_app(Annotation(self.database, self.study, origins or Origins(), self.clock))


def make_world(
    folder: Path, url: str | None = None, rows: list[dict[str, Any]] | None = None, **settings: Any
) -> World:
    """A study of 6 items, unless `rows` are given."""
    file = write_rows(folder / "samples.jsonl", rows or [answers(number) for number in range(6)])
    config = StudyConfig.model_validate({"name": "test", "items": file, **settings})
    database = Database(url or str(folder / "study.db"))
    return World(database, create_study(database, config, load_items(config)))


Make = Callable[..., World]


def current(world: World, name: str) -> Task | None:
    person = world.person(name)
    with world.database.writing() as session:
        return assignments.current(session, world.study, person, world.now)


def task_of(world: World, name: str) -> Task:
    found = current(world, name)
    assert found is not None
    return found


def vote(world: World, name: str, task: Task, choice: str = "a", opinion: Opinion | None = None) -> bool:
    world.now += 1
    return votes.vote(
        world.database,
        world.study,
        world.person(name),
        task.assignment,
        task.nonce,
        choice,
        opinion or Opinion(),
        world.now,
    )


def undo(world: World, name: str) -> str:
    """Undo the last thing; which it was."""
    world.now += 1
    person = world.person(name)
    with world.database.reading() as session:
        last = votes.last_done(session, person)
    key = last["key"] if last else ""
    votes.undo(world.database, world.study, world.person(name), key, world.now)
    return str(key)


def check_places(world: World) -> None:
    """`taken` is what it says, and no item is over its overlap."""
    wrong = world.rows(
        "SELECT name FROM items WHERE taken <> (SELECT COUNT(*) FROM assignments s WHERE s.item = items.id "
        "AND s.state IN ('open', 'voted')) OR (is_gold = 0 AND taken > :overlap)",
        overlap=world.study.config.overlap,
    )
    assert not wrong


def client(world: World, origin: Origins | None = None, **options: Any) -> TestClient:
    return TestClient(world.app(origin), base_url=URL, follow_redirects=False, **options)


def send(
    browser: TestClient, path: str, fields: dict[str, str], origin: str | None = URL, **headers: str
) -> Any:
    return browser.post(path, data=fields, headers={**({"Origin": origin} if origin else {}), **headers})


def log_in(browser: TestClient, token: str) -> Any:
    form = dict(HIDDEN.findall(browser.get("/login").text))
    return send(browser, "/login", {**form, "token": token})


def logged_in(world: World, name: str = "ann", role: str = "annotator") -> TestClient:
    world.person(name, role)
    browser = client(world)
    assert log_in(browser, world.tokens[name]).status_code == 303
    return browser


def vote_form(page: str) -> dict[str, str]:
    return dict(HIDDEN.findall(page.partition('action="/vote"')[2]))


def vote_all(world: World, name: str, wanted: dict[str, str], seconds: float = 5.0) -> None:
    """Votes of `name` on everything: question -> the text that the better answer begins with, or a choice."""
    person = world.person(name)
    while True:
        with world.database.writing() as session:
            task = assignments.current(session, world.study, person, world.now)
        if task is None:
            return
        world.now += seconds
        want = wanted.get(task.prompt[0]["content"], "Left")
        begins = [text.startswith(want) for text in task.answers]
        choice = "ab"[begins.index(True)] if any(begins) else want
        comment = "because, äöü" if choice == "b" else ""
        opinion = Opinion({"helpful": "a"} if choice == "a" else {}, comment)
        votes.vote(
            world.database, world.study, person, task.assignment, task.nonce, choice, opinion, world.now
        )


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["annotate", *arguments])
