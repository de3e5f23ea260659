"""The configuration that ingests what was examined: a curate stage, or a pipeline of one per kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.config import CurateConfig
from data_prep.doctor.examine import Examined, Sides
from data_prep.files import unpacked_suffix

MOST_REJECTS = CurateConfig.model_fields["max_reject_fraction"].default
EVAL_FRACTION = 0.1
SAID_OF_EACH = 20
"""Files up to which the configuration has a comment on each of them."""


def usable(found: Examined) -> bool:
    """Whether the file has rows that can be used."""
    return found.error is None and found.suggestion is not None and found.good > 0


def configuration(examined: Sequence[Examined]) -> dict[str, Any] | None:
    """A stage as `{stage: curate, ...}`, for rows of several kinds a pipeline; None without rows."""
    kinds: dict[str, list[Examined]] = {}
    for found in filter(usable, examined):
        assert found.suggestion is not None
        kinds.setdefault(found.suggestion.kind, []).append(found)
    stages = {kind: _stage(kind, files) for kind, files in kinds.items()}
    if len(stages) > 1:
        return {"name": "ingest", "stages": stages}
    return next(iter(stages.values()), None)


def _stage(kind: str, files: list[Examined]) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": "curate", "kind": kind, "sources": _sources(files)}
    rows, rejects = sum(found.rows for found in files), sum(found.rejects.total() for found in files)
    if rejects > MOST_REJECTS * rows:
        stage["max_reject_fraction"] = min(1.0, math.ceil(100 * rejects / rows) / 100)
    groups, singles = Sides(), Sides()
    for found in files:
        groups.join(found.groups)
        singles.join(found.singles)
    share, alone = groups.usable(), singles.usable()
    if share is None and alone is not None:
        stage["split"] = {"by": "record", "eval_fraction": alone}
    elif share is not None and share != EVAL_FRACTION:
        stage["split"] = {"eval_fraction": share}
    return stage


def _sources(files: list[Examined]) -> list[dict[str, Any]]:
    """One source for each file; those of a folder that are read alike, all of their type, share one."""
    sources: list[dict[str, Any]] = []
    done: set[Path] = set()
    for found in files:
        if found.path in done:
            continue
        alike = [other for other in files if _settings(other) == _settings(found) and _beside(other, found)]
        pattern = (
            found.path.parent
            / f"*{''.join(found.path.suffixes[-2:]) if _packed(found) else found.path.suffix}"
        )
        names = {other.path.name for other in alike}
        everything = {path.name for path in pattern.parent.glob(pattern.name)}
        together = len(alike) > 2 and names == everything
        done |= {other.path for other in alike} if together else {found.path}
        sources.append({"path": str(pattern if together else found.path), **_settings(found)})
    return sources


def _packed(found: Examined) -> bool:
    return found.path.suffix.lower() != unpacked_suffix(found.path)


def _beside(one: Examined, other: Examined) -> bool:
    return one.path.parent == other.path.parent and one.path.suffixes[-2:] == other.path.suffixes[-2:]


def _settings(found: Examined) -> dict[str, Any]:
    assert found.suggestion is not None
    settings = dict(found.suggestion.settings)
    if found.facts.layout == "csv":
        settings["read"] = {"header": bool(found.facts.header)}
    return settings


def as_yaml(config: dict[str, Any], examined: Sequence[Examined], paths: Sequence[str]) -> str:
    """The configuration as a file, with comments that say why, and licences to be confirmed."""
    lines = [
        f"# Written by `posttrain data doctor {' '.join(paths)}`.",
        "# Run it: posttrain curate THIS-FILE" if "stage" in config else "# Run it: posttrain run THIS-FILE",
    ]
    for found in filter(usable, examined):
        assert found.suggestion is not None
        said = list(found.suggestion.notes)
        if found.rejects:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.rejects.most_common())
            said.append(f"{found.rejects.total():,} rows cannot be used: {reasons}")
        if said or len(examined) <= SAID_OF_EACH:
            lines.append(f"# {found.path}: {found.rows:,} rows, {found.suggestion.why}")
        lines += [f"#   {note}" for note in said]
    named = Counter(found.licence for found in filter(usable, examined) if found.licence)
    for (name, where), count in named.items():
        files = f"{count} files" if count > 1 else "the file"
        lines.append(f"# licence of {files}: {name}, says {where}; if it holds for the data, set `licence`")
    lines = [" ".join(line.splitlines()) for line in lines]
    return "\n".join(lines) + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
