"""What the settings of every benchmark can do: go to a child process as a file, and come back from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class SettingsFile:
    """Base of a benchmark's settings, whose fields JSON can hold."""

    def write(self, path: Path) -> None:
        """Replace `path`."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
