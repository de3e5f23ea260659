"""Runs tritonserver, brings it back when it fails, and cleans up after it, however its owner ends.

    python -I supervisor.py SETTINGS_JSON -- tritonserver ARGUMENTS       (SETTINGS_JSON: see Settings)

Standard library only. Standard input is a pipe the owner keeps open. When it closes
(the owner stopped the server, raised, or was killed) or a signal comes, tritonserver gets SIGTERM, after the
grace period SIGKILL with its whole process group; then its shared memory and the work directory are removed.

A server that was ready once is restarted, on the same ports and with the models that were loaded, when it
ended, when one of its stubs (the processes that hold the models) ended though its model counts as loaded,
and when a model answered no probe for `probe_timeout_s`: an empty prompt, which the stub has to refuse by
itself. Always the whole server: what tritonserver does without its stub is told in docs/serving.md. More
than `max_restarts` in `restart_window_s` end everything with exit status 1; so does a server that was never
ready, with its own status. Each step is a line in the log and on standard error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.2
ANSWER_SECONDS = 2.0
PROBES_PER_TIMEOUT = 5
STUB = b"triton_python_backend_stub"
BROKEN = (b"is not healthy", b"engine has stopped")
"""How tritonserver and the stand-in's engine say that they cannot serve anything."""


@dataclass(frozen=True)
class Settings:
    """url: "host:port" of HTTP. model: whose readiness is the server's. work_dir is removed at the end."""

    work_dir: str
    shm_prefix: str
    log_file: str
    url: str
    model: str
    grace_s: float
    start_timeout_s: float
    probe_timeout_s: float
    max_restarts: int
    restart_window_s: float


@dataclass(frozen=True)
class Stub:
    """A process that serves one instance of a model; `started` tells it from a later one with its id.

    place: model, version, instance.
    """

    pid: int
    started: str
    place: tuple[str, str, str]

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return parent_and_start(self.pid)[1] == self.started


class Server:
    """One run of tritonserver. `loaded`: the models it was last seen to serve, none before it was ready."""

    def __init__(self, settings: Settings, command: list[str]) -> None:
        self.settings = settings
        self.ready = False
        self.loaded: set[str] = set()
        self._stubs: list[Stub] = []
        self._answered = self._looked = time.monotonic()
        self._ended = threading.Event()
        with Path(settings.log_file).open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(settings.work_dir, "cwd"),
                start_new_session=True,
            )

    def becomes_ready(self, told: bool) -> bool:
        """Whether it is ready now, or its owner told that it was (it may hang since); then it is probed."""
        self._look_for_stubs()
        if not told and self._ask("GET", f"/v2/models/{self.settings.model}/ready")[0] != 200:
            return False
        self.ready, self._answered = True, time.monotonic()
        self.loaded = {name for name, _ in self._served(ANSWER_SECONDS) or ()}
        threading.Thread(target=self._probe, daemon=True).start()
        return True

    def failure(self) -> str | None:
        """Why it cannot go on, if so."""
        if self.process.poll() is not None:
            return f"tritonserver (pid {self.process.pid}) ended with status {self.process.returncode}"
        if not self.ready:
            return None
        if self._answered > self._looked:
            self._look_for_stubs()
        for stub in self._stubs:
            if not stub.alive() and self._is_missed(stub):
                return f"the process of version {stub.place[1]} of {stub.place[0]} (pid {stub.pid}) ended"
        silent = time.monotonic() - self._answered
        return f"no answer to a probe for {silent:.1f} s" if silent > self.settings.probe_timeout_s else None

    def end(self, grace: float) -> None:
        """SIGTERM, wait, SIGKILL, shared memory. After a clean exit too: an orphaned stub spins forever."""
        self._ended.set()
        if grace > 0:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in Path("/dev/shm").glob(f"{self.settings.shm_prefix}*"):
            region.unlink(missing_ok=True)

    def _look_for_stubs(self) -> None:
        """Add new ones: already while they load their models, since one may die as soon as it is ready."""
        self._looked = time.monotonic()
        self._stubs += [stub for stub in find_stubs(self.process.pid) if stub not in self._stubs]

    def _is_missed(self, ended: Stub) -> bool:
        """Whether a stub that ended is still needed: not when its version was unloaded, or has a new stub."""
        served = self._served(ANSWER_SECONDS)
        if served is None:
            return True
        self._stubs = find_stubs(self.process.pid)
        return ended.place[:2] in served and ended.place not in [stub.place for stub in self._stubs]

    def _probe(self) -> None:
        """Runs in a thread: ask every version that is loaded."""
        limit = self.settings.probe_timeout_s
        while not self._ended.wait(limit / PROBES_PER_TIMEOUT):
            served = self._served(limit)
            if served is None:
                continue
            self.loaded = {name for name, _ in served}
            if all(self._lives(name, version, limit) for name, version in served):
                self._answered = time.monotonic()

    def _lives(self, name: str, version: str, limit: float) -> bool:
        """Whether a version answers an empty prompt, with whatever error but that it cannot serve."""
        path = f"/v2/models/{name}/versions/{version}/generate"
        status, text = self._ask("POST", path, '{"text_input": ""}', limit)
        return status > 0 and not any(words in text for words in BROKEN)

    def _served(self, limit: float) -> set[tuple[str, str]] | None:
        """Name and version of everything that counts as loaded; None without an answer."""
        status, text = self._ask("POST", "/v2/repository/index", "{}", limit)
        if status != 200:
            return None
        entries = json.loads(text)
        return {(entry["name"], entry["version"]) for entry in entries if entry.get("state") == "READY"}

    def _ask(
        self, method: str, path: str, body: str = "", limit: float = ANSWER_SECONDS
    ) -> tuple[int, bytes]:
        """Status and text of an answer; status 0 when there is none."""
        connection = http.client.HTTPConnection(self.settings.url, timeout=limit)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


