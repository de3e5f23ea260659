"""The stages, by name: where their configuration and their code are. Nothing is imported until asked for.

A stage module has `run(config, context) -> dict` (summary metrics, JSON values), and may have
`check(config, where) -> list[Problem]`, which looks for mistakes that the configuration model cannot see,
before anything heavy happens. A training stage has `preflight(config, paths, run_dir) -> Findings` too, which
looks at data and models without loading weights (posttrain.preflight). A stage that makes a model from a
model has `outline(config, outlines) -> Findings`, for models of which only the architecture is known
(posttrain.offline).
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError


@dataclass(frozen=True)
class StageSpec:
    """One kind of stage. config, run, check, preflight, outline: "module:attribute". version: raise it when
    the same configuration would now give another result, so that finished runs are done again. keep: what of
    a run directory a rerun adds to instead of replacing it."""

    name: str
    config: str
    run: str
    check: str | None
    version: int
    help: str
    preflight: str | None = None
    outline: str | None = None
    keep: tuple[str, ...] = ()


def _spec(
    name: str,
    config: str,
    run: str,
    help: str,
    *,
    check: str | None = None,
    preflight: str | None = None,
    outline: str | None = None,
    version: int = 1,
    keep: tuple[str, ...] = (),
) -> StageSpec:
    return StageSpec(name, config, run, check, version, help, preflight, outline, keep)


_OUTLINE = "train.preflight.outline:check"

STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        _spec(
            "curate",
            "data_prep.config:CurateConfig",
            "data_prep.curate:run",
            "Turn sources into a data set.",
            check="data_prep.curate:check",
            version=3,
        ),
        _spec(
            "base",
            "train.base_config:BaseConfig",
            "train.base:run",
            "Pretrain a small base model.",
            preflight="train.preflight:check",
        ),
        _spec(
            "pretrain",
            "train.config:PretrainConfig",
            "train.pretrain:run",
            "Continue pretraining on plain text.",
            check="train.trainer_args:check",
            outline=_OUTLINE,
            preflight="train.preflight:check",
        ),
        _spec(
            "sft",
            "train.config:SftConfig",
            "train.sft:run",
            "Fine-tune on demonstrations.",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
            version=2,
        ),
        _spec(
            "reward",
            "train.config:RewardConfig",
            "train.reward_model:run",
            "Train a reward model on preference pairs.",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
            version=2,
        ),
        _spec(
            "dpo",
            "train.config:DpoConfig",
            "train.preference:run",
            "Optimise directly on preference pairs.",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "kto",
            "train.config:KtoConfig",
            "train.kto:run",
            "Optimise on answers labelled good or bad.",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "orpo",
            "train.config:OrpoConfig",
            "train.reference_free:run",
            "Optimise on preference pairs without a reference (ORPO).",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "cpo",
            "train.config:CpoConfig",
            "train.reference_free:run",
            "Optimise on preference pairs without a reference (CPO, SimPO).",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "grpo",
            "train.online_config:GrpoConfig",
            "train.online:run",
            "Optimise rewards over groups of answers (GRPO).",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "rloo",
            "train.online_config:RlooConfig",
            "train.online:run",
            "Optimise rewards over groups of answers (RLOO).",
            check="train.trainer_args:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
        ),
        _spec(
            "ppo",
            "train.ppo.config:PpoStageConfig",
            "train.ppo.stage:run",
            "Optimise a reward model with PPO.",
            check="train.ppo.config:check",
            preflight="train.preflight:check",
            outline=_OUTLINE,
            version=3,
        ),
        _spec(
            "synthesize",
            "train.synthesis.config:SynthesizeConfig",
            "train.synthesis.stage:run",
            "Sample, score and select answers: pairs or demonstrations.",
            check="train.synthesis.config:check",
            preflight="train.preflight:check",
        ),
        _spec(
            "eval",
            "eval.config:EvalConfig",
            "eval.stage:run",
            "Measure models side by side.",
            check="eval.config:check",
            version=4,
        ),
        _spec(
            "judge",
            "eval.judging.config:JudgeConfig",
            "eval.judging.stage:run",
            "Compare answers pairwise, by a rubric, a reward model, a language model or people's votes.",
            check="eval.judging.config:check",
        ),
        _spec(
            "benchmark",
            "eval.tasks.config:BenchmarkConfig",
            "eval.tasks.stage:run",
            "Score models, endpoints or given answers on tasks, such as GSM8K and IFEval.",
            check="eval.tasks.config:check",
        ),
        _spec(
            "merge",
            "train.merge_config:MergeConfig",
            "train.merge:run",
            "Merge adapters into full weights.",
            version=2,
            outline=_OUTLINE,
        ),
        _spec(
            "export",
            "serving.config:ExportConfig",
            "serving.export:run",
            "Write a Triton model repository.",
            check="serving.config:check_export",
            version=4,
            keep=("model_repository", "export.json"),
        ),
        _spec(
            "serve",
            "serving.config:ServeConfig",
            "serving.stage:run",
            "Serve it and check parity.",
            check="serving.config:check_serve",
            version=2,
        ),
    )
}


def stage_spec(kind: str) -> StageSpec:
    """The stage called `kind`. Raises UserError naming the nearest one when there is none."""
    if kind in STAGES:
        return STAGES[kind]
    raise UserError(unknown_stage(kind))


def unknown_stage(kind: str) -> str:
    """The message for a stage kind that does not exist."""
    close = difflib.get_close_matches(kind, STAGES, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"stages are {', '.join(STAGES)}"
    return f"unknown stage '{kind}'; {hint}"


def load(target: str) -> Any:
    """The object named "package.module:attribute"."""
    module, _, attribute = target.partition(":")
    return vars(importlib.import_module(module))[attribute]
