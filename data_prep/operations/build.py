"""From an operation's settings to the operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.near_duplicates import MinHashSettings
from data_prep.operations import config as settings
from data_prep.operations.base import Operation
from data_prep.operations.engine import Step
from data_prep.operations.near_duplicates import Duplicates, NearDuplicates

Locate = Callable[[str], Path]
"""The local path of an input of the stage, by its field: "operations.1.against.0"."""


@dataclass(frozen=True)
class Surroundings:
    """What of the stage some operations need. locate: paths of inputs; by_cluster: the split is by cluster."""

    locate: Locate
    by_cluster: bool = False


def build(configs: Sequence[Any], around: Surroundings) -> list[Step]:
    """The steps in their order. Raises UserError for what an operation needs and this machine lacks."""
    return [
        Step(
            config.op,
            _BUILDERS[type(config)](config, f"operations.{index}", around),
            settings.settings_of(config),
            config.examples,
        )
        for index, config in enumerate(configs)
    ]


def _near_duplicates(config: settings.NearDuplicatesConfig, where: str, around: Surroundings) -> Operation:
    minhash = MinHashSettings(config.threshold, config.words, config.bands, config.rows, config.seed)
    return NearDuplicates(minhash, config.part, config.keep, around.by_cluster)


_BUILDERS: dict[type, Callable[[Any, str, Surroundings], Operation]] = {
    settings.DuplicatesConfig: lambda config, where, around: Duplicates(),
    settings.NearDuplicatesConfig: _near_duplicates,
}
