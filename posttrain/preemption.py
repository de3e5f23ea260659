"""Stopping in good order when a scheduler takes the machine back.

Slurm, Kubernetes and spot instances send SIGTERM some seconds before they kill. A training loop that holds a
`PreemptionFlag` goes on to the end of its update, writes a checkpoint and raises RequeueError, which leaves
the process with exit code 75 and the run ready to be resumed by the same command:

    with PreemptionFlag() as flag:
        while step < total:
            step = update()
            if agree(flag.requested, largest_over_processes):
                save_checkpoint()
                raise RequeueError(f"update {step} of {total}")
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class PreemptionFlag:
    """Remembers that SIGTERM came, instead of dying of it, for as long as the context is open.

    Python runs signal handlers in the main thread alone; opened in another thread, it leaves the process as
    it is and `requested` stays False. More SIGTERMs change nothing, because Slurm and torchrun may both send
    one; ctrl-C and SIGKILL work as ever. The handler from before is put back on the way out.
    """

    def __init__(self) -> None:
        self._requested = False
        self._installed = False
        self._previous: signal._HANDLER = signal.SIG_DFL

    @property
    def requested(self) -> bool:
        """Whether SIGTERM came since the context was opened."""
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


def agree(requested: bool, reduce: Callable[[int], int]) -> bool:
    """Whether any process was asked to stop: the same answer in all of them.

    A signal reaches the processes at different moments, and one that stops alone leaves the others waiting in
    their next collective operation. So all of them must call this at the same place of the loop.

    reduce: the maximum (or the sum) of an integer over all processes; the identity on a single one.
    """
    return reduce(int(requested)) > 0
