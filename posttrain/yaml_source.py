"""One YAML file and the overrides of the command line, read so that a mistake can name its line.

OmegaConf resolves interpolations. `${stage:NAME}` stands for the run directory of the stage NAME of the
same pipeline: `<output_dir>/<name>/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.errors import ConfigError, Problem, UserError

KeyPath = tuple[str, ...]
_OVERRIDE = re.compile(r"^[A-Za-z_][\w-]*(\.[\w-]+)*=")
_STAGE_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class Document:
    """A parsed configuration. lines: YAML path -> line (from 1); overrides: YAML path -> "a.b=c"."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, key_path: Sequence[str | int]) -> str:
        """ "file.yaml:12: stages.sft.trainer", or the override that set it when one did."""
        parts = tuple(str(part) for part in key_path)
        dotted = ".".join(parts)
        for length in range(len(parts), 0, -1):
            if parts[:length] in self.overrides:
                return f"override {self.overrides[parts[:length]]}: {dotted}"
            if parts[:length] in self.lines:
                return f"{self.path}:{self.lines[parts[:length]]}: {dotted}"
        return f"{self.path}: {dotted}" if dotted else str(self.path)


def load_yaml(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration in `path` with the `a.b=c` overrides applied and interpolations resolved.

    Raises UserError for a file that cannot be read and ConfigError for one that cannot be understood.
    """
    return load_document(path, overrides).data


def load_document(path: Path | str | None, overrides: Sequence[str] = ()) -> Document:
    """Like `load_yaml`, with the lines that messages name. path None: the overrides are all there is."""
    if path is None:
        empty = OmegaConf.create({})
        document = Document(Path("command line"), {}, {}, _apply(empty, overrides))
        document.data.update(_resolve(empty, document))
        return document
    path = Path(path)
    node = _compose(path, _read(path))
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    _index(node, (), path, lines, problems)
    if problems:
        raise ConfigError(problems)
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    overridden = _apply(config, overrides)
    document = Document(path, {}, lines, overridden)
    document.data.update(_resolve(config, document))
    return document


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file\n    {_nearest_yaml(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name one YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except PermissionError:
        raise UserError(f"{path}: this user may not read the file; check its permissions") from None


def _nearest_yaml(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"there is no directory {path.parent} either; give the path from {Path.cwd()}"
    names = sorted(other.name for other in path.parent.glob("*.y*ml"))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return f"YAML files in {path.parent}: {', '.join(names) if names else 'none'}"


def _compose(path: Path, text: str) -> yaml.MappingNode:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        detail = " ".join(part for part in (error.context, error.problem) if part)
        remedy = "check the indentation, the quotes and the colons on this line and the one above"
        raise ConfigError([Problem(f"{path}{line}", f"is not valid YAML: {detail}", remedy)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(path), f"is not valid YAML: {error}")]) from None
    if node is None:
        raise ConfigError(
            [Problem(str(path), "the file is empty", "see configs/tiny/ for a complete example")]
        )
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(str(path), "must hold `key: value` pairs at the top level")])
    return node


def _index(
    node: yaml.Node, prefix: KeyPath, path: Path, lines: dict[KeyPath, int], problems: list[Problem]
) -> None:
    """Note the line of every key under `node`, and every key that is written twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                where = f"{path}:{line}: {'.'.join((*prefix, key))}"
                problems.append(
                    Problem(where, f"key '{key}' is already set on line {seen[key]}", "keep one of them")
                )
            seen[key] = line
            lines.setdefault((*prefix, key), line)
            _index(value_node, prefix if key == "<<" else (*prefix, key), path, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault((*prefix, str(index)), item.start_mark.line + 1)
            _index(item, (*prefix, str(index)), path, lines, problems)


def _apply(config: DictConfig, overrides: Sequence[str]) -> dict[KeyPath, str]:
    problems: list[Problem] = []
    applied: dict[KeyPath, str] = {}
    for override in overrides:
        where = f"override {override}"
        if not _OVERRIDE.match(override):
            remedy = "write key.path=value without spaces, for example stages.sft.seed=3"
            problems.append(Problem(where, "is not of the form a.b=c", remedy))
            continue
        key, _, text = override.partition("=")
        try:
            OmegaConf.update(config, key, _override_value(text), merge=True, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            problems.append(
                Problem(
                    where, f"cannot be applied: {_first_line(error)}", "check the key and quote the value"
                )
            )
            continue
        applied[tuple(key.split("."))] = override
    if problems:
        raise ConfigError(problems)
    return applied


def _override_value(text: str) -> Any:
    """The value of an override, read as YAML; interpolations stay as they are."""
    parsed = OmegaConf.to_container(
        OmegaConf.create(f"value: {text}" if text else "value: ''"), resolve=False
    )
    assert isinstance(parsed, dict)
    return parsed["value"]


def _resolve(config: DictConfig, document: Document) -> dict[str, Any]:
    OmegaConf.register_resolver("stage", _stage_directory, replace=True)
    try:
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, UserError) as error:
        full_key = error.full_key if isinstance(error, OmegaConfBaseException) and error.full_key else ""
        parts = [part for part in re.split(r"[.\[\]]+", str(full_key)) if part]
        remedy = "an interpolation is ${a.b} with the full path of a key in this file, or ${stage:NAME}"
        raise ConfigError([Problem(document.where(parts), _first_line(error), remedy)]) from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _stage_directory(name: Any, *, _root_: DictConfig) -> str:
    if not _STAGE_NAME.match(str(name)):
        raise UserError(f"${{stage:{name}}}: '{name}' is not a stage name")
    if "stages" not in _root_ or "name" not in _root_:
        raise UserError(f"${{stage:{name}}} only works in a pipeline (a file with `name` and `stages`)")
    return str(pipeline_directory(str(_root_.get("output_dir", "runs")), str(_root_.name)) / str(name))


def pipeline_directory(output_dir: str, name: str) -> Path:
    """The directory that holds the run directories of a pipeline's stages."""
    return Path(output_dir) / name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