class Supervisor:
    """One run of tritonserver after another, until the owner ends or it is no use."""

    def __init__(self, settings: Settings, command: list[str]) -> None:
        self.settings = settings
        self.command = command
        self.asked_to_end, self.told_ready = threading.Event(), False
        self._failures: deque[float] = deque()

    def run(self) -> int:
        """Exit status: tritonserver's own, or 1 where a signal ended it or it was given up."""
        loaded, was_ready = set[str](), False
        while True:
            loads = {f"--load-model={name}" for name in loaded} - set(self.command)
            server = Server(self.settings, self.command + sorted(loads))
            failure = None
            try:
                failure = self._watch(server, was_ready)
            finally:
                # One that failed would wait for answers of a dead stub, and its clients with it.
                server.end(0.0 if failure else self.settings.grace_s)
            was_ready = was_ready or server.ready or self.told_ready
            if failure is None or not was_ready:
                return server.process.returncode if server.process.returncode >= 0 else 1
            loaded = server.loaded
            if not self._may_restart(failure):
                return 1

    def _watch(self, server: Server, restarted: bool) -> str | None:
        """Why the server must be restarted; None when the owner is gone or a signal came."""
        began = time.monotonic()
        while not self._owner_is_gone(POLL_SECONDS):
            if failure := server.failure():
                return failure
            waited = time.monotonic() - began
            if not server.ready and server.becomes_ready(self.told_ready and not restarted) and restarted:
                self._say(f"ready again after {waited:.1f} s")
            elif not server.ready and restarted and waited > self.settings.start_timeout_s:
                return f"not ready again after {waited:.0f} s (start_timeout_s)"
        return None

    def _may_restart(self, failure: str) -> bool:
        """Say what happened and wait a little where it happened before; False: too often, or time to end."""
        window = self.settings.restart_window_s
        self._failures.append(time.monotonic())
        while self._failures[0] < self._failures[-1] - window:
            self._failures.popleft()
        count = len(self._failures)
        if count > self.settings.max_restarts:
            self._say(f"{failure}; giving up after {count - 1} restarts in {window:g} s")
            return False
        self._say(f"{failure}; restarting tritonserver ({count} of {self.settings.max_restarts})")
        pause = 0.0 if count == 1 else min(2.0 ** (count - 2), 30.0)
        return not self._owner_is_gone(pause)

    def _owner_is_gone(self, seconds: float) -> bool:
        """Wait this long, less when the owner's end of the pipe is closed or a signal came: then true."""
        deadline = time.monotonic() + seconds
        while not self.asked_to_end.is_set():
            left = max(deadline - time.monotonic(), 0.0)
            readable, _, _ = select.select([0], [], [], min(left, POLL_SECONDS))
            if readable and not (said := os.read(0, 4096)):
                return True
            self.told_ready = self.told_ready or bool(readable and said)
            if left == 0.0:
                return False
        return True

    def _say(self, text: str) -> None:
        line = f"supervisor: {time.strftime('%H:%M:%S')} {self.settings.model}: {text}"
        with Path(self.settings.log_file).open("a", encoding="utf-8") as log:
            print(line, file=log)
        # The owner's terminal may be gone.
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def find_stubs(parent: int) -> list[Stub]:
    """The stubs that a tritonserver has started and not yet waited for."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        owner, started = parent_and_start(pid)
        if owner != parent:
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # BACKENDS/python/STUB REPOSITORY/MODEL/VERSION/model.py ... INSTANCE BACKENDS/vllm
            if words[0].endswith(STUB) and len(words) > 8:
                model, version = Path(words[1].decode()).parts[-3:-1]
                found.append(Stub(pid, started, (model, version, words[8].decode())))
    return found


def parent_and_start(pid: int) -> tuple[int, str]:
    """Parent and start time of a process; (0, "") when there is none, or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, ""
    fields = text.rpartition(")")[2].split()
    return (0, "") if fields[0] in ("Z", "X") else (int(fields[1]), fields[19])


def main(arguments: list[str]) -> int:
    """Run as a script; see the module's description."""
    settings = Settings(**json.loads(arguments[0]))
    supervisor = Supervisor(settings, arguments[2:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.asked_to_end.set())
    try:
        return supervisor.run()
    finally:
        shutil.rmtree(settings.work_dir, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
