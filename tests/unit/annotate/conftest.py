"""A study to test with, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_study import Make, World, make_world

from eval.annotate import security

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from bench_annotate import private_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[str | None]:
    """A server of its own for these tests, None where none can be started."""
    try:
        with private_postgres("fsync=off") as url:
            yield url
    except RuntimeError:
        yield None


@pytest.fixture(params=["sqlite", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes a world in a fresh database of either kind."""
    made: list[World] = []
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")
        if url is None:
            pytest.skip("PostgreSQL cannot be started here; apt-get install postgresql")

    def build(**settings: object) -> World:
        made.append(make_world(tmp_path, url, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for world in made:
        if url is not None:
            with world.database.writing() as session:
                session.run("DROP SCHEMA annotate CASCADE")
        world.database.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path, overlap=2, criteria=["helpful"])
    yield made
    made.database.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "WRONG_SECONDS", 0.0)
