"""What `posttrain gate` does: judge every gate, say all of them, fail if one fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.gate.config import Gate, GatesConfig, load_gates
from eval.gate.figures import Figures, load_figures
from posttrain.errors import UserError
from posttrain.rundir import atomic_write_text

Status = Literal["passed", "failed", "missing"]
FEWEST_PROMPTS = 10
"""Prompts below which `not_worse_than` gives no answer."""
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Outcome:
    """What became of one gate. missing: its figure is not there, which is no pass and no fail."""

    name: str
    run: str
    metric: str
    status: Status
    value: float | None
    reason: str


def judge_gates(path: Path, overrides: Sequence[str] = ()) -> list[Outcome]:
    """Every gate of a file, in its order. Raises ConfigError for a file that is no file of gates."""
    config, _ = load_gates(path, overrides)
    loaded: dict[str, Figures] = {}
    return [_judge(gate, config, loaded) for gate in config.gates]


def _judge(gate: Gate, config: GatesConfig, loaded: dict[str, Figures]) -> Outcome:
    run = str(gate.run or config.run)
    reasons: list[str] = []
    failures: list[str] = []
    value = None
    try:
        if run not in loaded:
            loaded[run] = load_figures(run)
        if gate.min is not None or gate.max is not None:
            value = loaded[run].get(gate.metric, gate.end)
            what = "" if gate.end == "value" else f"{gate.end} end of its interval "
            if gate.min is not None:
                reason = f"{what}{value:.6g}, has to be at least {gate.min:.6g}"
                (reasons if value >= gate.min else failures).append(reason)
            if gate.max is not None:
                reason = f"{what}{value:.6g}, has to be at most {gate.max:.6g}"
                (reasons if value <= gate.max else failures).append(reason)
        if gate.not_worse_than is not None:
            value, reason, met = _not_worse(gate, run, config)
            (reasons if met else failures).append(reason)
    except UserError as error:
        return Outcome(gate.title, run, gate.metric, "missing", None, str(error))
    status: Status = "failed" if failures else "passed"
    return Outcome(gate.title, run, gate.metric, status, value, "; ".join(failures or reasons))


def _not_worse(gate: Gate, run: str, config: GatesConfig) -> tuple[float, str, bool]:
    """(difference, what to say about it, whether it passes). Raises UserError without scores per prompt."""
    from eval.compare.runs import align, load_run
    from eval.statistics import paired_difference

    other = gate.not_worse_than
    assert other is not None
    a, b = load_run(Path(other.run)), load_run(Path(run))
    model, score = _model_and_score(gate.metric, b.models)
    for name, where in ((other.model or model, a), (model, b)):
        if name not in where.models:
            raise UserError(f"{where.path}: has no model '{name}'; it has {', '.join(where.models)}")
    aligned = align(a, b, (other.model or model, model))
    for side in (aligned.a, aligned.b):
        if score not in side.scores:
            raise UserError(
                f"{side.run.path}: has no score per prompt called {score}, which not_worse_than needs\n"
                f"    there are {', '.join(side.scores)}"
            )
    prompts = len(set(aligned.clusters))
    if prompts < FEWEST_PROMPTS:
        raise UserError(
            f"{b.path}: has {prompts} prompts; not_worse_than needs at least {FEWEST_PROMPTS}, since an "
            "interval over fewer can be as narrow as chance has it"
        )
    interval = paired_difference(
        aligned.b.scores[score],
        aligned.a.scores[score],
        aligned.clusters,
        other.confidence,
        config.bootstrap_samples,
        config.seed,
    )
    gain = -interval.high if gate.lower_is_better else interval.low
    reason = (
        f"{interval.value:+.6g} against {other.run} ({100 * other.confidence:g} % interval "
        f"{interval.low:+.6g} to {interval.high:+.6g}), may be worse by {other.by:g}"
    )
    return interval.value, reason, gain >= -other.by


def _model_and_score(metric: str, models: Sequence[str]) -> tuple[str, str]:
    """("ppo", "gold") of `models.ppo.gold`, with or without `.value`; the name of a model may hold dots.

    Raises UserError for other paths.
    """
    prefix, _, rest = metric.removesuffix(".value").partition(".")
    known = [name for name in models if rest.startswith(f"{name}.")]
    name = max(known, key=len) if known else rest.partition(".")[0]
    score = rest.removeprefix(name).removeprefix(".")
    if prefix != "models" or not name or not score:
        raise UserError(f"not_worse_than needs a metric of the form models.NAME.SCORE (got {metric})")
    return name, score.replace(".", "/")


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """2 where a figure is missing, else 1 where a gate failed, else 0."""
    statuses = {outcome.status for outcome in outcomes}
    return 2 if "missing" in statuses else int("failed" in statuses)


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For scripts."""
    return {"passed": exit_code(outcomes) == 0, "gates": [asdict(outcome) for outcome in outcomes]}


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """All gates, failed ones with their reason."""
    wide = console if console.is_terminal else Console(file=console.file, width=140)
    table = Table()
    for heading in ("gate", "", "why"):
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        colour = {"passed": "green", "failed": "red", "missing": "yellow"}[outcome.status]
        table.add_row(Text(outcome.name), Text(outcome.status, colour), Text(outcome.reason))
    wide.print(table)
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "missing")}
    wide.print(Text(", ".join(f"{count} {status}" for status, count in counts.items() if count)))


def write_junit(outcomes: Sequence[Outcome], path: Path, suite_name: str) -> None:
    """JUnit XML, as CI servers read it: failed gates are failures, missing figures errors."""
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    missing = sum(outcome.status == "missing" for outcome in outcomes)
    counts = {"tests": str(len(outcomes)), "failures": str(failed), "errors": str(missing)}
    suite = ElementTree.Element("testsuite", {"name": suite_name, **counts})
    for outcome in outcomes:
        run, name, reason = (
            _NOT_IN_XML.sub("?", text) for text in (outcome.run, outcome.name, outcome.reason)
        )
        case = ElementTree.SubElement(suite, "testcase", {"classname": run, "name": name})
        if outcome.status != "passed":
            tag = "failure" if outcome.status == "failed" else "error"
            ElementTree.SubElement(case, tag, {"message": reason}).text = reason
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text + "\n")
