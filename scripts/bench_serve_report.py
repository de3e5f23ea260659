"""What `bench_serve.py` prints: medians over repeats, and Markdown tables."""

from __future__ import annotations

from typing import Any

from bench_serve_checks import Verdict
from bench_serve_common import Settings, middle
from bench_serve_sides import TITLES

COLUMNS = (
    "in flight",
    "tokens/s",
    "requests/s",
    "TTFT, ms",
    "ITL, ms",
    "latency, ms",
    "CPU ms a token",
    "errors",
)


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Medians over the repeats, by side and concurrency; errors and requests are sums."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["side"], run["concurrency"]), []).append(run)
    summary: dict[str, dict[int, dict[str, Any]]] = {}
    left_out = ("side", "concurrency", "repeat", "messages", "same_text")
    for (side, concurrency), group in grouped.items():
        found = middle([{key: run[key] for key in run if key not in left_out} for run in group])
        found |= {key: sum(run[key] for run in group) for key in ("errors", "requests")}
        found["same_text"] = [sum(run["same_text"][i] for run in group) for i in (0, 1)]
        found["messages"] = sorted({message for run in group for message in run["messages"]})
        summary.setdefault(side, {})[concurrency] = found
    return summary


def milliseconds(found: dict[str, Any], key: str) -> str:
    """p50 / p95 / p99, or a dash where nothing is streamed."""
    values = found.get(key)
    return "-" if values is None else " / ".join("-" if v is None else f"{v:,.0f}" for v in values.values())


def table(summary: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One line a side and concurrency."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    levels = sorted({concurrency for found in summary.values() for concurrency in found})
    for concurrency in levels:
        for side, found in summary.items():
            if (row := found.get(concurrency)) is None:
                continue
            cells = [TITLES[side], str(concurrency), f"{row['tokens_per_second']:,.0f}"]
            cells.append(f"{row['requests_per_second']:.2f}")
            cells += [milliseconds(row, key) for key in ("ttft_ms", "itl_ms", "latency_ms")]
            cells.append(", ".join(f"{n} {value:.2f}" for n, value in row["cpu_ms_per_token"].items()))
            lines.append(f"| {' | '.join([*cells, str(row['errors'])])} |")
    return "\n".join(lines)


def verdict_table(found: list[Verdict]) -> str:
    """One line a bar."""
    words = {True: "met", False: "**missed**", None: "-"}
    lines = ["| Bar | Measured | |", "|---|---|---|"]
    return "\n".join(lines + [f"| {one.bar} | {one.figures} | {words[one.passed]} |" for one in found])


def show(report: dict[str, Any], settings: Settings) -> None:
    """The report as Markdown on standard output."""
    where, world = report["machine"], report["world"]
    model = "the given export" if world["given"] else f"{world['parameters'] / 1e6:.1f} M parameters"
    print(
        f"Serving {model} on {where['processor']}, {where['cpus']} CPUs, OMP_NUM_THREADS={settings.threads}, "
        f"{where['date']}\n\n{table(report['summary'])}\n"
    )
    for name, reason in report["skipped"].items():
        print(f"left out: {TITLES[name]}: {reason}")
    for side, processes in report["peak_resident_bytes"].items():
        print(
            f"peak memory of {side}: " + ", ".join(f"{n} {b / 2**20:,.0f} MiB" for n, b in processes.items())
        )
    for name, found in report["tools"].items():
        print(f"{name}: {found if isinstance(found, str) else found['output']}")
    print(f"\n{verdict_table([Verdict(**verdict) for verdict in report['verdicts']])}")
