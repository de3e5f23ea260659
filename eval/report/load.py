"""A pipeline directory as the report reads it. Stages that are missing or unfinished are no error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.rundir import metric_rows

JSON_FILES = ("eval", "parity")
"""Stage results the report knows how to show, read from <stage>/<name>.json where they exist."""


@dataclass(frozen=True)
class Stage:
    """One stage directory. `files` holds the contents of the JSON results by name (see `JSON_FILES`)."""

    name: str
    path: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.manifest.get("stage", self.name))

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "not run"))

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, rows without it or with a non-finite value left out."""
        points = [
            (float(row["step"]), float(row[metric]))
            for row in self.metrics
            if is_number(row.get(metric)) and is_number(row.get("step"))
        ]
        return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Pipeline:
    """One pipeline directory with the stages that have run, in pipeline order."""

    name: str
    path: Path
    stages: list[Stage]
    planned: list[str]

    def first(self, kind: str) -> Stage | None:
        """The first stage of that kind, or None."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    def with_file(self, name: str) -> Stage | None:
        """The last stage that wrote that JSON result, or None."""
        return next((stage for stage in reversed(self.stages) if name in stage.files), None)


def is_number(value: Any) -> bool:
    """A finite int or float; JSON's NaN and Infinity, as Python writes them, are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: the file does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, none where there is no such file.

    Raises:
        DataError: a line is not JSON.
    """
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1
    ):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}); run the eval stage again") from error
    return rows


def load_stage(path: Path) -> Stage:
    """One stage directory; only its manifest has to exist."""
    files = {
        name: read_json(path / f"{name}.json") for name in JSON_FILES if (path / f"{name}.json").exists()
    }
    samples = read_samples(path / "samples.jsonl") if "eval" in files else []
    manifest = read_json(path / "manifest.json")
    return Stage(path.name, path, manifest, metric_rows(path), files, samples)


def load_pipeline(path: Path) -> Pipeline:
    """A pipeline directory: name and order from pipeline.json where there is one, else by start time.

    Raises:
        DataError: nothing under `path` is a stage directory.
    """
    described = read_json(path / "pipeline.json") if (path / "pipeline.json").exists() else {}
    planned = [str(name) for name in described.get("stages", [])]
    found = {folder.parent.name: load_stage(folder.parent) for folder in sorted(path.glob("*/manifest.json"))}
    if not found:
        raise DataError(f"{path}: no stage has run here (no */manifest.json); run the pipeline first")
    order = [name for name in planned if name in found]
    unplanned = sorted(
        set(found) - set(order), key=lambda name: (str(found[name].manifest.get("started")), name)
    )
    stages = [found[name] for name in order + unplanned]
    return Pipeline(str(described.get("name", path.name)), path, stages, planned or order + unplanned)
