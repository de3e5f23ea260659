"""The monitoring database: rows, reservoirs, flags, retention, and what happens when it cannot be written."""

from __future__ import annotations

import json
import logging
import random
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from posttrain.errors import UserError
from serving.gateway.logs import LOGGER
from serving.monitor import writer
from serving.monitor.store import DAY_SECONDS, Conversation, Entry, RequestRow, Store
from serving.monitor.writer import Monitor, QueueFullError

NOON = 1_790_000_000.0
ASKED = [{"role": "user", "content": "I am ann@shop.example"}]


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


def entry(number: int, text: bool = True, **fields: Any) -> Entry:
    values = {"time": NOON, "model": "desk", "version": "v1", "endpoint": "/v1/completions", "status": 200}
    request = RequestRow(**{"id": f"r{number}", "stream": False, "key": "alice", **values, **fields})
    return Entry(request, Conversation(ASKED, f"answer {number} for ann@shop.example") if text else None)


def open_store(path: Path, samples: int = 5, seed: int = 0, **options: Any) -> Store:
    return Store(path, samples, 30, rng=random.Random(seed), **{"clock": Clock(), **options})


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "monitoring.db"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What the gateway logs, as it comes."""
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    monkeypatch.setattr(LOGGER, "handlers", [Keeping()])
    before = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    yield records
    LOGGER.setLevel(before)


def test_a_request_is_a_row_and_its_text_is_redacted(path):
    store = open_store(path)
    measured = {"prompt_tokens": 7, "completion_tokens": 3, "finish_reason": "stop", "first_token_s": 0.25}
    asked = entry(1, **measured, seconds=1.5, stream=True)
    answer = replace(asked.text, completion_tokens=2, finish_reason="length")
    store.write([replace(asked, text=answer)])
    assert rows(path, "SELECT * FROM requests") == [
        ("r1", NOON, "desk", "v1", "/v1/completions", 200, 1, "alice", 7, 3, "stop", 0.25, 1.5)
    ]
    (sample,) = rows(path, "SELECT * FROM samples")
    assert sample[:5] == ("r1", "2026-09-21", NOON, "desk", "v1")
    assert json.loads(sample[5]) == [{"role": "user", "content": "I am [EMAIL_1]"}]
    assert sample[6:10] == ("answer 1 for [EMAIL_1]", 7, 2, "length"), "of this answer, not of all"
    assert (json.loads(sample[10]), *sample[11:]) == ({"EMAIL": 2}, None, None)
    assert b"ann@shop.example" not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_text_is_kept_as_it_is_where_redaction_is_off(path):
    open_store(path, redact=False).write([entry(1)])
    assert rows(path, "SELECT answer, redactions FROM samples") == [("answer 1 for ann@shop.example", "{}")]


def test_only_the_owner_can_read_the_files(path):
    path.touch(0o644)
    store = open_store(path)
    store.write([entry(1)])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys((path.name, f"{path.name}-wal", f"{path.name}-shm"), 0o600)


def test_what_is_no_database_is_refused_and_left_as_it_is(path):
    folder, text = path.parent / "folder", path.parent / "text"
    folder.mkdir(0o755)
    text.write_text("a configuration, named by mistake")
    text.chmod(0o644)
    for wrong, mode in ((folder, 0o755), (text, 0o644)):
        with pytest.raises(UserError, match=f"{wrong.name} cannot be used"):
            open_store(wrong)
        assert stat.S_IMODE(wrong.stat().st_mode) == mode


def test_an_id_that_a_client_repeats_is_another_request(path):
    store = open_store(path)
    store.write([entry(1), entry(1, key="bob"), entry(1)])
    names = [name for (name,) in rows(path, "SELECT id FROM requests ORDER BY rowid")]
    assert names[0] == "r1" and len(set(names)) == 3
    assert all(name.startswith("r1.") for name in names[1:])
    assert not store.flag("r1", "bob", "up", None), "the first one is alice's"
    assert store.flag(names[1], "bob", "up", None)


def kept(path: Path) -> list[int]:
    return [int(name[1:]) for (name,) in rows(path, "SELECT request_id FROM samples")]


def test_every_request_has_the_same_chance_also_over_a_restart(path):
    """400 reservoirs of 5, which see 20 requests each; the program ends behind the 12th of each."""
    for seed, numbers in enumerate((range(12), range(12, 20))):
        store = open_store(path, seed=seed)
        entries = [entry(20 * model + n, model=f"m{model}") for n in numbers for model in range(400)]
        store.write(entries)
        store.close()
    counts = Counter(number % 20 for number in kept(path))
    assert sum(counts.values()) == 2000
    assert stats.chisquare([counts[number] for number in range(20)]).pvalue > 0.01
    # The same test sees a reservoir that has forgotten how many it saw.
    assert stats.chisquare([60] * 12 + [160] * 8).pvalue < 1e-6


def test_days_and_models_have_reservoirs_of_their_own(path):
    store = open_store(path, samples=2)
    for number in range(24):
        store.write([entry(number, model="ab"[number % 2], time=NOON + (number // 2 % 3) * DAY_SECONDS)])
    counts = "SELECT day, model, count(*) FROM samples GROUP BY day, model ORDER BY 1, 2"
    days = ("2026-09-21", "2026-09-22", "2026-09-23")
    assert rows(path, counts) == [(day, model, 2) for day in days for model in "ab"]
    assert {seen for (seen,) in rows(path, "SELECT seen FROM reservoirs")} == {4}


def test_a_smaller_reservoir_holds_at_once_and_a_larger_one_from_the_next_day(path):
    open_store(path, samples=6).write([entry(number) for number in range(10)])
    store = open_store(path, samples=3)
    store.write([entry(10)])
    assert len(kept(path)) == 3
    store = open_store(path, samples=6)
    store.write([entry(number) for number in range(11, 30)])
    assert len(kept(path)) == 3
    store.write([entry(number, time=NOON + DAY_SECONDS) for number in range(30, 50)])
    assert sorted(rows(path, "SELECT count(*) FROM samples GROUP BY day")) == [(3,), (6,)]


def test_without_samples_no_text_is_kept(path):
    open_store(path, samples=0).write([entry(number) for number in range(5)])
    assert rows(path, "SELECT count(*) FROM requests") == [(5,)]
    assert kept(path) == []


def test_a_flag_needs_the_sample_and_the_key_that_asked(path):
    store = open_store(path, samples=2)
    store.write([entry(1), entry(2, text=False)])
    assert store.flag("r1", "alice", "down", "call 541-714-1388")
    assert not store.flag("r1", "bob", "up", None)
    assert not store.flag("r2", "alice", "up", None)
    assert not store.flag("r3", "alice", "up", None)
    assert rows(path, "SELECT flag, comment FROM samples") == [("down", "call [PHONE_1]")]


def test_a_flagged_sample_that_loses_its_place_is_kept_aside(path):
    store = open_store(path, samples=1)
    store.write([entry(0)])
    store.flag("r0", "alice", "up", None)
    number = 0
    while "r0" in {name for (name,) in rows(path, "SELECT request_id FROM samples")}:
        number += 1
        store.write([entry(number)])
    assert rows(path, "SELECT request_id, flag FROM flagged_samples") == [("r0", "up")]
    assert store.flag("r0", "alice", "down", None)
    assert rows(path, "SELECT flag FROM flagged_samples") == [("down",)]
    assert len(kept(path)) == 1


def test_what_is_old_is_deleted_and_cannot_be_read_off_the_disk(path):
    clock = Clock()
    store = open_store(path, clock=clock)
    store.write([entry(1), entry(2, time=NOON + 29 * DAY_SECONDS)])
    clock.now = NOON + 31 * DAY_SECONDS
    store.prune_when_due()
    assert rows(path, "SELECT id FROM requests") == [("r2",)]
    assert kept(path) == [2]
    assert len(rows(path, "SELECT * FROM reservoirs")) == 1
    assert b"answer 1" not in b"".join(file.read_bytes() for file in path.parent.iterdir())
    store.write([entry(3, time=NOON)])
    store.prune_when_due()
    assert len(rows(path, "SELECT * FROM requests")) == 2, "once an hour"


@pytest.mark.parametrize("content", [b"not a database" * 100, None])
def test_a_file_that_is_no_database_is_named(tmp_path, content):
    path = tmp_path / "there"
    if content is None:
        path = tmp_path / "missing" / "file"
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"monitoring\.database: .*cannot be used"):
        open_store(path)


def test_without_traffic_what_is_old_is_deleted_too(path):
    clock = Clock()
    store = open_store(path, clock=clock)
    store.write([entry(1)])
    clock.now = NOON + 31 * DAY_SECONDS
    Monitor(store, False, Dropped()).close()
    assert rows(path, "SELECT id FROM requests") == []


class Dropped(Counter):
    """What a monitor left out."""

    def __call__(self, reason: str, count: int) -> None:
        self[reason] += count


def test_what_was_put_is_written_when_it_is_closed(path):
    dropped = Dropped()
    monitor = Monitor(open_store(path, samples=50), False, dropped)
    for number in range(1000):
        monitor.put(entry(number))
    assert monitor.flag("r0", "alice", "up", None).result(10) in (True, False)
    monitor.close()
    assert rows(path, "SELECT count(*), count(DISTINCT id) FROM requests") == [(1000, 1000)]
    assert len(kept(path)) == 50
    assert not dropped
    monitor.put(entry(1000))
    assert dropped == {"queue_full": 1}, "it is closed"


def test_a_flag_finds_what_was_put_before_it(path):
    monitor = Monitor(open_store(path), False, Dropped())
    monitor.put(entry(1))
    assert monitor.flag("r1", "alice", "up", None).result(10)
    monitor.close()


def test_readers_see_whole_batches_while_it_is_written(path):
    """A reader in the middle never waits, never fails, and never sees a sample without its request."""
    monitor = Monitor(open_store(path, samples=20), False, Dropped())
    connection = sqlite3.connect(path, timeout=0)
    seen = []
    for number in range(600):
        monitor.put(entry(number))
        if number % 20 == 0:
            orphans = "SELECT count(*) FROM samples WHERE request_id NOT IN (SELECT id FROM requests)"
            assert connection.execute(orphans).fetchone() == (0,)
            seen.append(connection.execute("SELECT count(*) FROM requests").fetchone()[0])
    monitor.close()
    assert seen == sorted(seen)
    assert connection.execute("SELECT count(*) FROM requests").fetchone() == (600,)
    connection.close()


def test_two_gateways_can_share_a_file(path):
    stores = [open_store(path, samples=10, seed=seed) for seed in (1, 2)]
    monitors = [Monitor(store, False, Dropped()) for store in stores]
    for number in range(400):
        monitors[number % 2].put(entry(number))
    for monitor in monitors:
        monitor.close()
    assert rows(path, "SELECT count(*) FROM requests") == [(400,)]
    assert rows(path, "SELECT seen FROM reservoirs") == [(400,)]
    assert len(kept(path)) == 10


def test_a_locked_database_drops_and_counts_and_goes_on(path, monkeypatch, logged):
    monkeypatch.setattr("serving.monitor.store.BUSY_SECONDS", 0.05)
    dropped = Dropped()
    monitor = Monitor(open_store(path), False, dropped)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(3):
        monitor.put(entry(number))
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        monitor.flag("r0", "alice", "up", None).result(10)
    other.execute("ROLLBACK")
    monitor.put(entry(3))
    monitor.close()
    other.close()
    assert dropped == {"database": 3}
    assert rows(path, "SELECT id FROM requests") == [("r3",)]
    complaints = [record for record in logged if record.getMessage() == "monitoring_failed"]
    assert [vars(record)["fields"]["detail"] for record in complaints] == ["database is locked"]


def test_a_full_disk_drops_and_counts_and_goes_on(path):
    """The limit of pages makes SQLite say what it says of a full disk."""
    dropped = Dropped()
    store = open_store(path)
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.write([entry(number) for number in range(500)])
    monitor = Monitor(store, False, dropped)
    for number in range(500):
        monitor.put(entry(number))
    assert monitor.flag("none", "alice", "up", None).result(10) is False
    written = len(rows(path, "SELECT id FROM requests"))
    assert dropped == {"database": 500 - written}
    assert written < 500
    store.connection.execute("PRAGMA max_page_count = 1000000")
    monitor.put(entry(500))
    monitor.close()
    assert rows(path, "SELECT id FROM requests WHERE id = 'r500'") == [("r500",)]


def test_a_full_queue_drops_and_counts_and_does_not_wait(path, monkeypatch):
    """The thread is held up inside the store while the queue fills."""
    monkeypatch.setattr(writer, "MAX_ENTRIES", 10)
    held, entered = threading.Event(), threading.Event()

    class Slow(Store):
        def write(self, entries):
            entered.set()
            assert held.wait(60)
            super().write(entries)

    dropped = Dropped()
    monitor = Monitor(Slow(path, 5, 30, clock=Clock()), False, dropped)
    monitor.put(entry(0))
    assert entered.wait(60)
    for number in range(1, 31):
        monitor.put(entry(number))
    assert dropped == {"queue_full": 20}
    with pytest.raises(QueueFullError):
        monitor.flag("r0", "alice", "up", None)
    held.set()
    monitor.close()
    assert rows(path, "SELECT count(*) FROM requests") == [(11,)]


def test_texts_that_wait_are_bounded_too(path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_CHARACTERS", 10)
    dropped = Dropped()
    monitor = Monitor(open_store(path), False, dropped)
    monitor.put(entry(1))
    monitor.put(entry(2, text=False))
    monitor.close()
    assert dropped == {"queue_full": 1}
    assert rows(path, "SELECT id FROM requests") == [("r2",)]


def test_a_failure_that_nobody_foresaw_ends_monitoring_and_says_so(path, logged):

    class Broken(Store):
        def write(self, entries):
            raise RuntimeError(ASKED[0]["content"])

    dropped = Dropped()
    monitor = Monitor(Broken(path, 5, 30), False, dropped)
    monitor.put(entry(1))
    monitor.close()
    monitor.put(entry(2))
    assert dropped == {"queue_full": 1}
    (record,) = [record for record in logged if record.getMessage() == "monitoring_stopped"]
    assert vars(record)["fields"]["error"]["type"] == "RuntimeError"
    assert "ann@shop.example" not in str(vars(record)["fields"])


def test_the_log_gets_redacted_text_only(logged):
    monitor = Monitor(None, True, Dropped())
    assert monitor.keeps_text
    monitor.put(entry(1))
    assert monitor.flag("r1", "alice", "up", None).result(10) is False
    monitor.close()
    (record,) = logged
    assert record.getMessage() == "text"
    assert vars(record)["fields"] == {
        "request_id": "r1",
        "messages": [{"role": "user", "content": "I am [EMAIL_1]"}],
        "answer": "answer 1 for [EMAIL_1]",
        "redactions": {"EMAIL": 2},
    }
