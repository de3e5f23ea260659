"""Configuration of the `judge` stage. Imports neither torch nor openai."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eval.endpoint_config import EndpointFields, check_endpoint
from posttrain.config import FileRef, ForeignModelRef, RunRef, StageConfig, StrictModel
from posttrain.errors import Problem


class AnswersSource(StrictModel):
    """Answers to judge: the samples of an eval run, or a file of JSON lines."""

    run: RunRef | None = Field(
        None, description="Run directory of an `eval` stage; its samples.jsonl is read."
    )
    path: FileRef | None = Field(None, description="File of JSON lines with answers (docs/judging.md).")
    model: str | None = Field(None, description="Model whose answers `path` holds, if its rows do not say.")
    names: dict[str, str] = Field(
        default_factory=dict, description="New names for models, to tell apart two of the same name."
    )


class GoldJudge(StrictModel):
    """A programmatic rubric. It needs `facts` in the meta of every prompt."""

    kind: Literal["gold"]
    rubric: Literal["support_desk"] = Field("support_desk", description="Which rubric scores the answers.")
    tie_tolerance: float = Field(1e-9, ge=0.0, description="Two scores at most this far apart are a tie.")


class RewardJudge(StrictModel):
    """A reward model: the answer with the higher score wins."""

    kind: Literal["reward"]
    model: ForeignModelRef = Field(description="Reward model: a run directory, a local path or a Hub id.")
    tie_tolerance: float = Field(1e-9, ge=0.0, description="Two scores at most this far apart are a tie.")
    batch_size: int = Field(32, ge=1, description="Dialogues per forward pass.")
    max_tokens: int = Field(1024, ge=8, description="Longer dialogues keep their end; cuts are counted.")


class EndpointJudge(EndpointFields):
    """A language model behind an OpenAI-compatible chat endpoint."""

    kind: Literal["endpoint"]
    method: Literal["pairwise", "rating"] = Field(
        "pairwise", description="Compare two answers in both orders, or rate each from 1 to 10 by itself."
    )
    template: FileRef | None = Field(
        None, description="Jinja file with the blocks `system` and `user`; default: the bundled one."
    )
    use_references: bool = Field(
        True,
        description="Show the reference answer of a question that has one.",
    )
    temperature: float | None = Field(0.0, ge=0.0, description="Sampling temperature; null: do not send one.")
    seed: int | None = Field(None, description="Seed sent to the endpoint; null: do not send one.")
    max_tokens: int = Field(1024, ge=16, description="Most tokens of one reply.")
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name under which `max_tokens` is sent; reasoning models want the second."
    )
    json_mode: bool = Field(False, description="Send response_format json_object.")
    timeout_s: float = Field(60.0, gt=0.0, description="Seconds until a request counts as failed.")
    backoff_s: float = Field(
        1.0,
        ge=0.0,
        description="First pause before a retry; it doubles, with jitter, up to max_wait_s.",
    )
    max_wait_s: float = Field(
        120.0, ge=0.0, description="Longest pause; a Retry-After beyond it leaves the request as failed."
    )
    price_input: float | None = Field(None, ge=0.0, description="Price of a million prompt tokens.")
    price_output: float | None = Field(None, ge=0.0, description="Price of a million reply tokens.")
    max_cost: float | None = Field(
        None,
        ge=0.0,
        description="Budget of this judge, replies already there included; needs both prices.",
    )


class VotesJudge(StrictModel):
    """People: a file of single votes on pairs of answers."""

    kind: Literal["votes"]
    path: FileRef = Field(description="Lines of JSON with model_a, model_b, choice, and a prompt or its id.")


Judge = Annotated[GoldJudge | RewardJudge | EndpointJudge | VotesJudge, Field(discriminator="kind")]


class JudgeConfig(StageConfig):
    """Whose answers are compared, and by which judges."""

    answers: list[AnswersSource] = Field(min_length=1, description="Where the answers are.")
    questions: FileRef | None = Field(
        None,
        description="Questions (MT-bench style, or prompts with ids) that answers refer to by id.",
    )
    references: FileRef | None = Field(
        None, description="Reference answers by question id, in the MT-bench answer format."
    )
    models: list[str] | None = Field(None, description="Models that are compared; default: all in `answers`.")
    baseline: str | None = Field(None, description="Model the others are compared with; default: the first.")
    pairs: Literal["baseline", "all"] = Field(
        "baseline", description="Compare every model with the baseline, or every two models."
    )
    judges: dict[str, Judge] = Field(min_length=1, description="Judges by the name they carry in the report.")
    num_prompts: int | None = Field(None, ge=1, description="Judge a seeded sample of this many prompts.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Level of every interval.")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples behind every bootstrap interval.")
    margin: float = Field(
        0.03,
        gt=0.0,
        lt=0.5,
        description="Distance from one half that the power calculation is for.",
    )
    power: float = Field(0.8, gt=0.5, lt=1.0, description="Power that the power calculation is for.")
    max_failed: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of an endpoint's verdicts that may stay failed in a complete run.",
    )
    cache: str | None = Field(
        None, description="SQLite file of replies to share between runs; default: one in the run directory."
    )
    dry_run: bool = Field(
        False, description="Ask nobody: estimate requests, tokens and cost of endpoint judges."
    )


def check(config: JudgeConfig, where: str) -> list[Problem]:
    """Contradictions inside the block, templates that cannot work, keys that are not in the environment."""
    problems = []
    for i, source in enumerate(config.answers):
        if (source.run is None) == (source.path is None):
            problems.append(
                Problem(f"{where}.answers.{i}", "needs exactly one of `run` and `path`", "set one of them")
            )
        if source.run is not None and source.model is not None:
            problems.append(
                Problem(
                    f"{where}.answers.{i}.model",
                    "is for `path`; a run names its models",
                    "use `names` to rename",
                )
            )
    if config.models is not None:
        if len(set(config.models)) < 2:
            problems.append(Problem(f"{where}.models", "a comparison needs two models", "name another one"))
        repeated = sorted({name for name in config.models if config.models.count(name) > 1})
        if repeated:
            what = f"names {', '.join(repeated)} twice, so its comparisons would count twice"
            problems.append(Problem(f"{where}.models", what, "name every model once"))
        if config.baseline is not None and config.baseline not in config.models:
            known = ", ".join(config.models)
            problems.append(Problem(f"{where}.baseline", f"'{config.baseline}' is not in models ({known})"))
    for name, judge in config.judges.items():
        if isinstance(judge, EndpointJudge):
            problems += _check_endpoint(judge, f"{where}.judges.{name}", config.dry_run)
    return problems


def _check_endpoint(judge: EndpointJudge, where: str, dry_run: bool) -> list[Problem]:
    from eval.judging.templates import template_problems

    problems = check_endpoint(judge, where, key_needed=not dry_run)
    if judge.max_cost is not None and (judge.price_input is None or judge.price_output is None):
        problems.append(
            Problem(f"{where}.max_cost", "cannot be kept without prices", "set price_input and price_output")
        )
    if judge.template is not None:
        problems += template_problems(judge.template, judge.method, f"{where}.template")
    return problems
