"""What a stage's `run(config, context)` is given: where things are, and how to say what is going on."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from posttrain.config import StageConfig
from posttrain.inputs import ResolvedInput, download
from posttrain.rundir import STAGING_PREFIX, RunDir, metric_rows

_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class StageContext:
    """One execution of one stage.

    run_dir: absolute. inputs: by dotted field path of the configuration ("model", "models.sft").
    Outputs that take more than one file are written in `staging(...)`; state that a resumed run needs
    goes to `checkpoints`.
    """

    run_dir: Path
    config: StageConfig
    inputs: dict[str, ResolvedInput]
    console: Console = field(default_factory=lambda: Console(stderr=True))
    timings: dict[str, float] = field(default_factory=dict)
    resumed: bool = False

    def path(self, field: str) -> Path:
        """The local path of an input; one of the Hub is downloaded first."""
        return download(self.inputs[field])

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go; kept when an interrupted run resumes."""
        return self.run_dir / "checkpoints"

    @property
    def model_dir(self) -> Path:
        """Where the model goes; write it in `staging("model")`."""
        return self.run_dir / "model"

    def log(self, step: int, /, **metrics: Any) -> None:
        """Append {"step", "time", **metrics} to metrics.jsonl. NaN and infinity are written as null."""
        row = {
            "step": int(step),
            "time": time.time(),
            **{name: _plain(value) for name, value in metrics.items()},
        }
        RunDir(self.run_dir).append_metrics(row)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`: call it when training resumes from the checkpoint of that step."""
        RunDir(self.run_dir).truncate_after(step)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return metric_rows(self.run_dir)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `timings[name]` of the manifest."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - started, 3)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[ProgressTracker]:
        """A progress bar on a terminal; otherwise a line about every tenth of `total`."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console) as bar:
                yield _Bar(bar, bar.add_task(description, total=total, text=""))
        else:
            lines = _Lines(self.console, description, total)
            yield lines
            lines.finish()

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary directory that becomes `run_dir/name` in one rename when the block succeeds."""
        temporary = Path(tempfile.mkdtemp(dir=self.run_dir, prefix=f"{STAGING_PREFIX}{name}-"))
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.chmod(0o755)
        target = self.run_dir / name
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)


class ProgressTracker:
    """What `StageContext.progress` yields."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more units."""
        raise NotImplementedError

    def update(self, text: str) -> None:
        """Show `text` (a loss, a count) beside the bar."""
        raise NotImplementedError


class _Bar(ProgressTracker):
    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task

    def advance(self, n: int = 1) -> None:
        self._bar.advance(self._task, n)

    def update(self, text: str) -> None:
        self._bar.update(self._task, text=text)


class _Lines(ProgressTracker):
    """Plain lines for logs: one a tenth of the way (or a thousand units of an unknown total), not more
    than one in five seconds, and one at the end."""

    def __init__(self, console: Console, description: str, total: int | None):
        self._console, self._description, self._total = console, description, total
        self._step = max(1, total // 10) if total else 1000
        self._done = self._said = 0
        self._text = ""
        self._started = self._last = time.perf_counter()

    def advance(self, n: int = 1) -> None:
        self._done += n
        if (
            self._done - self._said >= self._step
            and time.perf_counter() - self._last >= _SECONDS_BETWEEN_LINES
        ):
            self._say()

    def update(self, text: str) -> None:
        self._text = text

    def finish(self) -> None:
        """Say where it ended unless the last line did."""
        if self._said < self._done:
            self._say()

    def _say(self) -> None:
        self._said, self._last = self._done, time.perf_counter()
        count = f"{self._done}/{self._total}" if self._total else str(self._done)
        seconds = time.perf_counter() - self._started
        line = f"{self._description}: {count} ({seconds:.0f} s) {self._text}".rstrip()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy and torch scalars become numbers, NaN becomes null."""
    plain = _plain(value)
    json.dumps(plain, allow_nan=False)
    return plain
