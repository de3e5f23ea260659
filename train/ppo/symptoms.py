"""What a PPO run that goes wrong looks like in its metrics, and what to say about it (torch-free).

A symptom looks at the rows so far and returns a message, or None: what is seen with its numbers, what it
usually means, and which key of the YAML file to change. `train.ppo.watch` decides when to show it. A symptom
whose metrics are missing from the rows is never there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from train.ppo.history import History


def entropy_collapse(history: History) -> str | None:
    start, now = history.start("entropy"), history.recent("entropy")
    if start is None or now is None or now >= history.thresholds.entropy_share * start:
        return None
    return (
        f"entropy is {now:.3g} nats per token, {now / start:.0%} of the {start:.3g} at the start. The "
        "policy is collapsing onto few answers and stops exploring. Raise `kl_coef`, lower `learning_rate` "
        "or `num_ppo_epochs`"
    )


def repeated_responses(history: History) -> str | None:
    start, now = history.start("distinct_responses"), history.recent("distinct_responses")
    if start is None or now is None or now >= history.thresholds.distinct_share * start:
        return None
    return (
        f"{now:.0%} of the responses of a rollout are distinct, {start:.0%} at the start. The policy gives "
        "many prompts the same answer, which usually means that the reward pays for it. Read "
        "samples.jsonl; raise `kl_coef`, lower `learning_rate`"
    )


def length_hacking(history: History) -> str | None:
    limits = history.thresholds
    length_then, length = history.start("response_length"), history.recent("response_length")
    score_then, score, std = history.start("score"), history.recent("score"), history.start("score_std")
    if length_then is None or length is None or score_then is None or score is None or std is None:
        return None
    grown = length > limits.length_growth * length_then
    if not grown or score - score_then <= limits.score_growth_stds * std:
        return None
    return (
        f"responses have {length:.0f} tokens, {length / length_then:.1f} times the {length_then:.0f} at the "
        f"start, while the score rose from {score_then:.3g} to {score:.3g}. Often the reward pays for "
        "length, not for quality. Compare answers of equal length in samples.jsonl; raise `kl_coef`, lower "
        "`max_new_tokens`, or train `reward` on pairs in which longer is not always better"
    )


def length_at_limit(history: History) -> str | None:
    limits = history.thresholds
    length, ended = history.recent("response_length"), history.recent("eos_rate")
    if length is None or ended is None or not limits.eos_missing <= ended < limits.eos_enough:
        return None
    if length < limits.length_limit_share * history.max_new_tokens:
        return None
    return (
        f"responses have {length:.0f} tokens on average, the limit is {history.max_new_tokens}, and only "
        f"{ended:.0%} end by themselves. Most are cut off before they end. Raise `max_new_tokens` when the "
        "answers need it, else keep `missing_eos.mode` at replace with a lower `missing_eos.value`"
    )


def eos_falling(history: History) -> str | None:
    limits = history.thresholds
    start, now = history.start("eos_rate"), history.recent("eos_rate")
    if start is None or now is None or now < limits.eos_missing or start - now <= limits.eos_drop:
        return None
    return (
        f"{now:.0%} of the responses end by themselves, {start:.0%} at the start. The policy is unlearning "
        "to stop. Lower `missing_eos.value`, keep `missing_eos.mode` at replace, or raise `max_new_tokens`"
    )


def missing_eos(history: History) -> str | None:
    now = history.last("eos_rate")
    if now is None or now >= history.thresholds.eos_missing:
        return None
    return (
        f"{now:.0%} of the responses end within {history.max_new_tokens} tokens. Nearly all scores are "
        "those of a missing end token, so there is little to learn from. Raise `max_new_tokens`; when the "
        "samples ramble on, `model` was not trained to end its turn: see the end tokens in its training "
        "data"
    )


def kl_above_target(history: History) -> str | None:
    now, target = history.last("kl"), history.kl_target
    if now is None or target is None or now <= history.thresholds.kl_over_target * target:
        return None
    coefficient = history.last("kl_coef")
    at = "" if coefficient is None else f" (now {coefficient:.3g})"
    return (
        f"KL to the reference is {now:.3g} nats per response, {now / target:.1f} times the target "
        f"{target:.3g}. The penalty does not hold the policy. Raise `kl_coef`{at}, lower `learning_rate`; "
        "with `kl_controller.type` adaptive a smaller `kl_controller.horizon` lets it react faster"
    )


def kl_unbounded(history: History) -> str | None:
    limits = history.thresholds
    now, before, length = history.recent("kl"), history.before("kl"), history.recent("response_length")
    if history.kl_target is not None or now is None or before is None or not length:
        return None
    if now / length <= limits.kl_per_token or now <= limits.kl_growth * before:
        return None
    return (
        f"KL to the reference is {now:.3g} nats per response, {now / length:.2g} per token, and still "
        f"growing (from {before:.3g} in the updates before). Nothing bounds it, and the reward is less to "
        "be trusted the further the policy goes. Set `kl_controller.target` with `kl_controller.type` "
        "adaptive, raise `kl_coef` or lower `learning_rate`"
    )


def value_not_fitting(history: History) -> str | None:
    limits = history.thresholds
    now = history.recent("explained_variance")
    if len(history.rows) < limits.value_warmup_rows + limits.recent_rows or now is None:
        return None
    if now >= limits.explained_variance:
        return None
    return (
        f"explained variance of the value network is {now:.2f} over the last {limits.recent_rows} updates: "
        "a constant would predict the returns better. Advantages are then mostly noise. Raise "
        "`value_learning_rate`"
    )


def clip_fraction(history: History) -> str | None:
    now = history.last("clipfrac")
    if now is None or now <= history.thresholds.clip_fraction:
        return None
    return (
        f"{now:.0%} of the tokens are clipped. The passes over a rollout go far from the policy that "
        "sampled it, and the clipped tokens teach nothing. Lower `learning_rate` or `num_ppo_epochs`, or "
        "raise `batch_size`"
    )


def ratio_extreme(history: History) -> str | None:
    now = history.last("ratio_deviation")
    if now is None or now <= history.thresholds.ratio_deviation:
        return None
    return (
        f"the probability of a token changed by a factor of {1 + now:.3g} within one update. Single steps "
        "are too large; the run may break down. Lower `learning_rate`, `max_grad_norm` or `num_ppo_epochs`"
    )


def first_ratio(history: History) -> str | None:
    now = history.last("ratio_deviation_first")
    if now is None or now <= history.thresholds.first_ratio:
        return None
    return (
        f"before the first step of the update a probability ratio is already {now:.2g} away from 1, and it "
        "should be exactly 1. Scoring and update do not compute the same. Set `bf16` to false to rule out "
        "rounding; if it stays, it is a defect: please report it with config.yaml"
    )


def constant_rewards(history: History) -> str | None:
    std, score = history.last("score_std"), history.last("score")
    if std is None or score is None or std > history.thresholds.score_std * max(1.0, abs(score)):
        return None
    return (
        f"all responses of a rollout score the same ({score:.4g}, standard deviation {std:.2g}). Without a "
        "difference there is nothing to learn from. Check `reward` on samples.jsonl; a rule that nothing "
        "or everything meets needs other prompts in `data`, or a higher `temperature`"
    )


def rollout_gap(history: History) -> str | None:
    now = history.last("rollout_gap")
    if now is None or now <= history.thresholds.rollout_gap:
        return None
    return (
        f"log-probabilities of the sampled tokens differ by {now:.2g} nats on average between the sampling "
        "engine and the trainer. The responses come from another policy than the one being trained: "
        "weights that were not handed over, another `temperature`, or too coarse a precision. Set `bf16` "
        "to false to tell which"
    )


def over_optimisation(history: History) -> str | None:
    """Gao et al. 2022 (arXiv 2210.10760): proxy reward rises on while the gold reward has turned."""
    limits = history.thresholds
    width = limits.recent_rows
    both = [
        (row["reward/gold"], row["score"]) for row in history.rows if {"reward/gold", "score"} <= row.keys()
    ]
    if len(both) < 2 * width:
        return None
    means = [
        tuple(sum(column) / width for column in zip(*both[end - width : end], strict=True))
        for end in range(width, len(both) + 1)
    ]
    best_gold, best_score = max(means[:-width])
    gold, score = means[-1]
    steps = [after - before for (before, _), (after, _) in zip(both, both[1:], strict=False)]
    noise = math.sqrt(sum(step**2 for step in steps) / len(steps) / 2)
    error = noise * math.sqrt(2 / width)
    if best_gold - gold <= limits.gold_errors * error or score <= best_score:
        return None
    return (
        f"gold reward fell from {best_gold:.3g} to {gold:.3g} while the score rose from {best_score:.3g} to "
        f"{score:.3g}. The policy exploits the reward model instead of getting better. Use the checkpoint "
        "from before; raise `kl_coef`, lower `kl_controller.target` or `total_episodes`, or train a better "
        "`reward`"
    )


class Symptom(NamedTuple):
    """patience: updates in a row that show it before it is reported (1 where means are compared)."""

    test: Callable[[History], str | None]
    patience: int = 1


SYMPTOMS: dict[str, Symptom] = {
    "entropy_collapse": Symptom(entropy_collapse),
    "repeated_responses": Symptom(repeated_responses),
    "length_hacking": Symptom(length_hacking),
    "length_at_limit": Symptom(length_at_limit),
    "eos_falling": Symptom(eos_falling),
    "missing_eos": Symptom(missing_eos, patience=3),
    "kl_above_target": Symptom(kl_above_target, patience=5),
    "kl_unbounded": Symptom(kl_unbounded),
    "value_not_fitting": Symptom(value_not_fitting),
    "clip_fraction": Symptom(clip_fraction, patience=3),
    "ratio_extreme": Symptom(ratio_extreme, patience=3),
    "first_ratio": Symptom(first_ratio),
    "constant_rewards": Symptom(constant_rewards, patience=3),
    "rollout_gap": Symptom(rollout_gap, patience=2),
    "over_optimisation": Symptom(over_optimisation, patience=3),
}
"""By kind, in the order in which they are reported."""
