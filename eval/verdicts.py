"""The bars a run is held against: each a number, a bound, and whether it was met. Pure functions."""

from __future__ import annotations

from typing import Any

from eval.config import EvalConfig

JUDGE_NAMES = {"gold": "gold score", "rm": "reward-model score"}


def _verdict(
    bar: str, model: str | None, what: str, value: float, bound: float, passed: bool
) -> dict[str, Any]:
    return {"bar": bar, "model": model, "what": what, "value": value, "bound": bound, "passed": bool(passed)}


def verdicts(config: EvalConfig, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every configured bar against `results` (the content of eval.json), in the order a reader asks."""
    found = []
    reward = results["reward_model"]
    if config.min_rm_accuracy is not None and reward is not None:
        against = "gold" if reward["gold"] is not None else "labels"
        value = reward[against]["accuracy"]["value"]
        found.append(
            _verdict(
                "min_rm_accuracy",
                None,
                f"reward-model accuracy against {'noiseless gold' if against == 'gold' else 'the labels'}",
                value,
                config.min_rm_accuracy,
                value >= config.min_rm_accuracy,
            )
        )
    for name in config.challengers:
        found += _of_challenger(
            config, name, results["models"][name], results["models"][config.baseline_name]
        )
    return found


def _of_challenger(
    config: EvalConfig, name: str, mine: dict[str, Any], baseline: dict[str, Any]
) -> list[dict[str, Any]]:
    found = []
    judge = next((judge for judge in JUDGE_NAMES if judge in mine), None)
    if config.require_gain and judge is not None:
        what = f"lower end of the {JUDGE_NAMES[judge]} interval, against the upper end of the baseline's"
        low, bound = mine[judge]["low"], baseline[judge]["high"]
        found.append(_verdict("require_gain", name, what, low, bound, low > bound))
    if config.min_win_rate is not None and judge is not None:
        value = mine[f"{judge}_win_rate"]["value"]
        what = f"win rate against {config.baseline_name} by {JUDGE_NAMES[judge]}"
        found.append(
            _verdict("min_win_rate", name, what, value, config.min_win_rate, value >= config.min_win_rate)
        )
    target = config.kl_target.get(name) if isinstance(config.kl_target, dict) else config.kl_target
    if target is not None and "kl_k1" in mine:
        value = mine["kl_k1"]["value"]
        what = "KL to the reference in nats per answer"
        found.append(_verdict("kl_target", name, what, value, target, value < target))
    return found
