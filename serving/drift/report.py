"""The report: one self-contained HTML page, no script and no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.rundir import atomic_write_text
from serving.drift.baseline import Baseline
from serving.drift.charts import bars, histogram
from serving.drift.compare import Comparison, Finding

WORDS = {"drift": "drift", "small": "significant, small", "none": "no drift"}


@dataclass(frozen=True)
class Trend:
    """The comparisons of several days, oldest first; empty where there are not several."""

    days: Mapping[str, Comparison]

    def as_json(self) -> dict[str, Any]:
        return {
            day: {
                "records": compared.records,
                "alarms": [finding.feature for finding in compared.alarms],
                "effects": {finding.feature: finding.effect for finding in compared.findings},
            }
            for day, compared in self.days.items()
        }

    def rows(self) -> list[tuple[str, list[Finding | None]]]:
        """(feature, its finding on each day or None), in the order of first appearance."""
        names = dict.fromkeys(f.feature for compared in self.days.values() for f in compared.findings)
        found = [{f.feature: f for f in compared.findings} for compared in self.days.values()]
        return [(name, [day.get(name) for day in found]) for name in names]


def write_report(
    path: Path,
    comparison: Comparison,
    baseline: Baseline,
    source: str,
    selection: str,
    unusual: list[dict[str, Any]],
    trend: Trend,
) -> None:
    """Write the page atomically."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("serving"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["num"] = number
    page = environment.get_template("drift.html").render(
        comparison=comparison,
        findings=sorted(comparison.findings, key=_rank),
        baseline=baseline,
        source=source,
        selection=selection,
        words=WORDS,
        figures=figures(comparison),
        unusual=unusual,
        trend=trend,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    # It quotes requests, which the database keeps for its owner only.
    atomic_write_text(path, page, 0o600)


def _rank(finding: Finding) -> tuple[int, float]:
    return list(WORDS).index(finding.verdict), -finding.effect / finding.floor


def figures(comparison: Comparison) -> list[dict[str, Any]]:
    """A figure per number and category with more than two labels, drifted ones first."""
    found = []
    for finding in sorted(comparison.findings, key=_rank):
        if finding.kind not in ("number", "category"):
            continue
        draw = histogram if finding.kind == "number" else bars
        found.append({"title": finding.feature, "verdict": finding.verdict, "svg": draw(finding)})
    return found


def number(value: float | None) -> str:
    """Three significant digits; "<0.001" for smaller p-values and effects, "-" for None."""
    if value is None:
        return "-"
    return "0" if value == 0 else "<0.001" if 0 < value < 0.001 else f"{value:.3g}"
