"""The supervisor with other programs in tritonserver's place: what it restarts, gives up and cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import serving.supervisor
from serving.ports import free_ports

TIMEOUT = 30
SCRIPT = serving.supervisor.__file__
# Prints "up", a shared-memory file in place, then waits; IGNORING does so deaf to SIGTERM.
SERVER = "import pathlib, signal, sys, time; {extra}pathlib.Path('/dev/shm', sys.argv[1] + 'x').touch(); "
SERVER += "pathlib.Path(sys.argv[2]).write_text('up'); time.sleep(60)"
IGNORING = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
MODEL_SERVER = """
import json, os, pathlib, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, directory, behaviours = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3].split(",")
count = len(list(directory.glob("run-*")))
(directory / f"run-{count}").write_text(" ".join(sys.argv[4:]))
behaviour = behaviours[min(count, len(behaviours) - 1)]
if behaviour == "unready":
    raise SystemExit(3)


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()

    def do_GET(self):
        if behaviour == "hangs at once":
            (directory / "up").write_text("up")
            time.sleep(60)
        self.answer(200, "")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if behaviour == "hangs at once":
            time.sleep(60)
        elif self.path.endswith("/index"):
            served = [{"name": name, "version": "1", "state": "READY"} for name in ("desk", "next")]
            self.answer(200, json.dumps(served))
            if behaviour == "dies":
                os._exit(5)
        elif behaviour == "hangs":
            time.sleep(60)
        elif behaviour == "refuses":
            self.answer(503, "the engine has stopped; restart the server")
        else:
            self.answer(400, "text_input is empty")
            if not told:
                told.append(self.path)
                (directory / "up").write_text("up")


told = []
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Ready at once, with two models; what each run does then is named in the arguments."""


@pytest.fixture
def place(tmp_path):
    """A work directory, a prefix of its own, and a pipe that the server opens when it is up."""
    (tmp_path / "work" / "cwd").mkdir(parents=True)
    os.mkfifo(tmp_path / "up")
    prefix = f"posttrain-test-{uuid.uuid4().hex[:8]}-"
    yield tmp_path, prefix
    for left in Path("/dev/shm").glob(f"{prefix}*"):
        left.unlink()


def _command(place, extra="", grace=5.0, port=1, server=None, **settings):
    """Nothing listens on port 1, so that a server without HTTP is never ready."""
    directory, prefix = place
    settings = {
        "work_dir": str(directory / "work"),
        "shm_prefix": prefix,
        "log_file": str(directory / "log"),
        "url": f"127.0.0.1:{port}",
        "model": "desk",
        "grace_s": grace,
        "start_timeout_s": 30.0,
        "probe_timeout_s": 30.0,
        "max_restarts": 2,
        "restart_window_s": 300.0,
        **settings,
    }
    server = server or [sys.executable, "-c", SERVER.format(extra=extra), prefix, str(directory / "up")]
    return [sys.executable, "-I", SCRIPT, json.dumps(settings), "--", *server]


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
    supervisor = _start(place, extra=extra, grace=0.5)
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
    """One that was never ready is not started again."""
    server = [sys.executable, "-c", "print('why it ended'); raise SystemExit(3)"]
    supervisor = subprocess.Popen(_command(place, server=server), stdin=subprocess.PIPE)
    assert supervisor.wait(TIMEOUT) == 3
    assert (place[0] / "log").read_text() == "why it ended\n"
    _assert_nothing_left(place)


def _supervise(place, behaviours, **settings):
    """A supervisor of the model server, and how often that was started."""
    directory, prefix = place
    [port] = free_ports(1)
    server = [sys.executable, "-c", MODEL_SERVER, str(port), str(directory), behaviours, prefix]
    command = _command(place, port=port, server=server, **settings)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _runs(place):
    return [file.read_text().split()[1:] for file in sorted(place[0].glob("run-*"))]


def test_a_server_that_fails_too_often_is_given_up(place):
    """Its restarts count too where it is not even ready after them."""
    supervisor = _supervise(place, "dies,unready")
    said = supervisor.stderr.read()
    assert supervisor.wait(TIMEOUT) == 1
    assert "ended with status 5; restarting tritonserver (1 of 2)\n" in said
    assert "ended with status 3; restarting tritonserver (2 of 2)\n" in said
    assert "ended with status 3; giving up after 2 restarts in 300 s\n" in said
    assert len(_runs(place)) == 3
    assert (place[0] / "log").read_text().endswith(said.splitlines(keepends=True)[-1])
    _assert_nothing_left(place)


@pytest.mark.parametrize("first", ["dies", "hangs", "refuses"])
def test_a_server_that_fails_comes_back_with_its_models(place, first):
    supervisor = _supervise(place, f"{first},serves", probe_timeout_s=0.5)
    assert (place[0] / "up").read_text() == "up"
    assert _runs(place) == [[], ["--load-model=desk", "--load-model=next"]]
    _, said = supervisor.communicate(timeout=TIMEOUT)
    why = "ended with status 5" if first == "dies" else "no answer to a probe for 0."
    assert why in said
    assert "desk: ready again after " in said
    _assert_nothing_left(place)


def test_a_server_that_hangs_before_the_supervisor_saw_it_ready_comes_back(place):
    """Its owner was first, and says so."""
    supervisor = _supervise(place, "hangs at once,serves", probe_timeout_s=0.5)
    assert (place[0] / "up").read_text() == "up"
    supervisor.stdin.write("ready")
    supervisor.stdin.flush()
    assert (place[0] / "up").read_text() == "up"
    assert _runs(place) == [[], []]
    _, said = supervisor.communicate(timeout=TIMEOUT)
    assert "no answer to a probe for " in said
    _assert_nothing_left(place)


def test_an_owner_that_ends_while_the_server_is_away_is_noticed(place):
    """The pause before the second restart is a second long, and the run before it was already removed."""
    supervisor = _supervise(place, "dies", max_restarts=100)
    for line in supervisor.stderr:
        if "(2 of 100)" in line:
            break
    supervisor.communicate(timeout=TIMEOUT)
    assert len(_runs(place)) == 2
    _assert_nothing_left(place)
