"""The `eval` stage: what the trained models do on prompts, pairs and text they never saw.

Every policy answers the same held-out prompts with the same random numbers. The answers are scored by the
gold rubric (where the data have one) and by the reward model, on the very tokens the policy produced; KL to
the reference is measured on each policy's own samples. The reward model is examined on held-out pairs, and
perplexity is taken on held-out text and conversations. One model is in memory at a time.

    posttrain run configs/tiny/pipeline.yaml --only eval

Writes eval.json (every number, with its interval and the bars) and samples.jsonl (every answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.records import Kind
from eval.batching import length_sorted_batches, pad_rows
from eval.config import EvalConfig
from eval.cross_validation import cross_validation
from eval.generation import generate
from eval.held_out import Prompt, gold_scorer, load_pairs, load_prompts, load_scored_rows
from eval.kl import response_logprobs, sequence_kl
from eval.perplexity import perplexity
from eval.policy_report import Answers
from eval.results import build_results, samples_text, summary
from eval.rm_report import PairScores, Settings, out_of_distribution_report, reward_report
from posttrain.errors import UserError
from posttrain.inputs import check_same_tokenizer
from posttrain.models import load_causal_lm, load_reward_model, load_tokenizer, score_ids
from posttrain.rundir import atomic_write_json, atomic_write_text
from posttrain.stage import StageContext

PERPLEXITY_FIELDS: tuple[tuple[str, Kind], ...] = (("text", "text"), ("conversations", "conversation"))


def run(config: EvalConfig, context: StageContext) -> dict[str, Any]:
    """Evaluate everything the configuration names; returns the headline numbers, flat, for the manifest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(_shared_tokenizer(context))

    prompts, prompt_counts = _prompts(config, context, tokenizer)
    answers: dict[str, Answers] = {}
    policy_logprobs: dict[str, list[torch.Tensor]] = {}
    for name in config.models:
        with context.phase(f"load.{name}"):
            model = _policy(config, context, f"models.{name}", device)
            require_room(name, model, prompts, config.max_new_tokens)
        answers[name] = Answers(_generate(config, context, name, model, tokenizer, prompts))
        with context.phase(f"logprobs.{name}"):
            policy_logprobs[name] = _logprobs(config, model, tokenizer, answers[name])
        with context.phase(f"perplexity.{name}"):
            answers[name].perplexity = _perplexity(config, context, model, tokenizer)
        del model

    if prompts:
        with context.phase("kl"):
            _add_kl(config, context, tokenizer, answers, policy_logprobs, device)
    if prompts and config.gold is not None:
        _add_gold(config.gold, prompts, answers)
    reward = None
    if config.reward is not None:
        with context.phase("reward"):
            reward = _reward(config, context, tokenizer, answers, device)

    keys = [prompt.key for prompt in prompts]
    results = build_results(config, answers, keys, prompt_counts, reward)
    atomic_write_json(context.run_dir / "eval.json", results)
    atomic_write_text(context.run_dir / "samples.jsonl", samples_text(prompts, answers))
    return summary(results)


def _shared_tokenizer(context: StageContext) -> Path:
    """Directory of the one tokenizer all models share; UserError where they do not."""
    paths = {field: context.path(field) for field, found in context.inputs.items() if found.kind == "model"}
    check_same_tokenizer({field: replace(context.inputs[field], path=path) for field, path in paths.items()})
    return next(iter(paths.values()))


def _policy(config: EvalConfig, context: StageContext, field: str, device: torch.device) -> Any:
    model: Any = load_causal_lm(context.path(field), config.dtype)
    return model.to(device)


def context_length(model: Any) -> int | None:
    """Positions the model was made for, None where its configuration does not say."""
    return model.config.to_dict().get("max_position_embeddings")


def require_room(name: str, model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raise UserError when the longest prompt and its answer do not fit the model's context."""
    limit = context_length(model)
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"models.{name} reads at most {limit} tokens, but the longest prompt has {longest} and "
            f"max_new_tokens is {max_new_tokens}; set max_prompt_tokens to {max(limit - max_new_tokens, 8)} "
            "to skip longer prompts, or lower max_new_tokens"
        )


def _prompts(
    config: EvalConfig, context: StageContext, tokenizer: Any
) -> tuple[list[Prompt], dict[str, int]]:
    if config.prompts is None or not config.models:
        return [], {"available": 0, "too_long": 0, "used": 0}
    return load_prompts(
        context.path("prompts"),
        tokenizer,
        wanted=config.num_prompts,
        max_tokens=config.max_prompt_tokens,
        needs_facts=config.gold is not None,
        seed=config.seed,
    )


