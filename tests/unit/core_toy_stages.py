"""Small stages for the tests of the core: real run directories and inputs, no learning.

`toy` writes value.txt from its own text and the text of its upstream runs, one logged step and one checkpoint
a step. `INTERRUPT_AT` stops it once before that step, the way ctrl-C would.
"""

from __future__ import annotations

import errno
import json
import random
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from posttrain import registry
from posttrain.config import FileRef, ForeignModelRef, ModelRef, RunRef, StageConfig, StrictModel
from posttrain.context import StageContext
from posttrain.errors import DataError, Problem
from posttrain.registry import StageSpec

CALLS: list[str] = []
INTERRUPT_AT: list[int] = []


class ToyTrainer(StrictModel):
    learning_rate: float = Field(1e-3, gt=0, description="Step size.")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's averages.")


class Small(StrictModel):
    kind: Literal["small"] = Field("small", description="Which one.")
    width: int = Field(1, description="How wide.")


class Large(StrictModel):
    kind: Literal["large"] = Field("large", description="Which one.")
    height: int = Field(1, description="How high.")


class ToyConfig(StageConfig):
    text: str = Field(description="What to write.")
    steps: int = Field(3, ge=0, description="How many steps.")
    fail: Literal["user", "program", "disk"] | None = Field(None, description="How to fail, if at all.")
    file: FileRef | None = Field(None, description="A file to read.")
    upstream: RunRef | list[RunRef] | None = Field(None, description="Runs to read.")
    models: dict[str, ModelRef] = Field(default_factory=dict, description="Models by name.")
    judges: list[ForeignModelRef] = Field(default_factory=list, description="Models with any tokenizer.")
    trainer: ToyTrainer = Field(default_factory=ToyTrainer, description="Nested block.")
    shape: Annotated[Small | Large, Field(discriminator="kind")] = Field(
        default_factory=Small, description="One of two blocks."
    )
    others: list[ToyTrainer] = Field(default_factory=list, description="A list of blocks.")


def run(config: ToyConfig, context: StageContext) -> dict[str, Any]:
    CALLS.append(context.run_dir.name)
    done = 0
    context.checkpoints.mkdir(exist_ok=True)
    state = context.checkpoints / "state.json"
    if state.is_file():
        done = json.loads(state.read_text())["step"]
    context.rewind(done)
    with context.progress("steps", config.steps) as bar, context.phase("train"):
        for step in range(done + 1, config.steps + 1):
            if step in INTERRUPT_AT:
                INTERRUPT_AT.remove(step)
                context.log(step, half=True)
                raise KeyboardInterrupt
            context.log(step, loss=1.0 / step, bad=float("nan"))
            state.write_text(json.dumps({"step": step}))
            bar.advance()
    with context.staging("parts") as parts:
        (parts / "first.txt").write_text(config.text)
        if config.fail == "user":
            raise DataError("toy.jsonl:3: nothing here\n    add a row")
        if config.fail == "program":
            raise KeyError("surprise")
        if config.fail == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
    texts = [
        (context.path(name) / "value.txt").read_text()
        for name in sorted(context.inputs)
        if "upstream" in name
    ]
    (context.run_dir / "value.txt").write_text("+".join([*texts, config.text]))
    return {"draw": random.random(), "resumed_from": done}


def check(config: ToyConfig, where: str) -> list[Problem]:
    if config.trainer.learning_rate > 1:
        return [Problem(f"{where}.trainer.learning_rate", "is above 1", "lower it")]
    return []


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the stage kind `toy` for one test."""
    CALLS.clear()
    INTERRUPT_AT.clear()
    spec = StageSpec("toy", f"{__name__}:ToyConfig", f"{__name__}:run", f"{__name__}:check", 1, "A toy.")
    monkeypatch.setitem(registry.STAGES, "toy", spec)


def write_report(runs: list[Any], output: Any) -> Any:
    """Stands where eval.report:write_report does, for pipelines of toys."""
    CALLS.append("report")
    output.write_text("<html></html>")
    return output
