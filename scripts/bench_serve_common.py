"""What the parts of `bench_serve.py` share: settings, requests, samples and their statistics. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench_settings import SettingsFile

MODEL = "bench"
"""Name of the model in the repository, and of the gateway's model."""
PERCENTILES = (50, 95, 99)
SHORT_TOKENS, LONG_TOKENS = 4, 128
"""Of the request that comes later, and of the one before it."""


@dataclass(frozen=True)
class Settings(SettingsFile):
    """One load test. Sizes of the Llama-architecture model; lengths in tokens, drawn evenly from MIN to MAX.

    vocabulary: rows of the head; the tokenizer's own size where that is larger. threads: OMP_NUM_THREADS of
    every process. per_slot: requests per request in flight, at least min_requests in all.
    """

    hidden: int = 384
    intermediate: int = 1024
    layers: int = 10
    heads: int = 6
    vocabulary: int = 8192
    positions: int = 512
    prompt_min: int = 16
    prompt_max: int = 96
    answer_min: int = 32
    answer_max: int = 96
    per_slot: int = 3
    min_requests: int = 8
    short_trials: int = 8
    soak_answer: int = 16
    batcher_size: int = 64
    batcher_delay_us: int = 10_000
    threads: int = 1
    seed: int = 0


QUICK = replace(
    Settings(),
    hidden=32,
    intermediate=64,
    layers=2,
    heads=2,
    vocabulary=400,
    prompt_min=8,
    prompt_max=16,
    answer_min=6,
    answer_max=10,
    per_slot=2,
    min_requests=4,
    short_trials=3,
    soak_answer=4,
)
PRESETS = {"cpu": Settings(), "quick": QUICK}


@dataclass(frozen=True)
class Request:
    """One request: a text, its length, and how many tokens are asked for. Greedy."""

    prompt: str
    prompt_tokens: int
    answer_tokens: int


@dataclass
class Sample:
    """What came of one request. Seconds on one clock: `sent`, one time an event that held text, `ended`.

    index: of the request in its measurement.
    """

    sent: float
    index: int = 0
    ended: float = 0.0
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    error: str | None = None


def read_requests(path: Path) -> list[Request]:
    """The requests of a run, in the order in which every side gets them."""
    return [Request(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def count_for(settings: Settings, concurrency: int) -> int:
    """Requests of one measurement at this concurrency: the first ones of the list."""
    return max(settings.min_requests, settings.per_slot * concurrency)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile, linear between neighbours (numpy's default); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def gaps(sample: Sample) -> list[float]:
    """Seconds between successive events of one answer."""
    return [after - before for before, after in zip(sample.events, sample.events[1:], strict=False)]


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """{"p50", "p95", "p99"} in milliseconds, of seconds."""
    seconds = list(values)
    found = {f"p{q}": percentile(seconds, q) for q in PERCENTILES}
    return {name: None if value is None else 1000 * value for name, value in found.items()}


def statistics(samples: Sequence[Sample], streamed: bool = True) -> dict[str, Any]:
    """Rates over the time from the first request's sending to the last one's end, and latencies in ms.

    ttft: to the first event with text; itl: between successive events of one answer; tpot: per answer, first
    to last event over the tokens after the first; latency: to the end. streamed False: only latency.
    """
    good = [sample for sample in samples if sample.error is None]
    errors = sorted({sample.error for sample in samples if sample.error is not None})
    seconds = max(s.ended for s in samples) - min(s.sent for s in samples)
    tokens = sum(sample.tokens for sample in good)
    events = sum(len(sample.events) for sample in good)
    found: dict[str, Any] = {
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "messages": errors[:5],
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "latency_ms": spread(sample.ended - sample.sent for sample in good),
    }
    if streamed:
        long = [sample for sample in good if len(sample.events) > 1 and sample.tokens > 1]
        found["events_per_token"] = events / tokens if tokens else None
        found["ttft_ms"] = spread(sample.events[0] - sample.sent for sample in good if sample.events)
        found["itl_ms"] = spread(gap for sample in good for gap in gaps(sample))
        found["tpot_ms"] = spread((s.events[-1] - s.events[0]) / (s.tokens - 1) for s in long)
    return found


def middle(runs: Sequence[Any]) -> Any:
    """Medians over repeats of equal shape: numbers by numbers, None and texts taken from the first."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: middle([run[key] for run in runs]) for key in first}
    numbers = [run for run in runs if isinstance(run, int | float)]
    return median(numbers) if numbers else first


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y)."""
    x_mean, y_mean = mean(x for x, _ in points), mean(y for _, y in points)
    spread_x = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread_x
