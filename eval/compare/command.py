"""What `posttrain compare` does: read two runs, compare them, show, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.compare.contamination import contamination
from eval.compare.differences import (
    Correction,
    correct,
    differences,
    left_out,
    slice_differences,
    slices_of,
    texts_shift,
)
from eval.compare.runs import Aligned, align, load_run, model_pairs
from posttrain.rundir import atomic_write_text

SCHEMA_VERSION = 1
SHOWN_SLICES = 12


@dataclass(frozen=True)
class Settings:
    """How `compare` compares. models: NAME or NAME_A=NAME_B, none for those in both runs."""

    models: Sequence[str] = ()
    correction: Correction = "holm"
    confidence: float = 0.95
    samples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Compared:
    """The figures, as JSON values, and the answers behind them."""

    figures: dict[str, Any]
    aligned: list[Aligned]


def compare(first: Path, second: Path, settings: Settings) -> Compared:
    """Compare two eval runs: the differences are B - A. Raises UserError or DataError."""
    a, b = load_run(first), load_run(second)
    aligned = [align(a, b, pair) for pair in model_pairs(a, b, settings.models)]
    how = (settings.confidence, settings.samples, settings.seed)
    metrics = [row for one in aligned for row in differences(one, *how)]
    slices = [row for one in aligned for row in slice_differences(one, slices_of(one), *how)]
    alpha = 1 - settings.confidence
    correct(metrics, settings.correction, alpha)
    correct(slices, settings.correction, alpha)
    figures = {
        "schema_version": SCHEMA_VERSION,
        "a": {"run": str(first), "name": a.name},
        "b": {"run": str(second), "name": b.name},
        "prompts": len(aligned[0].ids),
        "confidence": settings.confidence,
        "correction": settings.correction,
        "metrics": metrics,
        "slices": slices,
        "texts": [texts_shift(one) for one in aligned],
        "perplexity": [row for one in aligned for row in _perplexity(one)],
        "left_out": [row for one in aligned for row in left_out(one)],
        "contamination": {
            one.label: {"a": contamination(a, one.a.model), "b": contamination(b, one.b.model)}
            for one in aligned
        },
    }
    return Compared(figures, aligned)


def write_page(compared: Compared, output: Path) -> None:
    """Write the HTML page, atomically."""
    from eval.compare.page import render

    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, render(compared.figures, compared.aligned))


def _perplexity(one: Aligned) -> list[dict[str, Any]]:
    both = [side.run.results["models"][side.model].get("perplexity", {}) for side in (one.a, one.b)]
    return [
        {"model": one.label, "data": data, "a": both[0][data]["perplexity"], "b": both[1][data]["perplexity"]}
        for data in both[0]
        if data in both[1]
    ]


def show(figures: dict[str, Any], console: Console) -> None:
    """Tables of the differences, of the slices that got worse, and what else to know."""
    wide = console if console.is_terminal else Console(file=console.file, width=140)
    flags = {
        label: f"A {both['a']['status']}, B {both['b']['status']}"
        for label, both in figures["contamination"].items()
    }
    level = f"{100 * figures['confidence']:.0f} %"
    title = f"{figures['b']['name']} (B) against {figures['a']['name']} (A), {figures['prompts']} prompts"
    table = Table(title=title, title_justify="left")
    for heading in ("model", "metric", "A", "B", f"B - A ({level})", "p", "corrected p", "", "contamination"):
        table.add_column(heading, justify="right" if heading in ("A", "B", "p", "corrected p") else "left")
    for row in figures["metrics"]:
        cells = [row["model"], row["metric"], *_numbers(row), row["verdict"], flags[row["model"]]]
        table.add_row(*map(Text, cells))
    wide.print(table)
    worse = [row for row in figures["slices"] if row["verdict"] == "worse"]
    down = sorted(figures["slices"], key=lambda row: row["difference"]["value"])[:SHOWN_SLICES]
    shown = worse or [row for row in down if row["difference"]["value"] < 0]
    if shown:
        what = "Slices that got worse" if worse else "Lowest slices, none significantly worse"
        table = Table(title=what, title_justify="left")
        for heading in ("model", "slice", "n", "metric", "A", "B", f"B - A ({level})", "p", "corrected p"):
            table.add_column(heading)
        for row in shown[:SHOWN_SLICES]:
            cells = [row["model"], row["slice"], str(row["n"]), row["metric"], *_numbers(row)]
            table.add_row(*map(Text, cells))
        wide.print(table)
    for row in figures["texts"]:
        changes = ", ".join(f"{name} {row['a'][name]:.3g} -> {row['b'][name]:.3g}" for name in row["a"])
        text = f"{row['model']}: {changes}; {100 * row['same_answers']:.0f} % of the answers are the same"
        wide.print(Text(text), soft_wrap=True)
    for row in figures["perplexity"]:
        text = f"{row['model']}: perplexity on {row['data']} {row['a']:.3f} -> {row['b']:.3f}"
        wide.print(Text(text), soft_wrap=True)
    for row in figures["left_out"]:
        wide.print(Text(f"{row['model']}: {row['metric']} is not compared, {row['reason']}"), soft_wrap=True)


def _numbers(row: dict[str, Any]) -> list[str]:
    difference = row["difference"]
    interval = f"{difference['value']:+.4g} ({difference['low']:+.4g} to {difference['high']:+.4g})"
    return [
        f"{row['a']:.4g}",
        f"{row['b']:.4g}",
        interval,
        f"{row['p_value']:.4f}",
        f"{row['adjusted_p']:.4f}",
    ]