def _generate(
    config: EvalConfig,
    context: StageContext,
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
) -> list[Any]:
    if not prompts:
        return []
    with context.phase(f"generate.{name}"), context.progress(f"{name} answers", len(prompts)) as bar:
        return generate(
            model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            batch_size=config.batch_size,
            seed=config.seed,
            on_batch=bar.advance,
        )


def _logprobs(config: EvalConfig, model: Any, tokenizer: Any, mine: Answers) -> list[torch.Tensor]:
    return response_logprobs(
        model,
        mine.generations,
        pad_id=tokenizer.pad_token_id,
        temperature=config.temperature or 1.0,
        batch_size=config.batch_size,
    )


def _perplexity(
    config: EvalConfig, context: StageContext, model: Any, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    found = {}
    for field, kind in PERPLEXITY_FIELDS:
        if field in context.inputs:
            rows = load_scored_rows(
                context.path(field),
                kind,
                tokenizer,
                wanted=config.num_perplexity_rows,
                max_tokens=min(config.max_tokens, context_length(model) or config.max_tokens),
                seed=config.seed,
            )
            scored = perplexity(model, rows, pad_id=tokenizer.pad_token_id, batch_size=config.batch_size)
            found[field] = scored.as_dict()
    return found


def _add_kl(
    config: EvalConfig,
    context: StageContext,
    tokenizer: Any,
    answers: dict[str, Answers],
    policy_logprobs: dict[str, list[torch.Tensor]],
    device: torch.device,
) -> None:
    field = "reference" if config.reference is not None else f"models.{config.baseline_name}"
    reference = _policy(config, context, field, device)
    for name, mine in answers.items():
        kl = sequence_kl(policy_logprobs[name], _logprobs(config, reference, tokenizer, mine))
        mine.kl = {estimator: np.array(values) for estimator, values in kl.items()}


def _add_gold(rubric: str, prompts: Sequence[Prompt], answers: dict[str, Answers]) -> None:
    score = gold_scorer(rubric)
    for mine in answers.values():
        scored = [
            score(answer.text, prompt.facts, answer.finished)
            for prompt, answer in zip(prompts, mine.generations, strict=True)
        ]
        mine.gold = np.array([one.total for one in scored])
        mine.gold_parts = {part: np.array([one.parts[part] for one in scored]) for part in scored[0].parts}


def _reward(
    config: EvalConfig,
    context: StageContext,
    tokenizer: Any,
    answers: dict[str, Answers],
    device: torch.device,
) -> dict[str, Any] | None:
    """Scores every answer in place, and returns the report on held-out pairs (None without pairs)."""
    loaded, calibration = load_reward_model(context.path("reward"))
    model: Any = loaded
    model.to(device)

    @torch.no_grad()
    def scores_of(rows: Sequence[list[int]]) -> np.ndarray:
        scores = np.empty(len(rows))
        for batch in length_sorted_batches([len(row) for row in rows], config.batch_size):
            ids_BT, mask_BT = pad_rows([rows[i] for i in batch], tokenizer.pad_token_id, "right", device)
            scores[batch] = score_ids(model, calibration, ids_BT, mask_BT).float().cpu().numpy()
        return scores

    for mine in answers.values():
        if mine.generations:
            mine.rm = scores_of([answer.prompt_ids + answer.ids for answer in mine.generations])
    if config.preferences is None:
        return None
    longest = min(config.max_tokens, context_length(model) or config.max_tokens)
    settings = Settings(
        config.confidence,
        config.bootstrap_samples,
        config.seed,
        config.reliability_bins,
        config.tie_tolerance,
        config.text_baselines,
    )

    def scored_pairs(field: str, subset_column: str | None) -> tuple[PairScores, int]:
        pairs = load_pairs(context.path(field), tokenizer, longest, subset_column)
        with context.progress(f"reward model on {field}", 2 * len(pairs.chosen_ids)) as bar:
            both = []
            for rows in (pairs.chosen_ids, pairs.rejected_ids):
                both.append(scores_of(rows))
                bar.advance(len(rows))
        scored = PairScores(
            both[0],
            both[1],
            pairs.chosen_text,
            pairs.rejected_text,
            pairs.prompts,
            pairs.groups,
            pairs.gold_chosen,
            pairs.gold_rejected,
            pairs.subsets,
        )
        return scored, pairs.cut

    scored, cut = scored_pairs("preferences", config.subset_column)
    report = reward_report(scored, settings) | {"pairs_cut": cut, "out_of_distribution": None}
    report["cross_validation"] = cross_validation(
        context.path("reward").parent, context.path("preferences"), settings
    )
    if config.ood_preferences is not None:
        away, cut = scored_pairs("ood_preferences", None)
        found = out_of_distribution_report(away, report, settings)
        report["out_of_distribution"] = found | {"pairs_cut": cut}
    return report
