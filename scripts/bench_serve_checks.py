"""What `bench_serve.py` asks besides throughput: short requests behind long ones, memory, the verdicts."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import psutil
from bench_serve_client import HttpLoad, Place, read_answer
from bench_serve_common import LONG_TOKENS, SHORT_TOKENS, Request, Sample, slope
from bench_serve_sides import Side, World

SPEEDUP, WAIT_SECONDS, OVERHEAD, GROWTH = 6.0, 0.3, 0.25, 0.02
"""The bars. GROWTH: of a process's resident memory after the first requests, by the fitted line."""
TOOL_SECONDS = 300.0
SOAK_BATCH, SOAK_CONCURRENCY, SOAK_FIRST = 100, 16, 200


@dataclass(frozen=True)
class Verdict:
    """One bar. passed: None where nothing was measured for it."""

    bar: str
    figures: str
    passed: bool | None


async def short_behind_long(load: HttpLoad, requests: Sequence[Request], trials: int) -> list[dict[str, Any]]:
    """A short request sent when a long one's first token has come, through the whole stack; per trial."""
    rows = []
    for index in range(trials):
        prompt = requests[index % len(requests)]
        long, short = Place(load), Place(load)
        await short.ask(Request(prompt.prompt, prompt.prompt_tokens, 1))  # opens its connection
        short.answers.clear()
        task = asyncio.create_task(long.ask(Request(prompt.prompt, prompt.prompt_tokens, LONG_TOKENS)))
        # The gateway begins its answer when Triton's first token has come.
        while not task.done() and not (long.connection is not None and long.connection.pieces):
            await asyncio.sleep(0.001)
        await short.ask(Request(prompt.prompt, prompt.prompt_tokens, SHORT_TOKENS))
        overlapped = not task.done()
        await task
        for place in (long, short):
            place.close()
            for sample, pieces in place.answers:
                read_answer(sample, pieces)
        (late, _), (first, _) = short.answers[0], long.answers[0]
        rows.append(
            {
                "seconds": late.ended - late.sent,
                "tokens": late.tokens,
                "long_seconds": first.ended - first.sent,
                "long_tokens": first.tokens,
                "overlapped": overlapped,
                "error": late.error or first.error,
            }
        )
    return rows


