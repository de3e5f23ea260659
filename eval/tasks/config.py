"""Configuration of the `benchmark` stage: targets and tasks. Imports neither torch nor openai."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from jinja2 import TemplateSyntaxError
from pydantic import BeforeValidator, Field

from eval.endpoint_config import check_endpoint
from eval.generators.config import AnswersTarget, EndpointTarget, ModelTarget, TargetConfig
from posttrain.config import DatasetRef, FileRef, StageConfig, StrictModel, load_yaml
from posttrain.errors import ConfigError, Problem, UserError

OverlapMetric = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "distinct_1", "distinct_2"]


class TaskBase(StrictModel):
    """What every task has."""

    data: FileRef | None = Field(None, description="File of JSON lines, or CSV with a header.")
    dataset: DatasetRef | None = Field(None, description="Curated data set, whose eval split is read.")
    limit: int | None = Field(None, ge=1, description="A seeded sample of this many items.")
    skip: list[str] = Field(default_factory=list, description="Targets that are not measured on this task.")


class TextTask(TaskBase):
    """A task whose targets answer in text."""

    question_column: str = Field("question", description="Column with the question, in `data`.")
    id_column: str | None = Field(None, description="Column that identifies an item; default: its number.")
    template: str = Field("{{ question }}", description="Jinja text of the user's turn, over the columns.")
    system: str | None = Field(None, description="System message before it.")
    max_new_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(0.0, ge=0.0, description="Sampling temperature; 0 is greedy.")
    samples: int = Field(1, ge=1, description="Answers per prompt; intervals are clustered by prompt.")


class ExactMatchTask(TextTask):
    """The answer is one of the accepted texts, after normalisation."""

    kind: Literal["exact_match"]
    answer_column: str = Field("answer", description="Column with the right answer, or a list of them.")
    extract: str | None = Field(
        None, description="Regular expression; the last match (its first group) is the answer."
    )
    ignore_case: bool = Field(True, description="Compare without regard to case.")
    ignore_punctuation: bool = Field(False, description="Compare without punctuation.")


class Gsm8kTask(TextTask):
    """Grade school mathematics: the number after `####`, or `A:`, is the reference's."""

    kind: Literal["gsm8k"]
    answer_column: str = Field("answer", description="Column with the reference solution.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens of an answer.")


class IfevalTask(TextTask):
    """Verifiable instructions, strict and loose."""

    kind: Literal["ifeval"]
    question_column: str = Field("prompt", description="Column with the prompt.")
    id_column: str | None = Field("key", description="Column that identifies an item.")
    instructions_column: str = Field("instruction_id_list", description="Column with the instructions.")
    parameters_column: str = Field("kwargs", description="Column with their parameters.")
    max_new_tokens: int = Field(1280, ge=1, description="Most tokens of an answer.")


class OverlapTask(TextTask):
    """Overlap with reference texts, and diversity. A `dataset` holds conversations: the last turn is the
    reference."""

    kind: Literal["overlap"]
    reference_column: str = Field("reference", description="Column with a reference, or a list of them.")
    metrics: list[OverlapMetric] = Field(
        default_factory=lambda: list(get_args(OverlapMetric)),
        min_length=1,
        description="What is measured.",
    )


class SafetyTask(TextTask):
    """Refusals, personal data in answers, toxicity. A `dataset` holds prompts."""

    kind: Literal["safety"]
    expect_column: str | None = Field(
        None, description="Column that says `refuse` or `comply`; without one only the refusal rate is given."
    )
    pii: bool = Field(True, description="Count answers with personal data that are not in their prompt.")
    toxicity: str | None = Field(
        None, description="module:function from texts to scores in [0, 1]; none ships."
    )
    toxicity_above: float = Field(0.5, ge=0.0, le=1.0, description="Score from which an answer is toxic.")


class MultipleChoiceTask(TaskBase):
    """The choice with the highest log-likelihood as the answer. A `dataset` holds preference pairs."""

    kind: Literal["multiple_choice"]
    layout: Literal["choices", "truthfulqa"] = Field(
        "choices", description="Columns named below, or those of TruthfulQA.csv (MC1 and MC2)."
    )
    question_column: str = Field("question", description="Column with the question.")
    choices_column: str = Field("choices", description="Column with the list of choices.")
    answer_column: str = Field("answer", description="Column with the number of the right one, from 0.")
    id_column: str | None = Field(None, description="Column that identifies an item; default: its number.")
    template: str = Field("{{ question }}", description="Jinja text of the user's turn, over the columns.")
    system: str | None = Field(None, description="System message before it.")


class PerplexityTask(TaskBase):
    """Perplexity and bits per byte of a data set of texts or conversations (the assistant's turns)."""

    kind: Literal["perplexity"]
    max_tokens: int = Field(1024, ge=2, description="Longer rows are cut; cuts are counted.")


TaskConfig = Annotated[
    ExactMatchTask | Gsm8kTask | IfevalTask | OverlapTask | SafetyTask | MultipleChoiceTask | PerplexityTask,
    Field(discriminator="kind"),
]


