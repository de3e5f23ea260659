"""`posttrain check --offline`: looking at a configuration that is meant for another machine.

Nothing is fetched. A model that is not here is known by its outline, its architecture without tokenizer and
weights: a Hub id has the config.json that ships with posttrain (posttrain.known_models), a stage's output
that of the model it starts from, so that ${stage:dpo} of ${stage:sft} of Qwen/Qwen3-4B is a Qwen3 of that
size. What only this machine lacks is no problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import StageConfig, find_references
from posttrain.errors import Problem, UserError
from posttrain.hashing import adapter_base
from posttrain.inputs import ResolvedInput
from posttrain.known_models import known_config
from posttrain.planning import awaited_inputs
from posttrain.preflight import Review, available, review_stage
from posttrain.registry import load, stage_spec
from posttrain.stage_file import StageBlock

IN_OUTLINE = "only its architecture was looked at, not its tokenizer and weights"
FIRST_ADAPTER = "adapters.0.model"
"""Of a merge of several, which all have one base."""
MACHINE = "number formats, processes, memory and disk are those of the machine that runs it"


@dataclass(frozen=True)
class Outline:
    """A model of which only the architecture is known.

    ref: as the configuration names it. config: its config.json, or the directory that holds one. kind,
    settings: of the stage that will make it, None for a model that no stage makes. source: the model which
    that stage starts from.
    """

    ref: str
    config: Path
    kind: str | None = None
    settings: StageConfig | None = None
    source: Outline | None = None


def review_offline(blocks: Iterable[StageBlock]) -> list[Review]:
    """As `posttrain.preflight.review`, for another machine: models that are not here are looked at by their
    outline, and a problem of this machine counts as not looked at.
    """
    pending: dict[Path, str] = {}
    made: dict[str, Outline] = {}
    return [_review(block, pending, made) for block in blocks]


def _review(block: StageBlock, pending: dict[Path, str], made: dict[str, Outline]) -> Review:
    awaited = awaited_inputs(block.config, pending)
    inputs, _ = available(block.config, pending)
    outlines = outline_inputs(block.config, inputs, awaited, made)
    review = review_stage(block, pending)
    findings, unseen = review.findings, dict(review.unseen)
    here = [problem for problem in findings.problems if problem.here]
    findings.problems = [problem for problem in findings.problems if not problem.here]
    spec = stage_spec(block.kind)
    if spec.outline is not None:
        if outlines and all(problem.here for problem in block.check()):
            findings.add(load(spec.outline)(block.config, outlines).located(block.locate))
        made |= _made(block, inputs, outlines)
    if spec.preflight is not None:
        unseen |= {field: f"{unseen[field]}; {IN_OUTLINE}" for field in outlines}
        unseen["machine"] = MACHINE
    unseen |= {_field(problem, block): problem.message for problem in here}
    return Review(block.name, findings, unseen)


def _field(problem: Problem, block: StageBlock) -> str:
    """The field of the stage that a located problem is about; "machine" where it is about none."""
    _, found, path = problem.where.rpartition(": ")
    return path.removeprefix(".".join(block.prefix)).strip(".") if found else "machine"


def outline_inputs(
    config: StageConfig,
    inputs: Mapping[str, ResolvedInput],
    awaited: Mapping[str, str],
    made: Mapping[str, Outline],
) -> dict[str, Outline]:
    """The model inputs that are not here but whose architecture is known, by field.

    inputs: those that were found. awaited: field -> stage that will make it. made: outlines by stage.
    """
    outlines: dict[str, Outline] = {}
    for reference in find_references(config):
        field = reference.field
        found = inputs.get(field)
        if reference.kind != "model" or (found is not None and found.path is not None):
            continue
        if field in awaited:
            outlines |= {field: made[awaited[field]]} if awaited[field] in made else {}
        elif (path := known_config(reference.value)) is not None:
            outlines[field] = Outline(reference.value, path)
    return outlines


def _made(
    block: StageBlock, inputs: Mapping[str, ResolvedInput], outlines: Mapping[str, Outline]
) -> dict[str, Outline]:
    """The outline of what a stage makes from its `model`, or its first adapter, by the stage's name."""
    source = outlines.get("model", outlines.get(FIRST_ADAPTER))
    found = inputs.get("model", inputs.get(FIRST_ADAPTER))
    if source is None and found is not None and found.path is not None:
        source = _present(found.ref, found.path)
    if source is None:
        return {}
    return {block.name: Outline(str(block.run_dir), source.config, block.kind, block.config, source)}


def _present(ref: str, path: Path) -> Outline | None:
    """The outline of a model that is here; None for an adapter whose base is gone."""
    if not (path / "adapter_config.json").is_file():
        return Outline(ref, path)
    try:
        return Outline(ref, adapter_base(path))
    except UserError:
        return None