def soak(side: Side, requests: Sequence[Request], total: int, answer: int) -> dict[str, Any]:
    """`total` short requests; the resident memory of each process after every SOAK_BATCH of them."""
    stream = cycle([Request(r.prompt, r.prompt_tokens, answer) for r in requests])
    rows: list[dict[str, float]] = []
    errors, started, sent = 0, time.perf_counter(), 0
    while sent < total:
        part = list(islice(stream, min(SOAK_BATCH, total - sent)))
        samples: list[Sample] = side.ask(part, SOAK_CONCURRENCY)
        sent += len(part)
        errors += sum(sample.error is not None for sample in samples)
        resident = {name: process.memory_info().rss for name, process in side.processes().items()}
        rows.append({"requests": sent, **resident})
    return {
        "requests": total,
        "answer_tokens": answer,
        "concurrency": SOAK_CONCURRENCY,
        "errors": errors,
        "seconds": time.perf_counter() - started,
        "resident_bytes": rows,
        "processes": growth(rows, min(SOAK_FIRST, total // 2)),
    }


def growth(rows: Sequence[Mapping[str, float]], first: int) -> dict[str, dict[str, float]]:
    """Per process, from `first` requests on: bytes then and at the end, the fitted line's bytes per 1,000
    requests, and its rise over these requests relative to the bytes at their beginning."""
    kept = [row for row in rows if row["requests"] >= first]
    found = {}
    for name in kept[0].keys() - {"requests"}:
        points = [(row["requests"], row[name]) for row in kept if name in row]
        per_request = slope(points) if len(points) > 1 else 0.0
        rise = per_request * (points[-1][0] - points[0][0])
        found[name] = {
            "first": points[0][1],
            "last": points[-1][1],
            "per_1000": 1000 * per_request,
            "rise": rise / points[0][1],
        }
    return dict(sorted(found.items()))


def peaks(sides: Sequence[Side]) -> dict[str, dict[str, int]]:
    """Largest resident size so far of every side's processes, in bytes (VmHWM), loading included."""
    return {
        side.key: {name: peak_resident(process) for name, process in side.processes().items()}
        for side in sides
    }


def peak_resident(process: psutil.Process) -> int:
    """Linux's VmHWM of a process, in bytes."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        return int(file.read().partition("VmHWM:")[2].split()[0]) * 1024


def rate(summary: Mapping[str, Mapping[int, Mapping[str, Any]]], side: str, concurrency: int) -> float | None:
    """Output tokens a second that were measured, or None."""
    found = summary.get(side, {}).get(concurrency)
    return None if found is None else found["tokens_per_second"]


def verdicts(
    summary: Mapping[str, Mapping[int, Mapping[str, Any]]],
    short: Sequence[Mapping[str, Any]],
    soaked: Mapping[str, Any] | None,
) -> list[Verdict]:
    """Every bar with its figures. summary: statistics by side and concurrency."""
    failed = sum(level["errors"] for levels in summary.values() for level in levels.values())
    requests = sum(level["requests"] for levels in summary.values() for level in levels.values())
    return [
        _speedup(summary),
        _short(short),
        *(_overhead(summary, concurrency) for concurrency in (16, 1)),
        _memory(soaked),
        Verdict("no request fails", f"{failed} of {requests:,.0f} failed", failed == 0),
    ]


def _speedup(summary: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Verdict:
    bar = f"gateway at concurrency 16: at least {SPEEDUP:g}x one at a time"
    many = rate(summary, "gateway", 16)
    alone = {
        "the gateway at 1": rate(summary, "gateway", 1),
        "generate()": rate(summary, "generate", 1),
    }
    ratios = {name: many / one for name, one in alone.items() if many is not None and one}
    if many is None or not ratios:
        return Verdict(bar, "not measured", None)
    shown = ", ".join(f"{value:.2f}x {name} ({alone[name]:,.0f})" for name, value in ratios.items())
    return Verdict(bar, f"{many:,.0f} tokens/s: {shown}", all(v >= SPEEDUP for v in ratios.values()))


def _short(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    bar = f"{SHORT_TOKENS} tokens behind {LONG_TOKENS}: under {WAIT_SECONDS:g} s, every time"
    if not rows:
        return Verdict(bar, "not measured", None)
    seconds = sorted(row["seconds"] for row in rows)
    shown = f"{len(rows)} times: middle {seconds[len(seconds) // 2]:.3f} s, worst {seconds[-1]:.3f} s"
    errors = [row["error"] for row in rows if row["error"]]
    if errors:
        return Verdict(bar, f"{shown}; {len(errors)} failed: {errors[0]}", False)
    return Verdict(bar, shown, seconds[-1] < WAIT_SECONDS)


def _overhead(summary: Mapping[str, Mapping[int, Mapping[str, Any]]], concurrency: int) -> Verdict:
    bar = f"time per token over the engine's at concurrency {concurrency}: at most {OVERHEAD:.0%} more"
    engine, served = rate(summary, "engine", concurrency), rate(summary, "gateway", concurrency)
    if engine is None or not served:
        return Verdict(bar, "not measured", None)
    more = engine / served - 1
    return Verdict(bar, f"{more:+.1%} ({engine:,.0f} to {served:,.0f} tokens/s)", more <= OVERHEAD)


def _memory(soaked: Mapping[str, Any] | None) -> Verdict:
    bar = f"memory flat: no process grows by more than {GROWTH:.0%}"
    if soaked is None:
        return Verdict(bar, "not measured (--soak)", None)
    parts = [
        f"{name} {row['first'] / 2**20:.0f} to {row['last'] / 2**20:.0f} MiB "
        f"({row['per_1000'] / 2**20:+.2f} MiB per 1,000)"
        for name, row in soaked["processes"].items()
    ]
    shown = f"{soaked['requests']:,} requests, {soaked['errors']} failed: {', '.join(parts)}"
    flat = all(row["rise"] <= GROWTH for row in soaked["processes"].values())
    return Verdict(bar, shown, flat and soaked["errors"] == 0)


def other_tools(
    world: World, triton_url: str, gateway_port: int, requests: Sequence[Request], concurrency: int
) -> dict[str, Any]:
    """What perf_analyzer says about Triton and aiperf about the gateway, where they are installed."""
    name, count = world.facts["name"], 3 * concurrency
    data = world.folder / "perf_analyzer.json"
    rows = [
        {
            "text_input": [request.prompt],
            "stream": [True],
            "sampling_parameters": [json.dumps({"temperature": 0, "max_tokens": request.answer_tokens})],
        }
        for request in requests[:count]
    ]
    data.write_text(json.dumps({"data": rows}), encoding="utf-8")
    commands = {
        "perf_analyzer": ["-m", name, "-i", "grpc", "-u", triton_url, "--streaming", "--async"]
        + ["--input-data", str(data), "--concurrency-range", str(concurrency)]
        + ["--measurement-mode", "count_windows", "--measurement-request-count", str(count)],
        "aiperf": ["profile", "--model", name, "--url", f"http://127.0.0.1:{gateway_port}"]
        + ["--endpoint-type", "completions", "--streaming", "--tokenizer", world.facts["weights"]]
        + ["--concurrency", str(concurrency), "--request-count", str(count)],
    }
    found: dict[str, Any] = {}
    for tool, arguments in commands.items():
        program = shutil.which(tool)
        if program is None:
            found[tool] = "not installed"
            continue
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS, cwd=world.folder
        )
        found[tool] = {"exit_code": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}
    return found
