"""Run directories: atomic files, the lock, the manifest, the metrics log, and what counts as output.

    config.yaml  manifest.json  metrics.jsonl  checkpoints/  model/  report.html  ...

Every file that another process may read is written to a temporary file beside it, flushed to the disk
and renamed into place, so it is there completely or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from posttrain.errors import UserError
from posttrain.hashing import content_files, hash_dataset, hash_json, hash_path

SCHEMA_VERSION = 1
STAGING_PREFIX = ".staging-"
PREVIOUS = ".previous"
_LOCK, _HOLDER = ".lock", ".lock-holder.json"
_RECORDS = ("manifest.json", "config.yaml", "metrics.jsonl", "error.log", "report.html")
_RECORD_DIRECTORIES = ("checkpoints", "tensorboard", "wandb")


def atomic_write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{STAGING_PREFIX}{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, or None when `run_dir` is not one."""
    path = run_dir / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: is not valid JSON ({error.msg}); delete {run_dir} and rerun"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: was not written by this version of posttrain (schema {SCHEMA_VERSION} expected)"
        )
    return manifest


def describe_outputs(run_dir: Path) -> dict[str, Any]:
    """What a finished stage left: {"model": hash, "dataset": hash, "files": {path: bytes}, "hash": hash}.

    "model" and "dataset" are there when the run holds them; "hash" covers everything that is not a
    record of the run itself (manifest, metrics, checkpoints, tracker files).
    """
    files = [file for file in content_files(run_dir) if _is_output(file.relative_to(run_dir))]
    outputs: dict[str, Any] = {}
    if (run_dir / "model").is_dir():
        outputs["model"] = hash_path(run_dir / "model")
    if (run_dir / "dataset.json").is_file():
        outputs["dataset"] = hash_dataset(run_dir)
    covered = dict(outputs)
    if not covered:
        covered = {file.relative_to(run_dir).as_posix(): hash_path(file) for file in files}
    outputs["files"] = {file.relative_to(run_dir).as_posix(): file.stat().st_size for file in files}
    outputs["hash"] = hash_json(covered)
    return outputs


def _is_output(relative: Path) -> bool:
    return relative.parts[0] not in _RECORD_DIRECTORIES and relative.as_posix() not in _RECORDS


def missing_output(run_dir: Path, manifest: dict[str, Any]) -> str | None:
    """The first file of a finished run that is gone or has another size, None when all are there."""
    for name, size in manifest.get("outputs", {}).get("files", {}).items():
        file = run_dir / name
        if not file.is_file() or file.stat().st_size != size:
            return str(name)
    return None


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; none when there is no file."""
    return read_rows(run_dir / "metrics.jsonl")


def append_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file of JSON lines. Raises ValueError for a number that is not finite."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(_line(row) for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none of no file; a last line cut off by a crash is left out."""
    if not file.is_file():
        return []
    # Not splitlines(), which also splits at the line separators that a text may hold.
    with file.open(encoding="utf-8", newline="\n") as stream:
        return [json.loads(line) for line in stream if line.endswith("\n")]


def truncate_rows(file: Path, step: int) -> None:
    """Drop the rows whose "step" is after `step`, which a resumed run makes again."""
    if file.is_file():
        kept = [row for row in read_rows(file) if row["step"] <= step]
        atomic_write_text(file, "".join(map(_line, kept)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


class RunDir:
    """One run directory, for the process that holds its lock."""

    def __init__(self, path: Path):
        self.path = path.absolute()

    @contextmanager
    def locked(self) -> Iterator[RunDir]:
        """Hold the directory's lock. Raises UserError naming the holder when another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK, timeout=0, is_singleton=False)
        holder = self.path / _HOLDER
        try:
            lock.acquire()
        except Timeout:
            raise self._held() from None
        try:
            atomic_write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
            yield self
        finally:
            if holder.exists() and os.access(self.path, os.W_OK):
                holder.unlink()
            lock.release()

    def check_unlocked(self) -> None:
        """Raise UserError naming the holder when another process has the lock. Nothing is created."""
        file = self.path / _LOCK
        if not file.is_file() or not os.access(file, os.W_OK):
            return
        try:
            with FileLock(file, timeout=0, is_singleton=False):
                return
        except Timeout:
            raise self._held() from None

    def _held(self) -> UserError:
        return UserError(
            f"{self.path}: is being written by {_holder_text(self.path / _HOLDER)}\n"
            "    wait for it to end, stop it, or choose another directory for this run"
        )

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, None before the first run."""
        return read_manifest(self.path)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest atomically."""
        atomic_write_json(self.path / "manifest.json", manifest)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl. Raises ValueError for a number that is not finite."""
        append_rows(self.path / "metrics.jsonl", [row])

    def truncate_after(self, step: int) -> None:
        """Drop the rows of metrics.jsonl that were written after `step`."""
        truncate_rows(self.path / "metrics.jsonl", step)

    def check_ours(self) -> None:
        """Raise UserError when the directory holds files but was not made by posttrain."""
        for place in (self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                raise UserError(
                    f"{place}: is a file, so {self.path} cannot be a run directory; choose another place"
                )
        if not self.path.exists() or (self.path / "manifest.json").is_file():
            return
        strangers = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        if strangers:
            raise UserError(
                f"{self.path}: is not a run directory (it holds {', '.join(strangers[:3])} "
                "and no manifest.json), so it is left alone\n"
                "    choose another output directory, or empty this one yourself"
            )

    def remove_staging(self) -> None:
        """Remove what an unfinished write left behind."""
        for item in self.path.glob(f"{STAGING_PREFIX}*"):
            _remove(item)

    def clear(self, keep: Collection[str] = ()) -> None:
        """Make room for a rerun. The contents of a finished run are kept once, in `.previous/`.

        keep: names in the directory that stay where they are, since the rerun adds to them.
        """
        manifest = self.manifest()
        finished = manifest is not None and manifest["status"] == "complete"
        previous = self.path / PREVIOUS
        if manifest is not None:
            # From here until the next manifest an interruption leaves a run that is not finished.
            self.write_manifest(
                {**manifest, "status": "failed", "error": "replaced by a rerun", "inputs_hash": ""}
            )
        if finished:
            _remove(previous)
            previous.mkdir()
            atomic_write_json(previous / "manifest.json", manifest)
        for item in sorted(self.path.iterdir()):
            if (
                item.name.startswith(".")
                and not item.name.startswith(STAGING_PREFIX)
                or item.name == "manifest.json"
                or item.name in keep
            ):
                continue
            if finished and not item.name.startswith(STAGING_PREFIX):
                item.rename(previous / item.name)
            else:
                _remove(item)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holder_text(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return "another process"
    return f"process {record['pid']} on {record['host']}"