def _read_task_files(value: Any) -> Any:
    """Tasks given by the path of a YAML file are read here, so that their data count as inputs."""
    if not isinstance(value, dict):
        return value
    return {name: _task_file(Path(one)) if isinstance(one, str) else one for name, one in value.items()}


def _task_file(path: Path) -> dict[str, Any]:
    try:
        task = load_yaml(path.expanduser())
    except (ConfigError, UserError) as error:
        raise ValueError(str(error)) from None
    data = task.get("data")
    if isinstance(data, str) and not data.startswith("~"):
        task["data"] = str(path.expanduser().parent / data)
    return task


Tasks = Annotated[
    dict[str, TaskConfig],
    BeforeValidator(_read_task_files, json_schema_input_type=dict[str, TaskConfig | str]),
]


class BenchmarkConfig(StageConfig):
    """Which targets are measured on which tasks."""

    targets: dict[str, TargetConfig] = Field(min_length=1, description="What is measured, by name.")
    tasks: Tasks = Field(
        min_length=1,
        description="Tasks by name: a block, or the path of a YAML file with one (its `data` is relative "
        "to that file).",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Level of every interval.")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples behind every bootstrap interval.")
    cache: str | None = Field(
        None, description="SQLite file of answers to share between runs; default: one in the run directory."
    )


_NEEDS_DATA = (ExactMatchTask, Gsm8kTask, IfevalTask)
_NEEDS_LIKELIHOOD = (MultipleChoiceTask, PerplexityTask)


def check(config: BenchmarkConfig, where: str) -> list[Problem]:
    """Contradictions, templates and patterns that cannot work, tasks that a target cannot do."""
    problems = []
    for name, target in config.targets.items():
        if "/" in name:
            problems.append(Problem(f"{where}.targets.{name}", "has a slash in its name", "leave it out"))
        if isinstance(target, EndpointTarget):
            problems += check_endpoint(target, f"{where}.targets.{name}")
    for name, task in config.tasks.items():
        problems += _check_task(task, f"{where}.tasks.{name}", config.targets)
    return problems


def _check_task(task: Any, where: str, targets: dict[str, Any]) -> list[Problem]:
    problems = []
    if isinstance(task, _NEEDS_DATA) and (task.data is None or task.dataset is not None):
        problems.append(Problem(where, f"a {task.kind} task reads `data`", "set data, and no dataset"))
    elif isinstance(task, PerplexityTask) and (task.dataset is None or task.data is not None):
        problems.append(Problem(where, "a perplexity task reads `dataset`", "set dataset, and no data"))
    elif (task.data is None) == (task.dataset is None):
        problems.append(Problem(where, "needs exactly one of `data` and `dataset`", "set one of them"))
    for name in task.skip:
        if name not in targets:
            known = ", ".join(targets)
            problems.append(Problem(f"{where}.skip", f"'{name}' is no target", f"targets are {known}"))
    if isinstance(task, _NEEDS_LIKELIHOOD):
        unable = [
            name
            for name, target in targets.items()
            if not isinstance(target, ModelTarget) and name not in task.skip
        ]
        if unable:
            complaint = f"{task.kind} needs likelihoods, which {', '.join(unable)} cannot give"
            problems.append(Problem(where, complaint, f"set skip: [{', '.join(unable)}]"))
    if not isinstance(task, PerplexityTask):
        problems += _check_template(task.template, f"{where}.template")
    if isinstance(task, ExactMatchTask) and task.extract is not None:
        try:
            re.compile(task.extract)
        except re.error as error:
            problems.append(Problem(f"{where}.extract", f"is no regular expression ({error})"))
    if isinstance(task, (IfevalTask, OverlapTask)):
        problems += _check_packages(task, where)
    if isinstance(task, SafetyTask) and task.toxicity is not None:
        from data_prep.operations.toxicity import load_scorer

        try:
            load_scorer(task.toxicity)
        except UserError as error:
            problems.append(Problem(f"{where}.toxicity", str(error).splitlines()[0], here=True))
    return problems


def _check_template(template: str, where: str) -> list[Problem]:
    from eval.tasks.items import environment

    try:
        environment().from_string(template)
    except TemplateSyntaxError as error:
        return [Problem(where, f"is no Jinja template ({error.message})")]
    return []


def _check_packages(task: IfevalTask | OverlapTask, where: str) -> list[Problem]:
    needed = {"langdetect"} if isinstance(task, IfevalTask) else set()
    if isinstance(task, OverlapTask):
        needed |= {"rouge_score"} if any(one.startswith("rouge") for one in task.metrics) else set()
        needed |= {"sacrebleu"} if {"bleu", "chrf"} & set(task.metrics) else set()
    missing = sorted(name for name in needed if find_spec(name) is None)
    if not missing:
        return []
    remedy = "pip install 'posttrain[tasks]'"
    return [Problem(f"{where}.kind", f"needs the package {', '.join(missing)}", remedy, here=True)]


__all__ = ["AnswersTarget", "BenchmarkConfig", "EndpointTarget", "ModelTarget", "TaskConfig", "check"]
