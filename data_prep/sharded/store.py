"""The work directory: a folder a segment, in it a few files a chunk, each there completely or not at all.

A chunk is done when its .json is there: it is written last, and names the sizes of the others. The directory
holds rows as they were read, before anything is redacted, so nobody but its owner may look into it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

NAME = ".curation"
"""In the run directory; hidden, so that it is no output of the run."""
_PLAN = "plan.json"
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Store:
    """The files of one run under `root`."""

    root: Path

    @classmethod
    def opened(cls, root: Path, plan: str, *, resume: bool) -> Store:
        """The directory with what an interrupted run of the same plan left, or an empty one."""
        store = cls(root)
        if not (resume and store._plan() == plan):
            store.remove()
            root.mkdir(mode=0o700)
            write_json(root / _PLAN, {"plan": plan})
        return store

    def _plan(self) -> str | None:
        found = read_json(self.root / _PLAN)
        return found["plan"] if found else None

    def remove(self) -> None:
        """Remove it with all that is in it."""
        if self.root.exists():
            shutil.rmtree(self.root)

    def segment(self, number: int) -> Path:
        """The folder of a segment, made where it is not there."""
        folder = self.root / f"{number:02}"
        folder.mkdir(exist_ok=True)
        return folder

    def file(self, segment: int, chunk: int, what: str) -> Path:
        """A file of a chunk: "rows.arrow"."""
        return self.root / f"{segment:02}" / f"{chunk:06}.{what}"

    def result(self, segment: int, chunk: int) -> dict[str, Any] | None:
        """What was said of a chunk that is done; None where it is not, or lost a file."""
        found = read_json(self.file(segment, chunk, "json"))
        if found is None:
            return None
        for name, size in found["files"].items():
            file = self.file(segment, chunk, name)
            # Files that later segments do not need are removed while the run goes on.
            if file.exists() and file.stat().st_size != size:
                return None
        return found

    def done(self, segment: int) -> int:
        """How many chunks of a segment are done."""
        return sum(1 for _ in self.segment(segment).glob("[0-9]*.json"))

    def finish(self, segment: int, chunk: int, said: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
        """Note that a chunk is done."""
        sizes = {name: self.file(segment, chunk, name).stat().st_size for name in files}
        write_json(self.file(segment, chunk, "json"), {**said, "files": sizes})
        return {**said, "files": sizes}

    def drop(self, segment: int, *what: str) -> None:
        """Remove files of all chunks of a segment."""
        for name in what:
            for file in self.segment(segment).glob(f"*.{name}"):
                file.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory for the time of a decision."""
        folder = self.root / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which becomes `file` when the block succeeds.

    It is new each time: a process that was given up for lost may be writing the same file still.
    """
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        yield beside
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file, all or nothing."""
    with replacing(file) as beside:
        beside.write_bytes(data)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON value, all or nothing."""
    write_bytes(file, json.dumps(value, ensure_ascii=False).encode("utf-8"))


def read_json(file: Path) -> Any:
    """The value, None where there is none or a crash of the machine left half of it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_table(file: Path, table: pa.Table) -> None:
    """Write an Arrow file, all or nothing."""
    with replacing(file) as beside, pa.ipc.new_file(beside, table.schema, options=_OPTIONS) as writer:
        writer.write_table(table)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an Arrow file, or some of its columns."""
    with pa.OSFile(str(file)) as source:
        reader = pa.ipc.open_file(source)
        if columns is None:
            return reader.read_all()
        wanted = sorted(reader.schema.get_field_index(name) for name in columns)
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
        return reader.read_all().select(list(columns))


@dataclass(frozen=True)
class FileViews:
    """Views that lie in a file a chunk. names: their columns, None for all of the files."""

    files: Sequence[Path]
    rows: int
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.rows

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """A table a chunk."""
        return (read_table(file, columns or self.names) for file in self.files)
