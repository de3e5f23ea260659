"""Were the training data decontaminated, and against what? Read from the lineage, as far as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset import read_info
from eval.compare.runs import EvalRun
from posttrain.rundir import read_manifest


def contamination(run: EvalRun, model: str) -> dict[str, Any]:
    """The data sets a model was trained on, each with its decontamination.

    status: "checked" where every data set of the lineage was decontaminated, "unchecked" where one was not,
    "unknown" where no data set can be found (models from elsewhere, directories that moved).
    """
    refs = [
        parent["ref"]
        for parent in run.manifest.get("parents", [])
        if parent.get("field") == f"models.{model}"
    ]
    return lineage([Path(ref) for ref in refs])


def lineage(models: Sequence[Path]) -> dict[str, Any]:
    """As `contamination`, for models by the places they were named by."""
    found = []
    for path in dict.fromkeys(place for model in models for place in _datasets(model, set())):
        info = read_info(path) or {}
        steps = [step for step in info.get("operations", []) if step.get("op") == "decontaminate"]
        found.append(
            {
                "data": path.name,
                "decontaminated": bool(steps),
                "against": [name for step in steps for name in step.get("settings", {}).get("against", [])],
                "dropped": sum(sum(step.get("drops", {}).values()) for step in steps),
            }
        )
    status = "unknown"
    if found:
        status = "checked" if all(one["decontaminated"] for one in found) else "unchecked"
    return {"status": status, "data": found}


def _datasets(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Data set directories above a run, through the models it was made from."""
    path = path.expanduser().absolute()
    if path in seen or not path.is_dir():
        return
    seen.add(path)
    if (path / "dataset.json").is_file():
        yield path
        return
    manifest = read_manifest(path) or {}
    for parent in manifest.get("parents", []):
        yield from _datasets(Path(parent["ref"]), seen)
