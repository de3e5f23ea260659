"""A synthesize run in numbers, and the same as text for the card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.synthesis.best_of_n import expected_best, kl_bound, mean_interval, steps
from train.synthesis.selection import Answer, Answered, scored

ANSWERS_FILE = "answers.jsonl"
"""Every sampled answer with its score, prompt by prompt: what another run can select from."""


def statistics(prompts: Sequence[Answered], truncated: str) -> dict[str, Any]:
    """Of the answers before any selection: how many ended, lengths, scores, what was watched beside them."""
    answers = [answer for prompt in prompts for answer in prompt.answers]
    eligible = [
        [answer for answer in prompt.answers if answer.score is not None and _counts(answer, truncated)]
        for prompt in prompts
    ]
    flat = [answer for group in eligible for answer in group]
    watched = sorted({name for answer in flat for name in answer.parts if not name.endswith(".no_opinion")})
    return {
        "sampled": len(answers),
        "finished": sum(answer.finished for answer in answers),
        "mean_tokens": round(float(np.mean([answer.tokens for answer in answers])), 2),
        "scores": spread([scored(answer) for answer in flat]),
        "parts": {name: spread([answer.parts[name] for answer in flat]) for name in watched},
        "best_of_n": best_of_n_rows(eligible, watched),
    }


def best_of_n_rows(groups: Sequence[Sequence[Answer]], watched: Sequence[str]) -> list[dict[str, Any]]:
    """Per n = 1, 2, 4, ...: what the best of n scores, the bound on its KL, and the parts it then has.

    groups: the scored answers to each prompt. A prompt counts for every n that it has answers for.
    """
    rows = []
    for n in steps(max((len(group) for group in groups), default=1)):
        enough = [group for group in groups if len(group) >= n]
        if not enough:
            continue
        scores = [[scored(answer) for answer in group] for group in enough]
        mean, half = mean_interval([expected_best(one, n) for one in scores])
        parts = {
            name: mean_interval(
                [
                    expected_best(one, n, [answer.parts[name] for answer in group])
                    for one, group in zip(scores, enough, strict=True)
                ]
            )[0]
            for name in watched
        }
        rows.append(
            {
                "n": n,
                "kl_bound": kl_bound(n),
                "score": mean,
                "half_width_95": half,
                "prompts": len(enough),
                "parts": parts,
            }
        )
    return rows


def _counts(answer: Answer, truncated: str) -> bool:
    return (answer.finished or truncated == "mark") and bool(answer.text.split())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation and quantiles; None of nothing."""
    if not values:
        return None
    quantiles = dict(zip(("min", "p05", "p50", "p95", "max"), (0, 0.05, 0.5, 0.95, 1), strict=True))
    return {"mean": float(np.mean(values)), "std": float(np.std(values))} | {
        name: float(np.quantile(values, share)) for name, share in quantiles.items()
    }


def lineage_lines(synthesis: Mapping[str, Any]) -> list[str]:
    """The part of the card that says where the answers are from and what best-of-n did."""
    policy, sampling = synthesis["policy"], synthesis["sampling"]
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
    lines = [
        "",
        "## Synthesis",
        "",
        f"Every answer was sampled from the policy `{policy['name']}` (content hash "
        f"`{policy['content_hash'][:16]}`): "
        f"{settings}.",
        f"Scored by: `{json.dumps(synthesis['scorer'], ensure_ascii=False)}`.",
        "",
        f"{synthesis['sampled']:,} answers, {synthesis['finished']:,} of them finished. Left out: "
        + (", ".join(f"{n:,} {reason}" for reason, n in synthesis["answers_left_out"].items()) or "none")
        + f". Selection: `{json.dumps(synthesis['selection'])}`.",
        "",
        "Best of n by that score, estimated without bias from all answers; the KL to the sampled policy is "
        "at most "
        "log n - (n - 1) / n nats (Stiennon et al. 2020, Beirami et al. 2024):",
        "",
        "| n | KL at most | expected score | 95 % half width | prompts |",
        "|---:|---:|---:|---:|---:|",
    ]
    for at in synthesis["best_of_n"]:
        half = "" if at["half_width_95"] is None else f"{at['half_width_95']:.3f}"
        lines.append(f"| {at['n']} | {at['kl_bound']:.3f} | {at['score']:.3f} | {half} | {at['prompts']:,} |")
    return [*lines, "", f"Every answer with its score is in `{ANSWERS_FILE}`.", ""]
