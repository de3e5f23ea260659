"""Who gets which item, leases and drafts, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from annotation_study import (
    NOON,
    Make,
    World,
    answers,
    check_places,
    current,
    task_of,
    vote,
    write_rows,
)

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.store import open_study
from eval.annotate.votes import Opinion, RefusedError


def test_everybody_gets_every_item_once_and_the_least_taken_first(make: Make) -> None:
    world = make(overlap=2)
    seen: dict[str, list[str]] = {"ann": [], "bob": []}
    for _ in range(6):
        for name in seen:
            task = task_of(world, name)
            seen[name].append(task.prompt[0]["content"])
            taken = [row["taken"] for row in world.rows("SELECT taken FROM items")]
            assert max(taken) - min(taken) <= 1
            vote(world, name, task)
    assert all(sorted(items) == [f"Question {n}?" for n in range(6)] for items in seen.values())
    assert current(world, "ann") is None
    assert current(world, "carol") is None
    check_places(world)


def test_the_order_of_answers_is_drawn_and_stays(make: Make) -> None:
    world = make(overlap=1, rows=[answers(n) for n in range(24)])
    left = 0
    for _ in range(24):
        task = task_of(world, "ann")
        assert task_of(world, "ann") == task
        left += task.answers[0].startswith("Left")
        vote(world, "ann", task)
    # Of 24 fair coins: outside 2..22 three times in a million runs.
    assert 2 <= left <= 22
    swapped = sum(row["swapped"] for row in world.rows("SELECT swapped FROM assignments"))
    assert 2 <= swapped <= 22


def test_a_lease_that_runs_out_gives_the_place_to_another(make: Make) -> None:
    world = make(rows=[answers(0)], lease_minutes=10)
    task = task_of(world, "ann")
    assert current(world, "bob") is None
    votes.draft(
        world.database, world.study, world.person("ann"), task.assignment, Opinion({}, "half"), NOON + 300
    )
    world.now = NOON + 890
    assert current(world, "bob") is None, "a draft renews the lease"
    world.now = NOON + 901
    vote(world, "bob", task_of(world, "bob"), "tie")
    with pytest.raises(RefusedError, match="too long"):
        vote(world, "ann", task, "a")
    assert current(world, "ann") is None
    check_places(world)


def test_who_comes_back_after_the_lease_finds_the_draft(make: Make) -> None:
    world = make(rows=[answers(0), answers(1)], lease_minutes=10, overlap=2)
    task = task_of(world, "ann")
    half = Opinion({}, "half")
    votes.draft(world.database, world.study, world.person("ann"), task.assignment, half, NOON)
    world.now = NOON + 3600
    task_of(world, "bob")
    again = task_of(world, "ann")
    assert (again.assignment, again.answers, again.comment) == (task.assignment, task.answers, "half")
    check_places(world)


def test_a_late_vote_counts_where_there_is_room(make: Make) -> None:
    world = make(rows=[answers(0)], lease_minutes=10)
    task = task_of(world, "ann")
    world.now += 3600
    assert vote(world, "ann", task) is True
    check_places(world)


def test_gold_checks_are_mixed_in_and_everybody_gets_them(make: Make, tmp_path: Path) -> None:
    gold = [{**answers(100 + n), "gold": "zebra-70b"} for n in range(4)]
    file = write_rows(tmp_path / "gold.jsonl", gold)
    world = make(rows=[answers(n) for n in range(16)], gold=file, gold_share=0.5, overlap=2)
    for name in ("ann", "bob"):
        kinds = []
        while (task := current(world, name)) is not None:
            kinds.append(task.prompt[0]["content"] >= "Question 100")
            vote(world, name, task, "a" if task.answers[0].startswith("Right") else "b")
        assert len(kinds) in range(16, 21)
    right = world.rows(
        "SELECT v.preferred, i.gold FROM votes v JOIN assignments s ON s.id = v.assignment "
        "JOIN items i ON i.id = s.item WHERE i.is_gold = 1"
    )
    assert right
    assert all(row["preferred"] == row["gold"] for row in right)
    check_places(world)


def test_concurrent_annotators_never_over_assign(make: Make) -> None:
    world = make(rows=[answers(n) for n in range(12)], overlap=2)
    names = [f"p{n}" for n in range(6)]
    for name in names:
        world.person(name)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            person = world.ids[name]
            while True:
                with world.database.writing() as session:
                    task = assignments.current(session, world.study, person, NOON)
                if task is None:
                    return
                votes.vote(
                    world.database, world.study, person, task.assignment, task.nonce, "a", Opinion(), NOON
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(world.rows("SELECT 1 AS n FROM votes")) == 24
    check_places(world)


def test_a_study_is_found_again(make: Make) -> None:
    world = make(criteria=["helpful"])
    assert open_study(world.database) == world.study


def test_progress_does_not_tell_gold_checks(make: Make, tmp_path: Path) -> None:
    """What an annotator sees of it is the same before and after a vote, gold check or not."""
    gold = write_rows(tmp_path / "gold.jsonl", [{**answers(100 + n), "gold": "zebra-70b"} for n in range(5)])
    world = make(gold=gold, gold_share=0.5, rows=[answers(n) for n in range(8)])
    kinds, totals = [], []
    while (task := current(world, "ann")) is not None:
        (row,) = world.rows(
            "SELECT i.is_gold FROM assignments s JOIN items i ON i.id = s.item WHERE s.id = :id",
            id=task.assignment,
        )
        kinds.append(row["is_gold"])
        totals.append(progress_of(world, "ann"))
        vote(world, "ann", task)
    assert set(kinds) == {0, 1}
    assert totals == [(done, len(kinds) - done) for done in range(len(kinds))]
    assert progress_of(world, "ann") == (len(kinds), 0)


def progress_of(world: World, name: str) -> tuple[int, int]:
    with world.database.reading() as session:
        found = assignments.progress(session, world.study, world.person(name))
    return found["done"], found["left"]


def test_a_lease_of_a_clock_that_was_far_ahead_ends(make: Make) -> None:
    world = make(rows=[answers(0)])
    world.now += 365 * 24 * 3600
    task_of(world, "ann")
    world.now = NOON
    assert current(world, "bob") is not None
    check_places(world)
