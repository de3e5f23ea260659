"""From plain YAML data to a configuration model: every mistake a `Problem` with its line and remedy."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import UnionType
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from posttrain.errors import Problem
from posttrain.yaml_source import Document, KeyPath

Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model], data: dict[str, Any], document: Document, prefix: KeyPath
) -> tuple[Model | None, list[Problem]]:
    """`data`, found at `prefix` of `document`, as an instance of `model`, or None and its problems.

    Types are strict: text is not taken for a number, nor a number for a truth value.
    """
    try:
        return model.model_validate_json(json.dumps(data, default=str)), []
    except ValidationError as error:
        details = _without_misspelt(model, error.errors())
        return None, [_problem(model, data, document, prefix, detail) for detail in details]


def _without_misspelt(model: type[BaseModel], details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out a required key that is missing only because it is misspelt, which is reported by itself."""
    meant = set()
    for detail in details:
        if detail["type"] == "extra_forbidden":
            *parent, key = detail["loc"]
            meant.add((*parent, _close(str(key), sorted(_valid_keys(model, parent)))))
    return [detail for detail in details if detail["type"] != "missing" or detail["loc"] not in meant]


def relocate(problems: Iterable[Problem], where: str, document: Document, prefix: KeyPath) -> list[Problem]:
    """Give the problems of a stage's `check` hook, all of which start with `where`, their lines."""
    located = []
    for problem in problems:
        path = problem.where.removeprefix(where).strip(".")
        parts = (*prefix, *path.split(".")) if path else prefix
        located.append(replace(problem, where=document.where(parts)))
    return located


def _problem(
    model: type[BaseModel], data: dict[str, Any], document: Document, prefix: KeyPath, detail: ErrorDetails
) -> Problem:
    location = _yaml_path(data, detail["loc"])
    where = document.where((*prefix, *location))
    if detail["type"] == "extra_forbidden":
        valid = sorted(_valid_keys(model, detail["loc"][:-1]))
        return Problem(where, f"unknown key '{location[-1]}'", nearest(location[-1], valid))
    if detail["type"] == "missing":
        return Problem(where, "required key is missing", _description(model, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    value = detail["input"]
    if not isinstance(value, (dict, list)) and detail["type"] != "value_error":
        message += f" (got {value!r})"
    return Problem(where, message[0].lower() + message[1:], _description(model, detail["loc"]))


def nearest(name: str, valid: Sequence[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or all of them."""
    close = _close(name, valid)
    if close is not None:
        return f"did you mean '{close}'?"
    return f"valid here: {', '.join(valid)}" if valid else "nothing is valid here"


def _close(name: str, valid: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.55)
    return close[0] if close else None


def _yaml_path(data: Any, location: Sequence[int | str]) -> list[str]:
    """The location without the names that pydantic adds for the arms of a union."""
    path: list[str] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif not (last and isinstance(data, dict)):
            continue
        path.append(str(part))
    return path


def _reachable(model: type[BaseModel], location: Sequence[int | str]) -> list[Any]:
    """The annotations that the value at `location` may have."""
    candidates: list[Any] = [model]
    for part in location:
        following: list[Any] = []
        for candidate in _arms(candidates):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                if part in candidate.model_fields:
                    following.append(candidate.model_fields[str(part)].annotation)
            elif typing.get_origin(candidate) in (list, tuple) and isinstance(part, int):
                following.append(typing.get_args(candidate)[0])
            elif typing.get_origin(candidate) is dict:
                following.append(typing.get_args(candidate)[1])
        candidates = following or [arm for arm in _arms(candidates) if _is_called(arm, part)] or candidates
    return _arms(candidates)


def _is_called(candidate: Any, part: int | str) -> bool:
    """Whether pydantic calls this arm of a union `part`: by its class or its discriminator's value."""
    if not (isinstance(candidate, type) and issubclass(candidate, BaseModel)):
        return False
    tags = (typing.get_args(field.annotation) for field in candidate.model_fields.values())
    return candidate.__name__ == part or any(part in values for values in tags)


def _arms(annotations: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for annotation in annotations:
        origin = typing.get_origin(annotation)
        if origin is Annotated:
            flat += _arms(typing.get_args(annotation)[:1])
        elif origin in (Union, UnionType):
            flat += _arms(typing.get_args(annotation))
        else:
            flat.append(annotation)
    return flat


def _valid_keys(model: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    keys: set[str] = set()
    for candidate in _reachable(model, location):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            keys |= set(candidate.model_fields)
    return keys


def _description(model: type[BaseModel], location: Sequence[int | str]) -> str:
    """What the configuration model says about the field nearest to `location`."""
    for end in range(len(location), 0, -1):
        for candidate in _reachable(model, location[: end - 1]):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                field = candidate.model_fields.get(str(location[end - 1]))
                if field is not None and field.description:
                    return f"{location[end - 1]}: {field.description}"
    return ""
