"""One stage's configuration, from a block of a pipeline or from a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import StageConfig
from posttrain.errors import ConfigError, Problem
from posttrain.registry import load, stage_spec
from posttrain.validation import relocate, validate
from posttrain.yaml_source import Document, KeyPath, load_document

_FILE_KEYS = ("stage", "run_dir", "vars")


@dataclass(frozen=True)
class StageBlock:
    """A stage as written: its kind, its valid configuration, where it writes and where it was read."""

    name: str
    kind: str
    config: StageConfig
    run_dir: Path
    document: Document
    prefix: KeyPath = ()

    def check(self) -> list[Problem]:
        """The problems that only the stage's own hook sees, such as a misspelt trainer argument."""
        hook = stage_spec(self.kind).check
        if hook is None:
            return []
        where = f"{self.document.path}: {'.'.join(self.prefix)}" if self.prefix else str(self.document.path)
        return relocate(load(hook)(self.config, where), where, self.document, self.prefix)

    def locate(self, problems: Sequence[Problem]) -> list[Problem]:
        """Problems whose `where` is a field of this stage, with their YAML path and line."""
        return relocate(problems, "", self.document, self.prefix)


def parse_config(
    kind: str, data: dict[str, Any], document: Document, prefix: KeyPath = ()
) -> tuple[StageConfig | None, list[Problem]]:
    """The configuration model of `kind` filled with `data`, or None and what is wrong with it."""
    return validate(load(stage_spec(kind).config), data, document, prefix)


def load_stage_file(
    kind: str, path: Path | None, overrides: Sequence[str] = (), output: Path | None = None
) -> StageBlock:
    """Read a single-stage YAML file (`path` None: the overrides are the whole configuration).

    The run directory is `output`, else the file's `run_dir`, else `runs/<file name>`. Raises ConfigError.
    """
    document = load_document(path, overrides)
    data = dict(document.data)
    if "stages" in data:
        remedy = f"use `posttrain run {path}`, with --only NAME for one of its stages"
        raise ConfigError([Problem(str(document.path), f"is a pipeline, not a {kind} configuration", remedy)])
    problems = []
    declared = data.get("stage", kind)
    if declared != kind:
        problems.append(
            Problem(
                document.where(("stage",)),
                f"this file is for '{declared}'",
                f"use `posttrain {declared} {path}`",
            )
        )
        raise ConfigError(problems)
    run_dir = data.get("run_dir")
    if run_dir is not None and not isinstance(run_dir, str):
        problems.append(Problem(document.where(("run_dir",)), f"must be a path (got {run_dir!r})"))
    body = {key: value for key, value in data.items() if key not in _FILE_KEYS}
    config, mistakes = parse_config(kind, body, document)
    if config is None or problems:
        raise ConfigError(problems + mistakes)
    place = output or (Path(str(run_dir)) if run_dir else Path("runs") / (path.stem if path else kind))
    return StageBlock(kind, kind, config, place, document)
