"""Assignments, votes, drafts, skips and undo, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from annotation_study import NOON, World, answers, make_world, write_rows

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.assignment import Task
from eval.annotate.database import Database
from eval.annotate.export import as_text, preferences
from eval.annotate.store import open_study
from eval.annotate.votes import Opinion, RefusedError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_annotate import private_postgres

Make = Callable[..., World]


@pytest.fixture(scope="module")
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


def test_a_lease_of_a_clock_that_was_far_ahead_ends(make: Make) -> None:
    world = make(rows=[answers(0)])
    world.now += 365 * 24 * 3600
    task_of(world, "ann")
    world.now = NOON
    assert current(world, "bob") is not None
    check_places(world)


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
