"""What runs the tasks: this process, several of this machine, or Ray (``ray_engine.py``)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

from data_prep.config import CurateConfig
from data_prep.sharded.plan import Result, Setup, Task
from data_prep.sharded.tasks import Worker
from posttrain.errors import DataError, PosttrainError, UserError

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class Engine(Protocol):
    """Runs tasks, wherever `Worker` can be made and sees the same files."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in any order; no more tasks are taken than are soon run."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...


def make_engine(config: CurateConfig, setup: Setup) -> Engine:
    """The engine that the configuration names."""
    if config.engine == "ray":
        from data_prep.sharded.ray_engine import RayEngine

        return RayEngine(setup, config.ray_address, config.workers)
    workers = config.workers or 1
    return OneProcess(setup) if workers == 1 else Processes(setup, workers)


class OneProcess:
    """Runs tasks one after the other in this process."""

    def __init__(self, setup: Setup) -> None:
        self._worker = Worker(setup)

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks."""
        for task in tasks:
            yield task.chunk, self._worker.run(task)

    def close(self) -> None:
        """Nothing was started."""


class Processes:
    """Runs tasks in processes of this machine, each with one thread.

    They begin at the first task, so a run whose chunks are all done starts none. They do not import the
    script that this process runs: one that starts the stage would start it again in each of them.
    """

    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup, self._workers = setup, workers
        self._pool: ProcessPoolExecutor | None = None
        self._environment: dict[str, str | None] = {}
        self._before: set[int | None] = set()

    def run(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. Raises PosttrainError when a process dies."""
        waiting: set[Future[Result]] = set()
        try:
            for task in tasks:
                pool = self._started()
                with _without_script():
                    waiting.add(pool.submit(_run, task))
                while len(waiting) > self._workers + 1:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            self._kill()
            raise PosttrainError(
                f"a worker process died (of {self._workers}); it may have been killed for want of memory\n"
                "    lower `workers`, or free memory; the same command goes on from the last finished chunk"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # New processes take these from here; the threads of this one are running already.
            for name in _ONE_THREAD:
                self._environment[name] = os.environ.get(name)
                os.environ[name] = "1"
            context = multiprocessing.get_context("spawn")
            self._before = {process.pid for process in multiprocessing.active_children()}
            self._pool = ProcessPoolExecutor(self._workers, context, _start, (self._setup,))
        return self._pool

    def _kill(self) -> None:
        """End what is left of a broken pool; its own SIGTERM does not."""
        for process in multiprocessing.active_children():
            if process.pid not in self._before:
                process.kill()

    def close(self) -> None:
        """End the processes when they have done what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _without_script() -> Iterator[None]:
    """For the time in which a process is started: `multiprocessing` finds no script to import there."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_setup: list[Setup] = []
_worker: list[Worker] = []
"""The one of this process, made for its first task: what speaks against it is then an error of the task."""


def _start(setup: Setup) -> None:
    """Make a new process ready. Ctrl-C, and SIGTERM to a whole group of processes, are for the driver, and
    without it there is nothing to do.
    """
    import pyarrow

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pyarrow.set_cpu_count(1)
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    _setup[:] = [setup]


def _end_with(driver: Any) -> None:
    driver.join()
    os._exit(1)


def _run(task: Task) -> Result:
    """Run a task; errors with more to them than a text reach the driver as their text."""
    try:
        if not _worker:
            _worker.append(Worker(_setup[0]))
        return task.chunk, _worker[0].run(task)
    except UserError as error:
        raise DataError(str(error)) from None
    except PosttrainError as error:
        raise PosttrainError(str(error)) from None
