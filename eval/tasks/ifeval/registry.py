"""The table of instruction types: a name as in the data, and the function that checks a response."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import DataError

Check = Callable[..., bool]


@dataclass(frozen=True)
class Instruction:
    """One type of instruction: `check(response, **parameters)` says whether a response follows it."""

    name: str
    check: Check
    parameters: frozenset[str]
    required: frozenset[str]
    types: Mapping[str, str]


INSTRUCTIONS: dict[str, Instruction] = {}


def instruction(name: str) -> Callable[[Check], Check]:
    """Enter a checker under `name`; its keyword parameters are the ones the data may give."""

    def enter(check: Check) -> Check:
        found = list(inspect.signature(check).parameters.values())[1:]
        INSTRUCTIONS[name] = Instruction(
            name,
            check,
            frozenset(one.name for one in found),
            frozenset(one.name for one in found if one.default is inspect.Parameter.empty),
            {one.name: str(one.annotation) for one in found},
        )
        return check

    return enter


def bound(name: str, parameters: Mapping[str, Any] | None) -> Callable[[str], bool]:
    """The checker of one instruction of one prompt, a function of the response alone.

    Parameters that are null in the data are not given. Raises DataError for an unknown instruction, an
    unknown parameter, a missing one, or one of another type.
    """
    if name not in INSTRUCTIONS:
        raise DataError(
            f"unknown instruction {name!r}\n    known are {', '.join(sorted(INSTRUCTIONS))}; "
            "register others with eval.tasks.ifeval.registry.instruction"
        )
    known = INSTRUCTIONS[name]
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    unknown, missing = sorted(given.keys() - known.parameters), sorted(known.required - given.keys())
    if unknown or missing:
        what = f"does not take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise DataError(f"instruction {name!r} {what}\n    it takes {', '.join(sorted(known.parameters))}")
    for key, value in given.items():
        if not _fits(value, known.types[key]):
            raise DataError(f"instruction {name!r} needs {key} to be {known.types[key]}, got {value!r}")
    return lambda response: bool(known.check(response, **given))


def _fits(value: Any, wanted: str) -> bool:
    """Whether a value of the data is of the type a checker is annotated with."""
    if wanted == "int":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted == "Sequence[str]":
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return wanted != "str" or isinstance(value, str)


def holds(count: int, relation: str, bound_: int) -> bool:
    """`at least` or `less than`, the two relations of the benchmark. Raises DataError for another word."""
    if relation == "at least":
        return count >= bound_
    if relation == "less than":
        return count < bound_
    raise DataError(f"unknown relation {relation!r}\n    use 'at least' or 'less than'")
