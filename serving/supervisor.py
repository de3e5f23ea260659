"""Runs tritonserver and cleans up after it, however its owner ends. Standard library only, run as a script.

    python supervisor.py WORK_DIR SHM_PREFIX GRACE_SECONDS LOG_FILE -- tritonserver ARGUMENTS

Standard input is a pipe that the owner keeps open and never writes to. When it closes (the owner stopped the
server, raised, or was killed) tritonserver gets SIGTERM, after the grace period SIGKILL with its whole
process group; then its shared-memory regions and the work directory are removed. If tritonserver ends first,
only the removal is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

POLL_SECONDS = 0.2


def main(arguments: list[str]) -> int:
    """Exit status: tritonserver's own, or 1 where a signal ended it."""
    separator = arguments.index("--")
    work_dir, shm_prefix, grace, log_file = arguments[:separator]
    command = arguments[separator + 1 :]
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked_to_end.set())
    try:
        with Path(log_file).open("ab") as log:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(work_dir, "cwd"),
                start_new_session=True,
            )
        try:
            _wait_for_owner(server, asked_to_end)
        finally:
            _end(server, float(grace))
    finally:
        for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(work_dir, ignore_errors=True)
    return server.returncode if server.returncode >= 0 else 1


def _wait_for_owner(server: subprocess.Popen[bytes], asked_to_end: threading.Event) -> None:
    """Return when the owner's end of the pipe is closed, a signal came, or the server has ended."""
    while server.poll() is None and not asked_to_end.is_set():
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if readable and not os.read(0, 4096):
            return


def _end(server: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM, wait, SIGKILL. The group is killed even after a clean exit: an orphaned stub spins forever."""
    if server.poll() is None:
        server.terminate()
        deadline = time.monotonic() + grace
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
