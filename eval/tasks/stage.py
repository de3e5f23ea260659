"""The `benchmark` stage: targets on tasks, every score with its interval.

    posttrain benchmark my-benchmark.yaml

Writes benchmark.json (scores, counts, contamination) and items.jsonl (every answer with its scores). Answers
are kept in .answers.sqlite of the run directory as they come, so the same command resumes after any kind of
end and computes or asks nothing twice. One local model is in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from eval.compare.contamination import lineage
from eval.generators.answers import GivenAnswers
from eval.generators.base import Target
from eval.generators.config import AnswersTarget, ModelTarget
from eval.judging.replies import ReplyStore
from eval.tasks import config as tasks
from eval.tasks.base import How, Measured
from eval.tasks.config import BenchmarkConfig
from eval.tasks.language_model import LanguageModelling
from eval.tasks.multiple_choice import MultipleChoice
from eval.tasks.overlap import Overlap
from eval.tasks.safety import Safety
from eval.tasks.verifiable import ExactMatch, Gsm8k, Ifeval
from posttrain.context import ProgressTracker
from posttrain.hashing import hash_path
from posttrain.rundir import atomic_write_json, atomic_write_text
from posttrain.stage import StageContext

SCHEMA_VERSION = 1
ANSWERS = ".answers.sqlite"


class Task(Protocol):
    """What the stage asks of a task."""

    def run(self, target: Target, path: Path, how: How, bar: ProgressTracker) -> Measured: ...


TASKS: dict[type, Callable[[Any], Task]] = {
    tasks.ExactMatchTask: ExactMatch,
    tasks.Gsm8kTask: Gsm8k,
    tasks.IfevalTask: Ifeval,
    tasks.OverlapTask: Overlap,
    tasks.SafetyTask: Safety,
    tasks.MultipleChoiceTask: MultipleChoice,
    tasks.PerplexityTask: LanguageModelling,
}


def run(config: BenchmarkConfig, context: StageContext) -> dict[str, Any]:
    """Measure everything the configuration names; returns TASK/METRIC/TARGET numbers for the manifest."""
    how = How(config.confidence, config.bootstrap_samples, config.seed)
    cache = Path(config.cache).expanduser() if config.cache else context.run_dir / ANSWERS
    report: dict[str, Any] = {}
    items: dict[str, dict[str, Any]] = {}
    with ReplyStore(cache) as store:
        for name in config.targets:
            target = _target(config, context, name, store)
            measured = {}
            for task_name, task in config.tasks.items():
                if name in task.skip:
                    continue
                path = context.path(f"tasks.{task_name}.{'data' if task.data is not None else 'dataset'}")
                with (
                    context.phase(f"{task_name}.{name}"),
                    context.progress(f"{task_name} of {name}", None) as bar,
                ):
                    found = TASKS[type(task)](task).run(target, path, how, bar)
                measured[task_name] = {
                    "kind": task.kind,
                    "counts": found.counts,
                    "scores": {metric: score.as_dict() for metric, score in found.scores.items()},
                    "contamination": _contamination(config, context, name, path),
                }
                _add_items(items, task_name, name, found)
            report[name] = {"kind": target.kind, "usage": vars(target.usage), "tasks": measured}
            del target
    results = {"schema_version": SCHEMA_VERSION, "confidence": config.confidence, "targets": report}
    atomic_write_json(context.run_dir / "benchmark.json", results)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items.values())
    atomic_write_text(context.run_dir / "items.jsonl", lines)
    _show(context, report)
    return _summary(report)


def _target(config: BenchmarkConfig, context: StageContext, name: str, store: ReplyStore) -> Target:
    target = config.targets[name]
    if isinstance(target, AnswersTarget):
        path = context.path(f"targets.{name}.path")
        return GivenAnswers(name, path, target.question_column, target.answer_column)
    if isinstance(target, ModelTarget):
        from eval.generators.local import LocalModel

        field = f"targets.{name}.model"
        path, found = context.path(field), context.inputs[field]
        content = hash_path(path) if found.hub_id is not None else found.content_hash
        return LocalModel(name, path, content, store, batch_size=target.batch_size, dtype=target.dtype)
    from eval.generators.endpoint import EndpointModel

    key = os.environ.get(target.key_env) if target.key_env else None
    return EndpointModel(name, target, key, store)


def _contamination(config: BenchmarkConfig, context: StageContext, name: str, path: Path) -> dict[str, Any]:
    """status: "checked" where every data set that the model was trained on was decontaminated against data of
    this task's name, "unchecked" where one was not, "unknown" where no data set can be found.
    """
    target = config.targets[name]
    if not isinstance(target, ModelTarget):
        return {"status": "unknown", "data": []}
    found = lineage([Path(context.inputs[f"targets.{name}.model"].ref)])
    names = {path.name, path.stem}
    clean = [bool(names & {Path(one).name for one in data["against"]}) for data in found["data"]]
    status = found["status"] if not clean else "checked" if all(clean) else "unchecked"
    return {"status": status, "data": found["data"]}


def _add_items(rows: dict[str, dict[str, Any]], task: str, target: str, found: Measured) -> None:
    """Into the rows of items.jsonl, which have the form of an eval run's samples.jsonl."""
    for result in found.results:
        sample = f"/{result.sample}" if result.sample else ""
        place = f"{task}/{result.item.id}{sample}"
        row = rows.setdefault(
            place,
            {
                "id": place,
                "task": task,
                "item": result.item.id,
                "sample": result.sample,
                "prompt": result.item.messages,
                "answers": {},
            },
        )
        scored = result.scored
        row["answers"][target] = {
            "text": result.output.text,
            "finished": result.output.finished,
            "prompt_tokens": result.output.prompt_tokens,
            "completion_tokens": result.output.completion_tokens,
            "status": result.output.status,
            "scores": {} if scored is None else scored.values,
            "detail": {"reason": result.output.detail} if scored is None else scored.detail,
        }


def _show(context: StageContext, report: dict[str, Any]) -> None:
    for target, one in report.items():
        for task, measured in one["tasks"].items():
            lines = [f"{task} of {target} (training data {measured['contamination']['status']})"]
            for metric, score in measured["scores"].items():
                ends = f"{score['low']:.4f} to {score['high']:.4f}"
                lines.append(f"  {metric}: {score['value']:.4f}, {ends}, n {score['n']:,}")
            left = measured["counts"].get("not_answered", 0)
            if left:
                lines.append(f"  {left:,} prompts were not answered and are in no score")
            context.console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Flat: TASK/METRIC/TARGET, and TASK/not_answered/TARGET where a target did not take some prompts."""
    flat: dict[str, Any] = {}
    for target, one in report.items():
        for task, measured in one["tasks"].items():
            for metric, score in measured["scores"].items():
                flat[f"{task}/{metric}/{target}"] = score["value"]
            if measured["counts"].get("not_answered"):
                flat[f"{task}/not_answered/{target}"] = measured["counts"]["not_answered"]
    return flat
