"""What the eval stage writes down: eval.json, samples.jsonl, and the summary in the manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eval.config import EvalConfig
from eval.held_out import Prompt
from eval.policy_report import Answers, Comparison, over_optimisation, policy_report
from eval.verdicts import verdicts

SCHEMA_VERSION = 1


def build_results(
    config: EvalConfig,
    answers: dict[str, Answers],
    keys: Sequence[str],
    prompt_counts: dict[str, int],
    reward: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of eval.json, bars included. `keys` identifies the prompt of each answer."""
    comparison = Comparison(
        config.baseline_name if config.models else "",
        keys,
        config.tie_tolerance,
        config.confidence,
        config.bootstrap_samples,
        config.seed,
    )
    models = policy_report(answers, comparison)
    results = {
        "schema_version": SCHEMA_VERSION,
        "baseline": comparison.baseline or None,
        "reference": "reference" if config.reference is not None else comparison.baseline or None,
        "confidence": config.confidence,
        "generation": {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
        },
        "models": models,
        "reward_model": reward,
        "over_optimisation": over_optimisation(answers, models),
        "prompts": prompt_counts,
    }
    return results | {"verdicts": verdicts(config, results)}


def samples_text(prompts: Sequence[Prompt], answers: dict[str, Answers]) -> str:
    """samples.jsonl: one line per prompt, the answers of every model with their scores."""
    lines = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {
            "id": prompt.id,
            "source": prompt.source,
            "meta": prompt.meta,
            "prompt": prompt.messages,
            "answers": {},
        }
        for name, mine in answers.items():
            answer = mine.generations[i]
            row["answers"][name] = {
                "text": answer.text,
                "finished": answer.finished,
                "tokens": len(answer.ids),
                **{judge: float(scores[i]) for judge, scores in mine.judges.items()},
                "gold_parts": {part: float(values[i]) for part, values in mine.gold_parts.items()},
                "kl_k1": float(mine.kl["k1"][i]),
            }
        lines.append(json.dumps(row, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The headline of eval.json under flat names: gold/sft, gold_win_rate/ppo, kl/ppo, rm_accuracy/gold."""
    flat: dict[str, Any] = {}
    for name, model in results["models"].items():
        for key, label in (("gold", "gold"), ("rm", "rm"), ("kl_k1", "kl"), ("eos_rate", "eos_rate")):
            if key in model:
                flat[f"{label}/{name}"] = model[key]["value"]
        for judge in ("gold", "rm"):
            if f"{judge}_win_rate" in model:
                flat[f"{judge}_win_rate/{name}"] = model[f"{judge}_win_rate"]["value"]
        for data, numbers in model["perplexity"].items():
            flat[f"perplexity_{data}/{name}"] = numbers["perplexity"]
    if results["reward_model"] is not None:
        flat["rm_accuracy/labels"] = results["reward_model"]["labels"]["accuracy"]["value"]
        if results["reward_model"]["gold"] is not None:
            flat["rm_accuracy/gold"] = results["reward_model"]["gold"]["accuracy"]["value"]
    flat["bars_passed"] = sum(verdict["passed"] for verdict in results["verdicts"])
    flat["bars"] = len(results["verdicts"])
    return flat
