"""A pipeline: stages by name in one YAML file, put in the order of their inputs.

    name: tiny
    output_dir: runs
    stages:
      demos: {stage: curate, ...}
      sft: {model: "${stage:base}", data: "${stage:demos}", ...}

`stage:` says which kind of stage it is, and may be left out when the name says so.
Each stage writes `<output_dir>/<name>/<stage name>/`. posttrain.pipeline_run executes it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from posttrain.config import StrictModel
from posttrain.errors import ConfigError, Problem, UserError
from posttrain.registry import STAGES, stage_spec, unknown_stage
from posttrain.stage_file import StageBlock, load_stage_file, parse_config
from posttrain.validation import validate
from posttrain.yaml_source import Document, KeyPath, load_document, load_yaml, pipeline_directory

_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*$")


class PipelineConfig(StrictModel):
    """The top level of a pipeline file."""

    name: str = Field(description="Name of the pipeline: its directory under output_dir.")
    output_dir: str = Field("runs", description="Where pipelines are written.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every stage that does not set its own.")
    report: bool = Field(True, description="Write report.html once every stage is complete.")
    vars: dict[str, Any] = Field(
        default_factory=dict, description="Values of your own, for ${vars.x} elsewhere."
    )
    stages: dict[str, dict[str, Any]] = Field(
        min_length=1, description="Stages by name; `stage` in each says which kind it is."
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.match(name):
            raise ValueError("must be letters, digits, '-', '_' and '.', since it names a directory")
        return name


@dataclass(frozen=True)
class Pipeline:
    """A valid pipeline. stages: in the order of execution; depends: direct predecessors by stage name."""

    config: PipelineConfig
    document: Document
    directory: Path
    stages: dict[str, StageBlock]
    depends: dict[str, list[str]]

    def select(self, only: Collection[str] = (), until: str | None = None) -> list[str]:
        """The stages named by `only`, or `until` with all it depends on, or all; in order of execution."""
        for name in [*only, *([until] if until else [])]:
            if name not in self.stages:
                close = difflib.get_close_matches(name, self.stages, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"stages are {', '.join(self.stages)}"
                raise UserError(f"{self.document.path}: there is no stage '{name}'\n    {hint}")
        wanted = set(only) or set(self.stages)
        if until:
            wanted &= {until} | _ancestors(until, self.depends)
        return [name for name in self.stages if name in wanted]


def load_pipeline(path: Path, overrides: Sequence[str] = (), *, run_checks: bool = False) -> Pipeline:
    """Read and validate a pipeline file. Raises ConfigError with every mistake in it.

    run_checks: also call every stage's `check` hook (which may import trainers) when nothing else is
    wrong; when something is, the hooks of the valid stages are called anyway, so that one run tells all.
    """
    document = load_document(path, overrides)
    if "stages" not in document.data and "stage" in document.data:
        remedy = f"use `posttrain {document.data['stage']} {path}`"
        raise ConfigError([Problem(str(path), "is the configuration of one stage, not a pipeline", remedy)])
    config, problems = validate(PipelineConfig, document.data, document, ())
    raw = document.data.get("stages")
    name, output_dir = document.data.get("name"), document.data.get("output_dir", "runs")
    directory = pipeline_directory(str(output_dir), str(name))
    blocks: dict[str, StageBlock] = {}
    depends: dict[str, list[str]] = {}
    if isinstance(raw, dict):
        blocks, block_problems = _parse_stages(raw, document, directory)
        depends, reference_problems = _dependencies(raw, document, directory)
        problems += block_problems + reference_problems
    if problems or run_checks:
        for block in blocks.values():
            problems += block.check()
    if problems or config is None:
        raise ConfigError(problems)
    ordered = {name: blocks[name] for name in _order(depends)}
    return Pipeline(config, document, directory, ordered, depends)


def _parse_stages(
    raw: dict[str, Any], document: Document, directory: Path
) -> tuple[dict[str, StageBlock], list[Problem]]:
    blocks: dict[str, StageBlock] = {}
    problems: list[Problem] = []
    for name, data in raw.items():
        prefix: KeyPath = ("stages", name)
        if not isinstance(data, dict):
            continue
        if not _NAME.match(name):
            problems.append(
                Problem(document.where(prefix), f"'{name}' cannot name a directory", "use letters and digits")
            )
            continue
        kind = data.get("stage", name)
        if kind not in STAGES:
            place = document.where((*prefix, "stage") if "stage" in data else prefix)
            missing = "" if "stage" in data else "no `stage` key, and the name is not a stage: "
            problems.append(
                Problem(
                    place, missing + unknown_stage(str(kind)), "" if "stage" in data else _stage_hint(raw)
                )
            )
            continue
        body = {key: value for key, value in data.items() if key != "stage"}
        seed = document.data.get("seed")
        if seed is not None:
            body.setdefault("seed", seed)
        config, mistakes = parse_config(kind, body, document, prefix)
        problems += mistakes
        if config is not None:
            blocks[name] = StageBlock(name, kind, config, directory / name, document, prefix)
    return blocks, problems


def _stage_hint(raw: dict[str, Any]) -> str:
    return f"add `stage: KIND` to it; the pipeline's stages are {', '.join(raw)}"


def _dependencies(
    raw: dict[str, Any], document: Document, directory: Path
) -> tuple[dict[str, list[str]], list[Problem]]:
    """Who reads whose run directory, from every text in a stage's block that lies under the pipeline's."""
    depends: dict[str, list[str]] = {name: [] for name in raw}
    problems: list[Problem] = []
    root = directory.absolute()
    for name, data in raw.items():
        for key_path, text in _texts(data, ("stages", name)):
            path = Path(text).expanduser().absolute()
            if root not in path.parents:
                continue
            other = path.relative_to(root).parts[0]
            if other not in raw:
                close = difflib.get_close_matches(other, raw, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"stages are {', '.join(raw)}"
                problems.append(Problem(document.where(key_path), f"there is no stage '{other}'", hint))
            elif other not in depends[name]:
                depends[name].append(other)
    cycle = _cycle(depends)
    if cycle:
        where = document.where(("stages", cycle[0]))
        problems.append(Problem(where, f"stages need each other: {' -> '.join(cycle)}", "break the circle"))
    return depends, problems


def _texts(value: Any, key_path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield key_path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*key_path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*key_path, str(index)))


def _cycle(depends: dict[str, list[str]]) -> list[str]:
    """One circle of stages, first and last equal; empty when there is none."""
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in finished:
            return []
        for other in depends[name]:
            found = visit(other, [*trail, name])
            if found:
                return found
        finished.add(name)
        return []

    for name in depends:
        found = visit(name, [])
        if found:
            return found
    return []


def _order(depends: dict[str, list[str]]) -> list[str]:
    """Predecessors first; otherwise as written in the file."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name not in ordered:
            for other in depends[name]:
                visit(other)
            ordered.append(name)

    for name in depends:
        visit(name)
    return ordered


def _ancestors(name: str, depends: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(depends[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += depends[other]
    return found


def read_blocks(path: Path, overrides: Sequence[str] = ()) -> list[StageBlock]:
    """The stages of a pipeline in order of execution, or the one of a stage file. Raises ConfigError."""
    data = load_yaml(path, overrides)
    if "stage" not in data or "stages" in data:
        return list(load_pipeline(path, overrides).stages.values())
    return [load_stage_file(stage_spec(str(data["stage"])).name, path, overrides)]
