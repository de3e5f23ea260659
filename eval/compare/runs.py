"""Reads two runs of the eval stage and lines their answers up, prompt by prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.judging.rows import prompt_of, read_jsonl
from posttrain.errors import DataError, UserError
from posttrain.inputs import resolve


@dataclass(frozen=True)
class EvalRun:
    """A finished run of the eval stage: its name, results, samples by prompt id, and manifest."""

    path: Path
    results: dict[str, Any]
    samples: dict[str, dict[str, Any]]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The pipeline's directory and the stage's, enough to tell runs apart."""
        return "/".join(self.path.resolve().parts[-2:])

    @property
    def models(self) -> list[str]:
        return list(self.results["models"])


@dataclass
class Side:
    """One model's answers, in the order of the prompts. scores: one number per prompt, by metric.

    partial: metrics that only so many answers have a finite number of, which no mean can be taken of.
    """

    run: EvalRun
    model: str
    texts: list[str]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    partial: dict[str, int] = field(default_factory=dict)


@dataclass
class Aligned:
    """Two models' answers to the same prompts. clusters: equal for equal prompts."""

    label: str
    a: Side
    b: Side
    ids: list[str]
    rows: list[dict[str, Any]]
    clusters: list[str]


def load_run(path: Path) -> EvalRun:
    """Read a run directory of the eval stage. Raises UserError or DataError, naming the file."""
    found = resolve(str(path), "run")
    manifest = found.manifest or {}
    if manifest.get("stage") != "eval" or found.path is None:
        raise UserError(f"{path}: is a {manifest.get('stage')} run; name runs of the eval stage")
    file = found.path / "eval.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); run the eval stage again") from None
    if not results.get("models"):
        raise DataError(f"{file}: compares no policies, so there is nothing to compare with another run")
    return EvalRun(found.path, results, _samples(found.path / "samples.jsonl", results["models"]), manifest)


def _samples(file: Path, models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows by prompt id. Raises DataError for a row without prompt or answers, or an id seen twice."""
    samples: dict[str, dict[str, Any]] = {}
    for line, row in read_jsonl(file):
        identity, answers = row.get("id"), row.get("answers")
        if not isinstance(identity, str) or not isinstance(answers, dict) or prompt_of(row, "") is None:
            raise DataError(f"{file}:{line}: is no line of an eval run")
        for name in models:
            answer = answers.get(name)
            if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
                raise DataError(f"{file}:{line}: has no answer of {name}; run the eval stage again")
        if identity in samples:
            raise DataError(f"{file}:{line}: prompt {identity} is there twice; run the eval stage again")
        samples[identity] = row
    return samples


def model_pairs(a: EvalRun, b: EvalRun, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(model of A, model of B) by `NAME` or `NAME_A=NAME_B`; default: the names in both runs.

    Raises UserError for a name that is not there, or nothing in common.
    """
    if not wanted:
        both = [name for name in a.models if name in b.models]
        if both:
            return both_in(a, b, both)
        if len(a.models) == len(b.models) == 1:
            return [(a.models[0], b.models[0])]
        raise UserError(
            f"no model of {a.name} ({', '.join(a.models)}) is in {b.name} ({', '.join(b.models)})\n"
            "    say which to compare: --model NAME_A=NAME_B"
        )
    pairs: dict[tuple[str, str], None] = {}
    for item in wanted:
        first, _, second = item.partition("=")
        for name, run in ((first, a), (second or first, b)):
            if name not in run.models:
                raise UserError(f"--model {item}: {run.name} has no '{name}'; it has {', '.join(run.models)}")
        pairs[first, second or first] = None
    return list(pairs)


def both_in(a: EvalRun, b: EvalRun, names: Sequence[str]) -> list[tuple[str, str]]:
    """The names paired with themselves. Raises UserError for a run compared with itself."""
    if a.path.resolve() == b.path.resolve():
        raise UserError(
            f"{a.path}: is both runs, and every model equals itself\n"
            "    compare two of its models: --model A=B"
        )
    return [(name, name) for name in names]


def align(a: EvalRun, b: EvalRun, pair: tuple[str, str]) -> Aligned:
    """Both models' answers by prompt id. Raises DataError, with the overlap, where the prompts differ."""
    require_same_prompts(a, b)
    ids = list(a.samples)
    rows = [a.samples[i] for i in ids]
    sides = []
    for run, model in ((a, pair[0]), (b, pair[1])):
        answers = [run.samples[i]["answers"][model] for i in ids]
        sides.append(Side(run, model, [answer["text"] for answer in answers], *scores_of(answers)))
    label = pair[0] if pair[0] == pair[1] else f"{pair[0]} -> {pair[1]}"
    clusters = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    return Aligned(label, sides[0], sides[1], ids, rows, clusters)


def require_same_prompts(a: EvalRun, b: EvalRun) -> None:
    """Raise DataError unless both runs answered the same prompts under the same ids."""
    common = [i for i in a.samples if i in b.samples]
    changed = [i for i in common if a.samples[i]["prompt"] != b.samples[i]["prompt"]]
    same = len(common) - len(changed)
    if same == len(a.samples) == len(b.samples):
        return
    detail = f"; {len(changed)} ids stand for different texts, the first is {changed[0]}" if changed else ""
    raise DataError(
        f"{a.name} has {len(a.samples)} prompts and {b.name} has {len(b.samples)}; "
        f"{same} are the same{detail}\n"
        "    a paired comparison needs the same prompts: evaluate both with the same `prompts`, "
        "`num_prompts`, `max_prompt_tokens` and `seed`"
    )


def scores_of(answers: Sequence[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Every number that all answers have, truth values as 0 and 1, nested ones as `group/name`; and how many
    answers have those that not all of them have.
    """
    flat = [_flatten(answer) for answer in answers]
    counts = Counter(name for one in flat for name in one)
    whole = [name for name, count in counts.items() if count == len(flat)]
    scores = {name: np.array([one[name] for one in flat], dtype=np.float64) for name in whole}
    return scores, {name: count for name, count in counts.items() if count < len(flat)}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int, float)) and np.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found
