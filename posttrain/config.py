"""What every configuration model is made of.

A stage's configuration is a `StageConfig`: strict (unknown keys and wrong types are errors), frozen,
each field described. Fields that name an input of the stage are annotated with `ModelRef`,
`ForeignModelRef`, `DatasetRef`, `RunRef` or `FileRef`, alone or inside `| None`, `list[...]`,
`dict[str, ...]` or a nested `StrictModel`; `find_references` finds them, which is all that lineage
needs to know.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from posttrain.yaml_source import load_yaml

__all__ = [
    "DatasetRef",
    "FileRef",
    "ForeignModelRef",
    "HowOnly",
    "InputKind",
    "ModelRef",
    "Reference",
    "RunRef",
    "StageConfig",
    "StrictModel",
    "find_references",
    "how_fields",
    "load_yaml",
]


class InputKind(str):
    """Marks a string field as an input of the stage: "model", "dataset", "run" or "file"."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(core_schema), "x-posttrain-input": str(self)}


@dataclass(frozen=True)
class OwnTokenizer:
    """Marks a model input whose tokenizer and template may differ from those of the stage's other models."""


@dataclass(frozen=True)
class HowOnly:
    """Marks a field that says how a stage does its work and never what comes of it: a number of processes.

    It does not count in the hash of the stage's inputs, so a run may be resumed with another value.
    """


ModelRef = Annotated[str, InputKind("model")]
ForeignModelRef = Annotated[str, InputKind("model"), OwnTokenizer()]
DatasetRef = Annotated[str, InputKind("dataset")]
RunRef = Annotated[str, InputKind("run")]
FileRef = Annotated[str, InputKind("file")]


class StrictModel(BaseModel):
    """A configuration block: unknown keys are errors, values keep their YAML type, instances are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, use_attribute_docstrings=False
    )


class StageConfig(StrictModel):
    """What every stage's configuration has."""

    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of Python, NumPy and torch at the start of the stage."
    )


@dataclass(frozen=True)
class Reference:
    """One input named by a configuration. field: dotted path inside the stage's block ("models.sft").

    own_tokenizer: the stage renders the text anew for this model (`ForeignModelRef`).
    """

    field: str
    kind: str
    value: str
    own_tokenizer: bool = False


def find_references(config: BaseModel) -> list[Reference]:
    """Every input that `config` names, in field order. Fields that are None are left out."""
    found: dict[str, Reference] = {}
    for reference in _walk_model(config, ""):
        found.setdefault(reference.field, reference)
    return list(found.values())


def how_fields(config: StageConfig) -> set[str]:
    """The fields of a stage's own block that are marked HowOnly."""
    return {
        name
        for name, field in type(config).model_fields.items()
        if any(isinstance(mark, HowOnly) for mark in field.metadata)
    }


def _walk_model(model: BaseModel, prefix: str) -> Iterator[Reference]:
    hints = typing.get_type_hints(type(model), include_extras=True)
    for name in type(model).model_fields:
        yield from _walk(hints[name], model.__dict__[name], f"{prefix}{name}")


def _walk(annotation: Any, value: Any, path: str) -> Iterator[Reference]:
    if isinstance(value, BaseModel):
        yield from _walk_model(value, f"{path}.")
        return
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *metadata = typing.get_args(annotation)
        kinds = [mark for mark in metadata if isinstance(mark, InputKind)]
        if kinds and isinstance(value, str):
            own_tokenizer = any(isinstance(mark, OwnTokenizer) for mark in metadata)
            yield Reference(path, str(kinds[0]), value, own_tokenizer)
        else:
            yield from _walk(base, value, path)
    elif origin in (Union, UnionType):
        for arm in typing.get_args(annotation):
            yield from _walk(arm, value, path)
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        item = typing.get_args(annotation)[0]
        for index, element in enumerate(value):
            yield from _walk(item, element, f"{path}.{index}")
    elif origin is dict and isinstance(value, dict):
        item = typing.get_args(annotation)[1]
        for key, element in value.items():
            yield from _walk(item, element, f"{path}.{key}")
