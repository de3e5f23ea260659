"""EvalConfig and its checks; both without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from eval.config import EvalConfig, check
from posttrain.config import find_references

GOOD = {
    "models": {"sft": "runs/t/sft", "ppo": "runs/t/ppo", "dpo": "runs/t/dpo"},
    "baseline": "sft",
    "reward": "runs/t/reward",
    "prompts": "runs/t/prompts",
    "preferences": "runs/t/prefs",
    "gold": "support_desk",
    "kl_target": 20.0,
    "min_rm_accuracy": 0.85,
    "min_win_rate": 0.65,
    "require_gain": True,
}


def problems(**changes: object) -> dict[str, str]:
    return {
        p.where: p.message for p in check(EvalConfig(**{**GOOD, **changes}), "pipeline.yaml: stages.eval")
    }


def test_a_good_block_has_no_problems_and_knows_its_inputs() -> None:
    config = EvalConfig(**GOOD)
    assert check(config, "x") == []
    assert config.challengers == ["ppo", "dpo"]
    fields = {reference.field: reference.kind for reference in find_references(config)}
    assert fields == {
        "models.sft": "model",
        "models.ppo": "model",
        "models.dpo": "model",
        "reward": "model",
        "prompts": "dataset",
        "preferences": "dataset",
    }


def test_the_first_model_is_the_default_baseline() -> None:
    assert EvalConfig(**{**GOOD, "baseline": None}).baseline_name == "sft"


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"baseline": "base"}, "baseline", "'base' is not in models (sft, ppo, dpo)"),
        ({"models": {}, "reward": None, "baseline": None}, "models", "nothing to evaluate"),
        ({"prompts": None}, "prompts", "no data to measure them on"),
        ({"reward": None}, "preferences", "needs a reward model"),
        ({"preferences": None}, "min_rm_accuracy", "never be measured"),
        ({"preferences": None, "ood_preferences": "runs/t/away"}, "ood_preferences", "needs preferences"),
        ({"preferences": None, "subset_column": "topic"}, "subset_column", "needs preferences"),
        ({"gold": None, "reward": None, "preferences": None}, "min_win_rate", "never be measured"),
        ({"models": {"sft": "runs/t/sft"}}, "require_gain", "never be measured"),
        ({"kl_target": {"pop": 3.0}}, "kl_target.pop", "not a name in models"),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], where: str, words: str) -> None:
    found = problems(**changes)
    assert words in found[f"pipeline.yaml: stages.eval.{where}"]


def test_all_problems_come_together() -> None:
    assert len(problems(baseline="base", kl_target={"pop": 1.0}, preferences=None)) == 3


@pytest.mark.parametrize(
    "bad", [{"kl_target": 0.0}, {"num_prompts": 1}, {"temperature": -1.0}, {"gold": "essay"}]
)
def test_impossible_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EvalConfig(**{**GOOD, **bad})


def test_importing_the_configuration_loads_no_torch() -> None:
    code = "import sys, eval.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
