"""A scorer that ends its process, once, at a text that names a file which is not there yet."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path


def score(texts: Sequence[str]) -> list[float]:
    for text in texts:
        found = re.search(r"once at (\S+)", text)
        if found and not Path(found[1]).exists():
            Path(found[1]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(texts)
