"""How often `posttrain drift` alarms on days like the reference, and on days that are not.

    python scripts/bench_drift.py --output docs/benchmarks/drift-cpu.json

Real conversations (`bench_drift_world.py`), 500 requests a day. In each of 20 rounds the rows are shuffled
anew: 6,000 make the reference, 5,000 others make 10 days like it, and 500 more make a day that is shifted in
each of several ways. A second reference of dialogues and instructions without mathematics (1,600 rows) meets
days of which a part is GSM8K, and 3 days like itself in each round. Writes every day's alarms as JSON and
prints Markdown tables. Exits 1 when a bar is missed: at most 5 % false alarms, every shift that is marked as
a bar found on every day.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import bench_drift_world as world
import numpy as np
from scipy.stats import binomtest

from posttrain.environment import hardware, package_versions
from serving.drift import baseline as baselines
from serving.drift.compare import Comparison, compare
from serving.drift.instruments import Instruments, Settings, load_instruments
from serving.drift.measure import measure
from serving.drift.records import Record

PER_DAY = 500
ALPHA = 0.05


def shifts() -> dict[str, tuple[bool, world.Shift]]:
    """Name -> (whether it is a bar, the shift)."""
    formats, german = world.formats(), world.sentences("de")
    chinese = world.instructions("zh")
    return {
        "new topic (IFEval), 5 %": (False, world.replaced(0.05, formats)),
        "new topic (IFEval), 10 %": (False, world.replaced(0.1, formats)),
        "new topic (IFEval), 20 %": (True, world.replaced(0.2, formats)),
        "prompts in German, 5 %": (False, world.translated(0.05, german)),
        "prompts in German, 20 %": (True, world.translated(0.2, german)),
        "prompts in German, 100 %": (True, world.translated(1.0, german)),
        "Chinese prompts and answers, 20 %": (True, world.replaced(0.2, chinese)),
        "Chinese prompts and answers, 100 %": (True, world.replaced(1.0, chinese)),
        "prompts twice as long": (True, world.doubled("prompt")),
        "answers twice as long": (True, world.doubled("answer")),
        "refusals, 5 % more": (False, world.refusing(0.05)),
    }


def maths_shifts() -> dict[str, tuple[bool, world.Shift]]:
    maths = world.maths()
    return {
        "new topic (GSM8K), 5 %": (False, world.replaced(0.05, maths)),
        "new topic (GSM8K), 10 %": (False, world.replaced(0.1, maths)),
        "new topic (GSM8K), 20 %": (True, world.replaced(0.2, maths)),
    }


def one_round(
    pool: Sequence[Record],
    reference_rows: int,
    clean_days: int,
    shifted: dict[str, tuple[bool, world.Shift]],
    seed: int,
    instruments: Instruments,
) -> list[dict[str, Any]]:
    """Each day of one round: {"round", "shift", "alarms", "significant", "p"}. No row is used twice."""
    rng = np.random.default_rng([2026, seed])
    order = rng.permutation(len(pool))
    records = [pool[i] for i in order]
    baseline = baselines.fit(
        records[:reference_rows], {"path": "bench", "kind": "conversation"}, instruments, seed=seed
    )
    days = [
        records[start : start + PER_DAY]
        for start in range(reference_rows, reference_rows + (clean_days + 1) * PER_DAY, PER_DAY)
    ]
    assert all(len(day) == PER_DAY for day in days)
    plan = [("none", day) for day in days[:clean_days]]
    plan += [(name, shift(days[-1], rng)) for name, (_, shift) in shifted.items()]
    rows = []
    for number, (name, day) in enumerate(plan):
        columns = baseline.complete(measure(day, instruments))
        result = compare(baseline, columns, alpha=ALPHA, seed=1000 * seed + number)
        rows.append({"round": seed, "shift": name, **_row(result)})
    return rows


def _row(result: Comparison) -> dict[str, Any]:
    return {
        "alarms": [finding.feature for finding in result.alarms],
        "significant": [finding.feature for finding in result.findings if finding.verdict != "none"],
        "p": {finding.feature: float(f"{finding.p:.3g}") for finding in result.findings},
        "effect": {finding.feature: float(f"{finding.effect:.3g}") for finding in result.findings},
    }


def rate(days: Sequence[dict[str, Any]], key: str = "alarms") -> dict[str, float]:
    """How many of the days have any, with the exact 95 % interval of the share."""
    found = sum(bool(day[key]) for day in days)
    interval = binomtest(found, len(days)).proportion_ci(method="exact")
    return {"days": len(days), "found": found, "low": interval.low, "high": interval.high}


def summary(days: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates by shift, and for the days without one the share of uncorrected p-values below 0.05."""
    by_shift: dict[str, list[dict[str, Any]]] = {}
    for day in days:
        by_shift.setdefault(day["shift"], []).append(day)
    clean = by_shift["none"]
    features = {feature for day in clean for feature in day["p"]}
    below = {
        feature: float(np.mean([day["p"][feature] < ALPHA for day in clean if feature in day["p"]]))
        for feature in sorted(features)
    }
    return {
        "shifts": {
            name: rate(found)
            | {"features": dict(Counter(f for d in found for f in d["alarms"]).most_common())}
            for name, found in by_shift.items()
        },
        "significant_without_shift": rate(clean, "significant"),
        "uncorrected_below_alpha": below,
    }


def table(name: str, found: dict[str, Any]) -> list[str]:
    lines = [f"### {name}", ""]
    lines += ["| Day | Alarms | 95 % interval | Features, most frequent first |", "|---|---:|---|---|"]
    for shift, row in found["shifts"].items():
        features = ", ".join(f"{feature} {count}" for feature, count in list(row["features"].items())[:4])
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        lines.append(f"| {shift} | {row['found']} of {row['days']} | {interval} | {features} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="file for the raw figures")
    arguments = parser.parse_args()
    instruments = load_instruments(Settings.of())
    dialogues = [*world.chat(), *world.instructions()]
    worlds: dict[str, tuple[list[Record], int, int, dict[str, tuple[bool, world.Shift]]]] = {
        "mathematics, dialogues, instructions": ([*world.maths(), *dialogues], 6000, 10, shifts()),
        "dialogues and instructions": (dialogues, 1290, 3, maths_shifts()),
    }
    results: dict[str, Any] = {}
    missed = []
    for name, (pool, reference_rows, clean_days, shifted) in worlds.items():
        days: list[dict[str, Any]] = []
        for seed in range(arguments.rounds):
            days += one_round(pool, reference_rows, clean_days, shifted, seed, instruments)
            print(f"{name}: round {seed + 1} of {arguments.rounds}", file=sys.stderr)
        found = summary(days)
        results[name] = {"rows": len(pool), "reference": reference_rows, **found, "days": days}
        print("\n".join(table(name, found)) + "\n")
        for shift, row in found["shifts"].items():
            share = row["found"] / row["days"]
            if share > ALPHA if shift == "none" else shifted[shift][0] and share < 1:
                missed.append(f"{name}: {shift}: {row['found']} of {row['days']}")
    if arguments.output is not None:
        machine = {"date": str(date.today()), "command": " ".join(["python", *sys.argv])}
        machine |= {"hardware": hardware(), "packages": package_versions()}
        text = json.dumps({"machine": machine, "per_day": PER_DAY, "alpha": ALPHA, "worlds": results})
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print("\n".join(f"MISSED {bar}" for bar in missed) or "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
