"""Finds a figure in a run: by its path in the results, or by its name among the manifest's metrics."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.inputs import resolve

RESULTS = {"eval": "eval.json", "judge": "judge.json", "benchmark": "benchmark.json"}
"""The file of results of a stage; of the others, only the manifest's metrics."""
ENDS = ("value", "low", "high")


class MissingFigureError(UserError):
    """A gate asks for a figure that the run has not got."""


@dataclass(frozen=True)
class Figures:
    """The numbers of a run by dotted path; those of an interval under `PATH.value`, `.low` and `.high`."""

    run: str
    numbers: dict[str, float]

    def get(self, metric: str, end: str) -> float:
        """The figure, or that end of its interval. Raises MissingFigureError naming the nearest there is."""
        for name in (f"{metric}.{end}", metric) if end == "value" else (f"{metric}.{end}",):
            if name in self.numbers:
                return self.numbers[name]
        known = {name.removesuffix(".value") for name in self.numbers}
        if end != "value" and (metric in self.numbers or f"{metric}.value" in self.numbers):
            raise MissingFigureError(f"{self.run}: {metric} has no interval, so no `{end}`")
        close = difflib.get_close_matches(metric, sorted(known), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {len(known)} figures"
        raise MissingFigureError(f"{self.run}: has no figure {metric}\n    {hint}")


def load_figures(run: str) -> Figures:
    """Every finite number in a finished run. Raises UserError for what is no finished run."""
    found = resolve(run, "run")
    manifest, path = found.manifest or {}, found.path or Path(run)
    numbers = _flatten(manifest.get("metrics", {}), "")
    file = path / RESULTS.get(str(manifest.get("stage")), "")
    if file.is_file():
        try:
            numbers |= _flatten(json.loads(file.read_text(encoding="utf-8")), "")
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: is not valid JSON ({error.msg})") from None
    return Figures(run, numbers)


def _flatten(value: Any, prefix: str) -> dict[str, float]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(i), item) for i, item in enumerate(value)]
    elif isinstance(value, (bool, int, float)) and math.isfinite(value):
        return {prefix: float(value)}
    else:
        return {}
    found: dict[str, float] = {}
    for key, item in items:
        found |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found
