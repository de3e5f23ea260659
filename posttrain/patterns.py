"""Files under a folder or behind a glob. Links are followed, and no folder is entered twice.

`glob.glob` with `**` walks a loop of links until the system refuses a path of 40 of them, with two loops in
one folder 2**40 times; so the walk is here.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

MAGIC = "*?["


def is_pattern(text: str) -> bool:
    """Whether a path has a character that makes it a glob."""
    return any(character in text for character in MAGIC)


def walk(folder: Path) -> Iterator[Path]:
    """Every regular file under `folder`, in a fixed order; names that begin with a dot are left out.

    A folder that several links lead to is entered once. Raises OSError: a folder cannot be listed.
    """
    seen: set[tuple[int, int]] = set()

    def inside(directory: Path) -> Iterator[Path]:
        status = directory.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for name in sorted(os.listdir(directory)):
            entry = directory / name
            if name.startswith("."):
                continue
            if entry.is_dir():
                yield from inside(entry)
            elif entry.is_file():
                yield entry

    yield from inside(folder)


def matching_files(pattern: str) -> list[Path]:
    """Regular files that a glob matches, sorted. `**` is any number of folders, links included."""
    if "**" not in pattern:
        return sorted(Path(name) for name in glob.glob(pattern) if Path(name).is_file())
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if is_pattern(part))
    root = Path(*parts[:fixed])
    if not root.is_dir():
        return []
    wanted = re.compile(_regex(parts[fixed:]))
    return sorted(file for file in walk(root) if wanted.fullmatch(file.relative_to(root).as_posix()))


def _regex(parts: tuple[str, ...]) -> str:
    *folders, last = parts
    inner = ["(?:[^/]+/)*" if part == "**" else f"{_segment(part)}/" for part in folders]
    return "".join(inner) + ("(?:[^/]+/)*[^/]+" if last == "**" else _segment(last))


def _segment(part: str) -> str:
    """One name of the pattern as a regular expression: `*`, `?`, `[...]` and `[!...]`, none across a `/`."""
    pieces = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", part)
    return "".join(_piece(piece) for piece in pieces)


def _piece(piece: str) -> str:
    if piece.startswith("*"):
        return "[^/]*"
    if piece == "?":
        return "[^/]"
    if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
        inner = piece[1:-1].replace("\\", "\\\\")
        return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
    return re.escape(piece)
