"""A small study for tests, with a clock that they set, and the application without a server around it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.annotate.app import Annotation, make_app
from eval.annotate.database import Database
from eval.annotate.security import Origins
from eval.annotate.store import Study, add_annotator, create_study
from eval.annotate.study import StudyConfig, load_items

MODELS = ("aardvark-7b", "zebra-70b")
NOON = 1_790_000_000.0


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
