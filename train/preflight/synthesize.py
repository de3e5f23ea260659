"""The synthesize stage: a policy, prompts that fit it, and what scores its answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.errors import DataError
from posttrain.preflight import Findings
from train.launch import launch_problems, world_size
from train.preflight.models import read_config
from train.preflight.ppo import (
    check_policy_length,
    check_reward,
    check_tokens,
    is_reward_model,
    read_prompts,
)
from train.synthesis.config import SynthesizeConfig, prompt_problem
from train.synthesis.stage import reuse


def check_synthesize(config: SynthesizeConfig, paths: Mapping[str, Path]) -> Findings:
    """Everything about a synthesize stage."""
    findings = Findings()
    findings.problems += launch_problems("")
    if not findings.problems and world_size() > 1:
        findings.fail(
            "",
            f"synthesize runs on one process, not on {world_size()}",
            "start it without torchrun",
            here=True,
        )
    if "answers" in paths:
        _check_answers(paths["answers"], findings)
    if config.judge is not None and "judge.prompt" in paths:
        problem = prompt_problem(paths["judge.prompt"], config.judge.mode)
        if problem:
            findings.fail("judge.prompt", problem, "add it to the file")
    samples = read_prompts(config, paths["data"], True, findings) if "data" in paths else []
    for field in config.rewards.fields_beside(config.reward):
        if field in paths:
            check_reward(config, field, paths, samples, findings)
    if config.model is None or "model" not in paths:
        return findings
    model = read_config(paths["model"], "model", findings)
    if model is not None and not is_reward_model(config.model, paths["model"], model, findings):
        check_policy_length(config, model, findings)
    check_tokens(config, paths["model"], samples, findings)
    return findings


def _check_answers(path: Path, findings: Findings) -> None:
    """Another run's answers are there, and say where they are from."""
    try:
        reuse(path)
    except DataError as error:
        findings.fail_with("answers", error)
