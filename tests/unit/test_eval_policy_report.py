"""Comparison of policies, over-optimisation and the bars, on scores written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval.config import EvalConfig
from eval.generation import Generation
from eval.policy_report import Answers, Comparison, over_optimisation, policy_report, score_bins
from eval.verdicts import verdicts


def answers(gold: list[float], rm: list[float], kl: list[float], finished: bool = True) -> Answers:
    generations = [Generation([1], [5, 2], f"answer {i}", finished) for i in range(len(gold))]
    return Answers(
        generations, np.array(gold), {"polite": np.array(gold)}, np.array(rm), {"k1": np.array(kl)}
    )


def comparison(n: int) -> Comparison:
    return Comparison("sft", [f"p{i}" for i in range(n)], samples=500)


def test_numbers_of_each_policy() -> None:
    policies = {
        "sft": answers([0.2, 0.4, 0.6, 0.8], [0, 0, 0, 0], [0, 0, 0, 0]),
        "ppo": answers([0.9, 0.4, 0.5, 1.0], [1, 1, 1, 1], [2, 3, 4, 5], finished=False),
    }
    report = policy_report(policies, comparison(4))
    assert report["sft"]["gold"]["value"] == pytest.approx(0.5)
    assert "gold_win_rate" not in report["sft"]
    assert report["ppo"]["gold_win_rate"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert [report["ppo"]["gold_win_rate"][k] for k in ("wins", "ties", "losses")] == [2, 1, 1]
    assert report["ppo"]["gold_gain"]["value"] == pytest.approx(0.2)
    assert report["ppo"]["kl_k1"]["value"] == pytest.approx(3.5)
    assert report["ppo"]["eos_rate"]["value"] == 0.0
    assert report["ppo"]["tokens"]["value"] == 2.0
    assert report["ppo"]["distinct_answers"] == 1.0


@pytest.mark.parametrize(("gold", "hacked"), [(0.1, True), (0.9, False)])
def test_over_optimisation_is_reward_up_and_gold_down(gold: float, hacked: bool) -> None:
    n = 40
    rng = np.random.default_rng(0)
    policies = {
        "sft": answers(list(0.5 + 0.01 * rng.random(n)), list(rng.random(n)), [0.0] * n),
        "ppo": answers(list(gold + 0.01 * rng.random(n)), list(3 + rng.random(n)), [9.0] * n),
    }
    view = over_optimisation(policies, policy_report(policies, comparison(n)))
    assert view["ppo"]["over_optimised"] is hacked
    assert "over_optimised" not in view["sft"]


def test_score_bins_are_quantiles_of_the_reward() -> None:
    rows = score_bins(np.array([4.0, 1.0, 3.0, 2.0]), np.array([0.4, 0.1, 0.3, 0.2]), bins=2)
    assert [row["count"] for row in rows] == [2, 2]
    assert [row["rm"] for row in rows] == [1.5, 3.5]
    assert [row["gold"] for row in rows] == pytest.approx([0.15, 0.35])


def interval(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": 320}


def results(gold: float, rate: float, kl: float, rm: float) -> dict[str, Any]:
    return {
        "models": {
            "sft": {"gold": interval(0.6), "kl_k1": interval(0.0)},
            "ppo": {"gold": interval(gold), "gold_win_rate": interval(rate), "kl_k1": interval(kl)},
        },
        "reward_model": {"gold": {"accuracy": interval(rm)}, "labels": {"accuracy": interval(0.5)}},
    }


CONFIG = EvalConfig(
    models={"sft": "a", "ppo": "b"},
    reward="r",
    prompts="p",
    preferences="q",
    gold="support_desk",
    kl_target=10.0,
    min_rm_accuracy=0.85,
    min_win_rate=0.65,
    require_gain=True,
)


@pytest.mark.parametrize(
    ("numbers", "missed"),
    [
        ((0.9, 0.8, 5.0, 0.9), set()),
        ((0.63, 0.8, 5.0, 0.9), {"require_gain"}),  # 0.61 is below 0.62: the intervals overlap
        ((0.9, 0.64, 5.0, 0.9), {"min_win_rate"}),
        ((0.9, 0.8, 10.0, 0.9), {"kl_target"}),
        ((0.9, 0.8, 5.0, 0.84), {"min_rm_accuracy"}),
    ],
)
def test_each_bar_can_be_missed(numbers: tuple[float, float, float, float], missed: set[str]) -> None:
    found = verdicts(CONFIG, results(*numbers))
    assert {v["bar"] for v in found} == {"min_rm_accuracy", "require_gain", "min_win_rate", "kl_target"}
    assert {v["bar"] for v in found if not v["passed"]} == missed


def test_a_target_by_name_holds_for_that_model_only() -> None:
    config = CONFIG.model_copy(update={"kl_target": {"dpo": 1.0}})
    assert "kl_target" not in {v["bar"] for v in verdicts(config, results(0.9, 0.8, 5.0, 0.9))}


def test_no_bars_configured_no_verdicts() -> None:
    config = EvalConfig(models={"sft": "a", "ppo": "b"}, prompts="p", gold="support_desk")
    assert verdicts(config, results(0.9, 0.8, 5.0, 0.9)) == []
