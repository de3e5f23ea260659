"""The report of a study for a terminal."""

from __future__ import annotations

from typing import Any

SHOWN = 10


def as_text(report: dict[str, Any]) -> str:
    """Lines with every number of the report, and the most divided items."""
    progress, agreement = report["progress"], report["agreement"]
    lines = [
        f"{report['study']}: {progress['votes']} of {progress['wanted']} votes, {progress['complete']} of "
        f"{progress['items']} items complete, {progress['gold_votes']} gold checks answered, "
        f"{progress['withdrawn']} votes taken back",
        f"choices: {_counts(report['choices'])}; skipped: {_counts(progress['skipped'])}",
        "",
        f"Krippendorff's alpha  {_interval(agreement['krippendorff'])}",
        f"Fleiss' kappa         {_interval(agreement['fleiss'])}",
        f"Cohen's kappa, mean   {_number(agreement['cohen']['mean'])}",
        *(
            f"  {' and '.join(pair['annotators'])}: {_interval(pair['kappa'])} over {pair['items']} items"
            for pair in agreement["cohen"]["pairs"]
        ),
        "",
        "annotator: votes; gold accuracy; agrees with others; median seconds; share of A among A and B",
        *(
            f"  {row['name']}{' (revoked)' if row['revoked'] else ''}: {row['votes']}; "
            f"{_interval(row['gold'])}; {_number(row['with_others'])}; "
            f"{_number(row['median_seconds'])}; {_interval(row['chose_a'])}"
            for row in report["annotators"]
        ),
        "",
        "win rates, a tie is half a win",
        *(f"  {row['model']} against {row['against']}: {_interval(row)}" for row in report["models"]),
        "",
        f"disagreements: {len(report['disagreements'])}",
        *(
            f"  {row['item']}: {_counts(row['votes'])}: {row['prompt']}"
            for row in report["disagreements"][:SHOWN]
        ),
    ]
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), n {found['n']}"
