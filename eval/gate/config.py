"""The file of gates. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from posttrain.config import StrictModel
from posttrain.errors import ConfigError, Problem
from posttrain.validation import validate
from posttrain.yaml_source import Document, load_document


class NotWorse(StrictModel):
    """Non-inferiority to another eval run on the same prompts."""

    run: str = Field(description="Run directory of the eval stage to compare with.")
    by: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="How much worse is still accepted, in units of the metric.",
    )
    confidence: float = Field(
        0.95, gt=0.5, lt=1.0, description="Level of the paired interval that has to stay above -by."
    )
    model: str | None = Field(None, description="Model there; default: the same name.")


class Gate(StrictModel):
    """One condition. Give bounds (`min`, `max`) or `not_worse_than`, or both."""

    metric: str = Field(
        min_length=1, description="Dotted path in the run's results, or a metric of its manifest."
    )
    name: str | None = Field(None, description="What the report calls it; default: the metric.")
    run: str | None = Field(None, description="Run directory; default: `run` of the file.")
    min: float | None = Field(None, allow_inf_nan=False, description="Smallest value that passes.")
    max: float | None = Field(None, allow_inf_nan=False, description="Largest value that passes.")
    end: Literal["value", "low", "high"] = Field(
        "value", description="What is held against the bounds: the estimate, or an end of its interval."
    )
    not_worse_than: NotWorse | None = Field(None, description="Another run that it must not be worse than.")
    lower_is_better: bool = Field(False, description="For not_worse_than: less of the metric is better.")

    @property
    def title(self) -> str:
        return self.name or self.metric


class GatesConfig(StrictModel):
    """A file of gates."""

    run: str | None = Field(None, description="Run directory of gates that name none.")
    gates: list[Gate] = Field(min_length=1, description="All of them have to pass.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples behind paired intervals.")
    seed: int = Field(0, ge=0, description="Of resamples.")


def load_gates(path: Path, overrides: Sequence[str] = ()) -> tuple[GatesConfig, Document]:
    """Read a file of gates. Raises ConfigError with every mistake and its line."""
    document = load_document(path, overrides)
    config, problems = validate(GatesConfig, document.data, document, ())
    for i, gate in enumerate(config.gates if config is not None else ()):
        where = ("gates", str(i))
        if gate.min is None and gate.max is None and gate.not_worse_than is None:
            remedy = "set min, max or not_worse_than"
            problems.append(Problem(document.where(where), "can never fail: it has no bound", remedy))
        if gate.min is not None and gate.max is not None and gate.min > gate.max:
            problems.append(
                Problem(document.where((*where, "min")), f"is over max ({gate.min:g} > {gate.max:g})")
            )
        if config is not None and gate.run is None and config.run is None:
            problems.append(
                Problem(document.where(where), "names no run", "set `run` in it, or at the top of the file")
            )
    if config is None or problems:
        raise ConfigError(problems)
    return config, document
