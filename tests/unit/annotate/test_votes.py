"""Votes, skips and undo, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest
from annotation_study import (
    Make,
    answers,
    check_places,
    current,
    make_world,
    task_of,
    undo,
    vote,
)

from eval.annotate import votes
from eval.annotate.database import Database
from eval.annotate.export import as_text, preferences
from eval.annotate.votes import Opinion, RefusedError


def test_a_vote_is_kept_as_the_answer_it_was_for(make: Make) -> None:
    world = make()
    task = task_of(world, "ann")
    vote(world, "ann", task, "b", Opinion({}, "NUL \0 and \ud800 and 'quotes'; DROP TABLE votes"))
    (row,) = world.rows(
        "SELECT i.*, v.*, s.swapped FROM votes v JOIN assignments s ON s.id = v.assignment "
        "JOIN items i ON i.id = s.item"
    )
    with world.database.reading() as session:
        (standing,) = votes.standing_votes(session, world.study)
    assert standing[f"{row['preferred']}_answer"] == task.answers[1]
    assert standing["comment"] == "NUL \0 and \ud800 and 'quotes'; DROP TABLE votes"
    assert row["seconds"] == 1.0


def test_the_same_vote_twice_is_one_and_another_is_refused(make: Make) -> None:
    world = make()
    task = task_of(world, "ann")
    assert vote(world, "ann", task, "a") is True
    assert vote(world, "ann", task, "a") is False
    with pytest.raises(RefusedError, match="undo it first"):
        vote(world, "ann", task, "tie")
    assert [row["choice"] for row in world.rows("SELECT choice FROM votes")] == ["a"]


def test_undo_opens_the_item_again_with_what_was_written(make: Make) -> None:
    world = make(criteria=["helpful"])
    task = task_of(world, "ann")
    vote(world, "ann", task, "a", Opinion({"helpful": "b"}, "because"))
    following = task_of(world, "ann")
    undone = undo(world, "ann")
    # Sent again, because the first answer was lost: still one vote taken back.
    votes.undo(world.database, world.study, world.person("ann"), undone, world.now)
    again = task_of(world, "ann")
    assert (again.assignment, again.answers) == (task.assignment, task.answers)
    assert (again.ratings, again.comment) == ({"helpful": "b"}, "because")
    assert again.nonce != task.nonce
    with pytest.raises(RefusedError, match="taken back"):
        vote(world, "ann", task, "a")
    vote(world, "ann", again, "b")
    assert task_of(world, "ann").assignment == following.assignment
    rows = world.rows("SELECT choice, withdrawn FROM votes ORDER BY time")
    assert [(row["choice"], row["withdrawn"] is None) for row in rows] == [("a", False), ("b", True)]
    check_places(world)


def test_undo_of_nothing_or_of_what_is_not_the_last(make: Make) -> None:
    world = make()
    with pytest.raises(RefusedError, match="not the last"):
        undo(world, "ann")
    first = task_of(world, "ann")
    vote(world, "ann", first)
    vote(world, "ann", task_of(world, "ann"))
    with pytest.raises(RefusedError, match="not the last"):
        votes.undo(world.database, world.study, world.person("ann"), first.nonce, world.now)


def test_a_skip_returns_the_item_and_can_be_undone(make: Make) -> None:
    world = make(rows=[answers(0)])
    task = task_of(world, "ann")
    skip = (world.database, world.study, world.person("ann"), task.assignment)
    with pytest.raises(RefusedError, match="reason"):
        votes.skip(*skip, "", "", world.now)
    votes.skip(*skip, "unclear", "what?", world.now)
    assert current(world, "ann") is None
    undo(world, "ann")
    assert task_of(world, "ann").comment == "what?"
    votes.skip(*skip, "unclear", "what?", world.now)
    vote(world, "bob", task_of(world, "bob"))
    with pytest.raises(RefusedError, match="Others have voted"):
        undo(world, "ann")
    check_places(world)


def test_an_item_of_somebody_else_is_none(make: Make) -> None:
    world = make()
    task = task_of(world, "ann")
    with pytest.raises(RefusedError, match="no such item"):
        vote(world, "bob", task)
    assert not world.rows("SELECT 1 AS n FROM votes")


def test_both_databases_export_the_same_bytes(tmp_path: Path, postgres: str | None) -> None:
    if postgres is None:
        pytest.skip("PostgreSQL cannot be started here; apt-get install postgresql")
    found = []
    for number, url in enumerate((None, postgres)):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = make_world(folder, url, overlap=3, criteria=["helpful"])
        for name in ("ann", "bob", "carol"):
            while (task := current(world, name)) is not None:
                left = "ab"[task.answers[1].startswith("Left")]
                choice = {"Question 1?": "tie", "Question 2?": "both_bad"}.get(
                    task.prompt[0]["content"], left
                )
                vote(world, name, task, choice, Opinion({"helpful": left}, "NUL \0, \ud800"))
        with world.database.reading() as session:
            standing = votes.standing_votes(session, world.study)
        found.append(as_text(preferences(standing).rows))
        if url is not None:
            with world.database.writing() as session:
                session.run("DROP SCHEMA annotate CASCADE")
        world.database.close()
    assert found[0] == found[1]
    assert found[0].count("\n") == 4


def test_undo_takes_the_last_vote_back_where_the_clock_was_set_back(make: Make) -> None:
    world = make()
    first = task_of(world, "ann")
    vote(world, "ann", first)
    world.now -= 3600
    second = task_of(world, "ann")
    vote(world, "ann", second)
    undo(world, "ann")
    standing = world.rows("SELECT assignment FROM votes WHERE withdrawn IS NULL")
    assert [row["assignment"] for row in standing] == [first.assignment]
    assert task_of(world, "ann").assignment == second.assignment


def test_connections_that_ended_with_postgresql_are_replaced(tmp_path: Path, postgres: str | None) -> None:
    if postgres is None:
        pytest.skip("PostgreSQL cannot be started here; apt-get install postgresql")
    world = make_world(tmp_path, postgres)
    other = Database(postgres)
    try:
        task = task_of(world, "ann")
        with other.writing() as session:
            ended = session.run(
                "SELECT COUNT(pg_terminate_backend(pid)) AS n FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND application_name = 'posttrain annotate'"
            )
        assert ended[0]["n"] >= 1
        assert vote(world, "ann", task)
        assert len(world.rows("SELECT nonce FROM votes")) == 1
    finally:
        with other.writing() as session:
            session.run("DROP SCHEMA annotate CASCADE")
        other.close()
        world.database.close()
