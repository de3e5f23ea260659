"""The supervisor with other programs in tritonserver's place: nothing outlives the owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import serving.supervisor

TIMEOUT = 30
SCRIPT = serving.supervisor.__file__
# Prints "up", a shared-memory file in place, then waits; IGNORING does so deaf to SIGTERM.
SERVER = "import pathlib, signal, sys, time; {extra}pathlib.Path('/dev/shm', sys.argv[1] + 'x').touch(); "
SERVER += "pathlib.Path(sys.argv[2]).write_text('up'); time.sleep(60)"
IGNORING = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.fixture
def place(tmp_path):
    """A work directory, a prefix of its own, and a pipe that the server opens when it is up."""
    (tmp_path / "work" / "cwd").mkdir(parents=True)
    os.mkfifo(tmp_path / "up")
    prefix = f"posttrain-test-{uuid.uuid4().hex[:8]}-"
    yield tmp_path, prefix
    for left in Path("/dev/shm").glob(f"{prefix}*"):
        left.unlink()


def _command(place, extra="", grace="5"):
    directory, prefix = place
    server = [sys.executable, "-c", SERVER.format(extra=extra), prefix, str(directory / "up")]
    return [
        sys.executable,
        "-I",
        SCRIPT,
        str(directory / "work"),
        prefix,
        grace,
        str(directory / "log"),
        "--",
        *server,
    ]


def _start(place, **options):
    supervisor = subprocess.Popen(_command(place, **options), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert (place[0] / "up").read_text() == "up"
    return supervisor


def _assert_nothing_left(place):
    directory, prefix = place
    assert list(Path("/dev/shm").glob(f"{prefix}*")) == []
    assert not (directory / "work").exists()
    assert _processes(prefix) == []


def _processes(word):
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("extra", ["", IGNORING], ids=["obedient", "deaf"])
def test_closing_the_pipe_ends_the_server(place, extra):
    supervisor = _start(place, extra=extra, grace="0.5")
    supervisor.stdin.close()
    assert supervisor.wait(TIMEOUT) == 1
    _assert_nothing_left(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_ends_the_server(place, number):
    supervisor = _start(place)
    supervisor.send_signal(number)
    supervisor.wait(TIMEOUT)
    _assert_nothing_left(place)


def test_a_killed_owner_ends_the_server(place):
    """The owner gets SIGKILL, so that no code of its own can run. The supervisor holds the owner's stdout."""
    owner_code = (
        "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", owner_code, *_command(place)], stdout=subprocess.PIPE)
    assert (place[0] / "up").read_text() == "up"
    owner.kill()
    owner.communicate(timeout=TIMEOUT)
    _assert_nothing_left(place)


def test_a_server_that_ends_by_itself_is_cleaned_up_after(place):
    directory, prefix = place
    command = _command(place)
    command[command.index("--") + 1 :] = [sys.executable, "-c", "print('why it ended'); raise SystemExit(3)"]
    supervisor = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert supervisor.wait(TIMEOUT) == 3
    assert "why it ended" in (directory / "log").read_text()
    _assert_nothing_left(place)
