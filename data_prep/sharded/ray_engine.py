"""Runs the tasks of the curate stage on Ray Data, on this machine or on all machines of a Ray cluster.

Tasks travel through Ray Data a window at a time; rows that are read go with them, and everything else is in
the work directory, which every machine has to see. A task does the same work to the same files wherever it
runs and writes each file whole, so Ray may run it again where a machine is lost, and the bytes that are
written are those of the other engines.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from data_prep.sharded.plan import EngineError, Result, Setup, Task
from data_prep.sharded.tasks import Worker
from posttrain.errors import ConfigError, DataError, PosttrainError, Problem, UserError

WINDOW_BYTES = 64 << 20
"""Of tasks with their rows that are handed to Ray at a time."""
REACHED_WITHIN = 10.0
"""Seconds."""
OBJECT_STORE_BYTES = 512 << 20
"""Of shared memory, where Ray is started here; nothing but windows passes through it."""


class RayEngine:
    """Runs tasks on a Ray cluster: the one this process is in, the one at `address`, or a new local one.

    workers: most tasks at a time; None: as many as the cluster has processors. Ray begins at the first task,
    and what was started here is stopped at the end. Raises ConfigError where the cluster cannot be reached,
    EngineError where one of its machines does not see the work directory.
    """

    def __init__(self, setup: Setup, address: str | None, workers: int | None) -> None:
        root = setup.root.resolve()
        inputs = {field: path.resolve() for field, path in setup.inputs.items()}
        self._setup = pickle.dumps(replace(setup, root=root, inputs=inputs))
        self._address, self._workers = address, workers
        self._started = False

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come, a window after the other."""
        for window in _windows(tasks):
            self._start()
            yield from self._run(window)

    def _run(self, window: list[bytes]) -> Iterator[Result]:
        import ray.data

        rows = [{"setup": self._setup, "task": task} for task in window]
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        most = None if self._workers is None else min(self._workers, len(rows))
        with _quiet(ray.data.DataContext.get_current()):
            for row in data.map(do, compute=ray.data.TaskPoolStrategy(most)).iter_rows():
                yield _result(row)

    def _start(self) -> None:
        import ray

        if ray.is_initialized():
            return
        address = self._address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                _reach(address)
                _begin(address=address)
            else:
                start_here(self._workers)
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                [
                    Problem(
                        "ray_address",
                        f"no cluster can be reached at {address or 'this machine'} ({why})",
                        "start one (ray start --head), correct the address, or leave it out to use Ray here",
                        here=True,
                    )
                ]
            ) from error
        self._started = True

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


def start_here(workers: int | None = None, attempts: int = 3) -> None:
    """Start Ray on this machine, with as many processors as workers, or all.

    Ray gives its parts half a minute to find each other, which on a busy machine may not do: it is tried
    again. Raises RuntimeError where it does not start.
    """
    import ray

    # On a busy machine the parts take longer to find each other than Ray waits by default.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    while True:
        attempts -= 1
        try:
            _begin(
                address="local",
                num_cpus=workers,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
            return
        except Exception as error:
            # That they did not is at times said by an Exception of no narrower class.
            if type(error) not in (Exception, RuntimeError):
                raise
            ray.shutdown()
            if not attempts:
                raise RuntimeError(str(error)) from error


def _begin(**settings: Any) -> None:
    import ray

    # Nothing about a run is sent to the makers of Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)


def _reach(address: str | None) -> None:
    """Raises OSError, soon, where nothing listens at host:port; Ray itself tries for minutes."""
    found = urlsplit(address if address and "://" in address else f"//{address or ''}")
    if found.hostname and found.port:
        socket.create_connection((found.hostname, found.port), REACHED_WITHIN).close()


def _windows(tasks: Iterable[Task]) -> Iterator[list[bytes]]:
    """Pickled tasks, so many together that they are WINDOW_BYTES or all."""
    window: list[bytes] = []
    size = 0
    for task in tasks:
        window.append(pickle.dumps(task))
        size += len(window[-1])
        if size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """Progress is shown by the stage."""
    log = logging.getLogger("ray.data")
    before, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.enable_progress_bars = before
        log.setLevel(level)


_ERRORS: dict[str, type[PosttrainError]] = {
    "engine": EngineError,
    "user": UserError,
    "internal": PosttrainError,
}
"""What an error of a task is to the driver, the most special first."""


def do(row: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a process of the cluster. Errors that are for the user come back as values: in Ray's
    own they would be wrapped in its traces.
    """
    task: Task = pickle.loads(row["task"])
    try:
        said = _worker(row["setup"]).run(task)
    except PosttrainError as error:
        kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
        return {"chunk": task.chunk, "said": b"", "kind": kind, "error": str(error)}
    return {"chunk": task.chunk, "said": pickle.dumps(said), "kind": "", "error": ""}


@lru_cache(maxsize=1)
def _worker(setup: bytes) -> Worker:
    """The one of this process; Ray gives a process many tasks."""
    import pyarrow

    pyarrow.set_cpu_count(1)
    found: Setup = pickle.loads(setup)
    if not found.root.is_dir():
        raise EngineError(
            f"engine ray: machine {socket.gethostname()} of the cluster does not see {found.root}\n"
            "    put the run directory (and the stage's inputs) on a file system that all machines share"
        )
    return Worker(found)


def _result(row: dict[str, Any]) -> Result:
    if row["error"]:
        error = _ERRORS[row["kind"]]
        raise (DataError if error is UserError else error)(row["error"])
    return row["chunk"], pickle.loads(row["said"])
