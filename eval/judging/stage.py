"""The `judge` stage: answers of two or more models to the same prompts, compared pairwise by any judges.

    posttrain judge my-judge.yaml dry_run=true     # what would it cost?
    posttrain judge my-judge.yaml

Writes judge.json (win rates, tables, the judges' biases, agreement, costs) and judgements.jsonl (every
comparison). Replies of endpoints are kept in .replies.sqlite of the run directory as they come, so the same
command resumes after any kind of end and asks nothing twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from eval.judging.asking import Account, Asked, Asker
from eval.judging.config import EndpointJudge, GoldJudge, JudgeConfig, RewardJudge, VotesJudge
from eval.judging.contest import Contest, Match, matches
from eval.judging.pairwise import Judgement, LanguageModelJudge, estimate
from eval.judging.replies import ReplyStore
from eval.judging.results import How, agreement, compared, judge_report
from posttrain.errors import DataError, RequeueError, UserError
from posttrain.rundir import atomic_write_json, atomic_write_text
from posttrain.stage import StageContext

SCHEMA_VERSION = 1
REPLIES = ".replies.sqlite"


def run(config: JudgeConfig, context: StageContext) -> dict[str, Any]:
    """Judge everything the configuration names; returns the headline numbers, flat, for the manifest."""
    contest = _contest(config, context)
    models = _models(config, contest)
    baseline = config.baseline or models[0]
    pairs = _pairs(models, baseline, config.pairs)
    found, missing = matches(contest, pairs, config.num_prompts, config.seed)
    if config.dry_run:
        return _estimate(config, context, found)

    how = How(config.confidence, config.bootstrap_samples, config.seed, config.margin, config.power)
    by_judge: dict[str, Sequence[Judgement]] = {}
    extras: dict[str, dict[str, Any]] = {}
    stops = []
    for name, judge in config.judges.items():
        with context.phase(f"judge.{name}"):
            if isinstance(judge, EndpointJudge):
                by_judge[name], asked = _endpoint(config, context, name, judge, found)
                extras[name] = _asked_report(judge, asked)
                stops += _why_incomplete(config, name, judge, asked, by_judge[name])
            else:
                by_judge[name], extras[name] = _local(context, name, judge, found)
    results = {
        "schema_version": SCHEMA_VERSION,
        "complete": not stops,
        "models": models,
        "baseline": baseline,
        "confidence": config.confidence,
        "compared": compared(missing, found),
        "judges": {
            name: {"kind": config.judges[name].kind} | extras[name] | judge_report(some, how, baseline)
            for name, some in by_judge.items()
        },
        "agreement": agreement(by_judge, how),
    }
    atomic_write_json(context.run_dir / "judge.json", results)
    rows = [judgement.as_row(name) for name, some in by_judge.items() for judgement in some]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(context.run_dir / "judgements.jsonl", lines)
    _show(context, results)
    for stop in stops:
        raise stop
    return _summary(results)


def _contest(config: JudgeConfig, context: StageContext) -> Contest:
    contest = Contest()
    if config.questions is not None:
        contest.add_questions(context.path("questions"))
    if config.references is not None:
        contest.add_references(context.path("references"))
    for i, source in enumerate(config.answers):
        if source.run is not None:
            path = context.path(f"answers.{i}.run") / "samples.jsonl"
            if not path.is_file():
                raise DataError(
                    f"{source.run}: holds no samples.jsonl; name a run of the eval stage with prompts"
                )
        else:
            path = context.path(f"answers.{i}.path")
        contest.add_answers(path, source.model, source.names)
    return contest


def _models(config: JudgeConfig, contest: Contest) -> list[str]:
    known = contest.models
    models = config.models or known
    for name in [*models, *([config.baseline] if config.baseline else [])]:
        if name not in known:
            raise DataError(
                f"no answers of '{name}' in `answers`; models there: {', '.join(known) or 'none'}"
            )
    if len(models) < 2:
        raise DataError(f"a comparison needs two models; `answers` has {', '.join(models) or 'none'}")
    return models


def _pairs(models: Sequence[str], baseline: str, which: str) -> list[tuple[str, str]]:
    """(challenger, baseline), or every two models with the baseline second."""
    others = [name for name in models if name != baseline]
    against = [(name, baseline) for name in others]
    return against if which == "baseline" else against + list(combinations(others, 2))


def _store(config: JudgeConfig, context: StageContext) -> ReplyStore:
    return ReplyStore(Path(config.cache).expanduser() if config.cache else context.run_dir / REPLIES)


def _endpoint(
    config: JudgeConfig, context: StageContext, name: str, judge: EndpointJudge, found: Sequence[Match]
) -> tuple[list[Judgement], Asked]:
    key = os.environ.get(judge.key_env) if judge.key_env else None
    with _store(config, context) as store:
        asker = Asker(judge, key, store)
        judging = LanguageModelJudge(judge, asker)
        requests = judging.requests(found)
        with context.progress(f"{name} verdicts", len(requests.messages)) as bar:

            def advance(account: Account) -> None:
                cost = account.cost(judge)
                tokens = account.prompt_tokens + account.completion_tokens
                bar.advance()
                bar.update(f"{tokens:,} tokens" if cost is None else f"{tokens:,} tokens, cost {cost:.4f}")

            return judging.judge(found, requests, advance)


def _local(
    context: StageContext, name: str, judge: GoldJudge | RewardJudge | VotesJudge, found: Sequence[Match]
) -> tuple[list[Judgement], dict[str, Any]]:
    """The judgements of a judge that costs nothing, and what it has to say about itself."""
    from eval.judging.scored import by_reward_model, by_rubric, distinct_answers
    from eval.judging.votes import by_votes

    if isinstance(judge, GoldJudge):
        return by_rubric(judge, found), {"rubric": judge.rubric}
    if isinstance(judge, VotesJudge):
        judgements, votes = by_votes(context.path(f"judges.{name}.path"), found)
        return judgements, {"votes": votes}
    with context.progress(f"{name} scores", distinct_answers(found)) as bar:
        path = context.path(f"judges.{name}.model")
        judgements, cut = by_reward_model(judge, path, found, bar.advance)
    return judgements, {"cut": cut}


def _asked_report(judge: EndpointJudge, asked: Asked) -> dict[str, Any]:
    """What an endpoint was asked and what that cost. The address and the key are not part of it."""
    account = asked.account
    return {
        "model": judge.model,
        "method": judge.method,
        "account": {**asdict(account), "cost": account.cost(judge), "retries": asked.retries},
        "stopped": asked.stopped,
        "left": asked.left,
    }


def _why_incomplete(
    config: JudgeConfig, name: str, judge: EndpointJudge, asked: Asked, judgements: Sequence[Judgement]
) -> list[UserError | RequeueError]:
    """The error to end with when verdicts are missing that another attempt may get."""
    total = len(asked.said)
    done = f"{total - asked.left:,} of {total:,} verdicts of {name}"
    if asked.stopped == "budget":
        spent = asked.account.cost(judge) or 0.0
        return [
            UserError(
                f"judges.{name}.max_cost: {judge.max_cost:g} does not pay for the rest; {done} cost "
                f"{spent:.4f}\n"
                "    what is judged is kept: raise max_cost or lower num_prompts, and run it again"
            )
        ]
    if asked.stopped == "sigterm":
        return [RequeueError(done)]
    failed = asked.left / max(total, 1)
    if asked.stopped == "down" or failed > config.max_failed:
        details = [judgement.detail for judgement in judgements if judgement.status == "failed"]
        reason = next((detail for detail in details if detail not in ("", "not asked")), "no reply")
        return [RequeueError(done, f"because the endpoint did not answer the others ({reason})")]
    return []


def _estimate(config: JudgeConfig, context: StageContext, found: Sequence[Match]) -> dict[str, Any]:
    """Write estimate.json and say it."""
    estimates: dict[str, Any] = {}
    with _store(config, context) as store:
        for name, judge in config.judges.items():
            if isinstance(judge, EndpointJudge):
                asker = Asker(judge, None, store)
                estimates[name] = estimate(LanguageModelJudge(judge, asker).requests(found), asker)
    for name, row in estimates.items():
        cost = (
            "no prices"
            if row["cost"] is None
            else f"about {row['cost']:.4f}, at most {row['cost_at_most']:.4f}"
        )
        context.console.print(
            f"{name}: {row['requests']:,} requests ({row['cached']:,} more are cached), about "
            f"{row['prompt_tokens']:,} prompt and {row['completion_tokens']:,} reply tokens, cost: {cost}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    atomic_write_json(context.run_dir / "estimate.json", {"comparisons": len(found), "judges": estimates})
    flat = {f"requests/{name}": row["requests"] for name, row in estimates.items()}
    return (
        flat | {f"cost/{name}": row["cost"] for name, row in estimates.items()} | {"comparisons": len(found)}
    )


def _show(context: StageContext, results: dict[str, Any]) -> None:
    from eval.judging.show import print_results

    print_results(results, context.console)


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """Flat: win_rate/JUDGE/FIRST, consistency/JUDGE, cost/JUDGE, kappa/A/B."""
    flat: dict[str, Any] = {"comparisons": results["compared"]["matches"]}
    for name, judge in results["judges"].items():
        for pair in judge["pairs"]:
            if pair["win_rate"] is not None:
                versus = "" if pair["second"] == results["baseline"] else f"/{pair['second']}"
                flat[f"win_rate/{name}/{pair['first']}{versus}"] = pair["win_rate"]["value"]
        if judge["position"] is not None:
            flat[f"consistency/{name}"] = judge["position"]["consistency"]["value"]
        if "account" in judge:
            flat[f"cost/{name}"] = judge["account"]["cost"]
            flat[f"without_outcome/{name}"] = sum(judge["without_outcome"].values())
    for row in results["agreement"]:
        if row["kappa"] is not None:
            flat[f"kappa/{'/'.join(row['judges'])}"] = row["kappa"]["value"]
    return flat
