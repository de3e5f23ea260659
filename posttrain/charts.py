"""Chart kinds of the reports, drawn with `posttrain.svg`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.svg import (
    BOTTOM,
    COLOURS,
    TOP,
    WIDTH,
    Axes,
    dot,
    fitted_axes,
    frame,
    nice_ticks,
    number,
    path,
    rect,
    segment,
    svg,
    text,
)

MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """A curve. `colour` indexes the palette; a faint one is drawn thin and without a smoothed twin."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A labelled point with optional error bars, each a (low, high) pair in data units."""

    label: str
    x: float
    y: float
    colour: int = 0
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bar:
    """A horizontal bar with its interval."""

    label: str
    value: float
    low: float
    high: float
    colour: int = 0


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means over equal runs of neighbours, the last point kept as it is."""
    if len(x) <= limit:
        return list(zip(x, y, strict=True))
    size = math.ceil((len(x) - 1) / (limit - 1))
    points = []
    for start in range(0, len(x) - 1, size):
        end = min(start + size, len(x) - 1)
        points.append((sum(x[start:end]) / (end - start), sum(y[start:end]) / (end - start)))
    return [*points, (x[-1], y[-1])]


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; the window shrinks at the ends."""
    half = window // 2
    result = []
    for i in range(len(y)):
        near = y[max(0, i - half) : i + half + 1]
        result.append(sum(near) / len(near))
    return result


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    label: str,
    guides: Sequence[tuple[float, str]] = (),
    width: float = WIDTH,
) -> str:
    """Curves over a shared axis. Noisy ones (over 30 points) are drawn pale with a moving mean on top.

    `guides` are horizontal dashed lines, each a value and its name.
    """
    drawn = [line for line in lines if line.x]
    axes = fitted_axes(
        [x for line in drawn for x in line.x],
        [y for line in drawn for y in line.y],
        [value for value, _ in guides],
        width,
    )
    body = frame(axes, x_label, y_label)
    for value, name in guides:
        body.append(segment(axes.left, axes.py(value), axes.width - axes.right, axes.py(value), "guide"))
        body.append(text(axes.width - axes.right - 4, axes.py(value) - 4, name, "t", "end"))
    for line in sorted(drawn, key=lambda one: not one.faint):
        points = thin(line.x, line.y)
        noisy = len(points) > 30
        css = f"line c{line.colour % COLOURS}" + (" dash" if line.dashed else "")
        if noisy:
            pale = [(axes.px(x), axes.py(y)) for x, y in points]
            if not line.faint:
                body.append(path(pale, css + " raw"))
            window = max(3, len(points) // 15)
            points = [
                (x, y) for (x, _), y in zip(points, smooth([y for _, y in points], window), strict=True)
            ]
        body.append(
            path([(axes.px(x), axes.py(y)) for x, y in points], css + (" faint" if line.faint else ""))
        )
        if not line.faint:
            tip = f"{line.label}: {number(line.y[-1])} at {number(line.x[-1])}"
            radius = 3.5 if len(points) == 1 else 2.5
            body.append(
                dot(
                    axes.px(points[-1][0]),
                    axes.py(points[-1][1]),
                    radius,
                    f"fill c{line.colour % COLOURS}",
                    tip,
                )
            )
    return svg(body, label, width)


def scatter(marks: Sequence[Mark], trails: Sequence[Line], x_label: str, y_label: str, label: str) -> str:
    """Points with error bars, named beside them, over trails of small dots joined in order."""
    xs = [m.x for m in marks] + [x for m in marks for x in m.x_range or ()] + [x for t in trails for x in t.x]
    ys = [m.y for m in marks] + [y for m in marks for y in m.y_range or ()] + [y for t in trails for y in t.y]
    x_ticks, y_ticks = nice_ticks(min([0.0, *xs]), max(xs), 6), nice_ticks(min(ys), max(ys))
    axes = Axes(
        x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], height=290, x_ticks=x_ticks, y_ticks=y_ticks
    )
    body = frame(axes, x_label, y_label)
    for trail in trails:
        css = f"c{trail.colour % COLOURS}"
        points = [(axes.px(x), axes.py(y)) for x, y in zip(trail.x, trail.y, strict=True)]
        body.append(path(points, f"line faint {css}"))
        for i, (x, y) in enumerate(points):
            tip = f"{trail.label}, step {i + 1}: {number(trail.x[i])}, {number(trail.y[i])}"
            body.append(dot(x, y, 2.2, f"fill pale {css}", tip))
    for mark in marks:
        body += _mark(axes, mark)
    return svg(body, label, height=290)


def _mark(axes: Axes, mark: Mark) -> list[str]:
    x, y, css = axes.px(mark.x), axes.py(mark.y), f"c{mark.colour % COLOURS}"
    body = []
    if mark.x_range is not None:
        body.append(segment(axes.px(mark.x_range[0]), y, axes.px(mark.x_range[1]), y, f"whisker {css}"))
    if mark.y_range is not None:
        body.append(segment(x, axes.py(mark.y_range[0]), x, axes.py(mark.y_range[1]), f"whisker {css}"))
    body.append(dot(x, y, 5.5, f"fill ring {css}", f"{mark.label}: {number(mark.x)}, {number(mark.y)}"))
    near_edge = x > axes.width - 70
    body.append(
        text(
            x + (-9 if near_edge else 9), y - 8, mark.label, "t strong halo", "end" if near_edge else "start"
        )
    )
    return body


def interval_bars(bars: Sequence[Bar], x_label: str, label: str, guide: float | None = None) -> str:
    """Horizontal bars from 0 with interval whiskers and the value written at the end."""
    row, left = 34, 20 + 7 * max(len(bar.label) for bar in bars)
    height = TOP + row * len(bars) + BOTTOM
    high = max([bar.high for bar in bars] + ([guide] if guide is not None else []))
    low = min([0.0] + [bar.low for bar in bars])
    ticks = nice_ticks(low, 1.0 if low >= 0 and 0.35 < high <= 1 else high)
    axes = Axes(ticks[0], ticks[-1], 0, 1, height=height, left=left, right=64, x_ticks=ticks)
    body = [segment(axes.px(tick), TOP, axes.px(tick), height - BOTTOM, "grid") for tick in ticks]
    body += frame(axes, x_label, "")
    for i, bar in enumerate(bars):
        y = TOP + row * i
        start, end = sorted((axes.px(0), axes.px(bar.value)))
        tip = f"{bar.label}: {number(bar.value)} ({number(bar.low)} to {number(bar.high)})"
        css = f"c{bar.colour % COLOURS}"
        body.append(rect(start, y + 6, end - start, row - 12, f"fill {css}", tip, 2))
        middle = y + row / 2
        body.append(segment(axes.px(bar.low), middle, axes.px(bar.high), middle, "whisker ink"))
        for edge in (bar.low, bar.high):
            body.append(segment(axes.px(edge), middle - 5, axes.px(edge), middle + 5, "whisker ink"))
        body.append(text(left - 8, middle + 4, bar.label, "t strong", "end"))
        body.append(text(axes.width - 4, middle + 4, f"{bar.value:.3g}", "t strong", "end"))
    if guide is not None:
        body.append(segment(axes.px(guide), TOP - 4, axes.px(guide), height - BOTTOM, "guide"))
    return svg(body, label, height=height)


def dot_rows(
    rows: Sequence[tuple[str, Sequence[Bar]]], x_label: str, label: str, width: float = WIDTH
) -> str:
    """One row per name, one dot with its interval per bar: compares several models over several parts."""
    row, left = 30, 20 + 7 * max(len(name) for name, _ in rows)
    height = TOP + row * len(rows) + BOTTOM
    ticks = nice_ticks(0.0, max(1.0, *(bar.high for _, bars in rows for bar in bars)))
    axes = Axes(ticks[0], ticks[-1], 0, 1, width, height, left=left, right=16, x_ticks=ticks)
    body = [segment(axes.px(tick), TOP, axes.px(tick), height - BOTTOM, "grid") for tick in ticks]
    body += frame(axes, x_label, "")
    for i, (name, bars) in enumerate(rows):
        middle = TOP + row * (i + 0.5)
        body.append(text(left - 8, middle + 4, name, "t strong", "end"))
        for j, bar in enumerate(bars):
            y = middle + (j - (len(bars) - 1) / 2) * min(8, 22 / len(bars))
            css = f"c{bar.colour % COLOURS}"
            tip = f"{name}, {bar.label}: {number(bar.value)} ({number(bar.low)} to {number(bar.high)})"
            body.append(segment(axes.px(bar.low), y, axes.px(bar.high), y, f"whisker {css}"))
            body.append(dot(axes.px(bar.value), y, 3.6, f"fill {css}", tip))
    return svg(body, label, width, height)


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], x_label: str, label: str
) -> str:
    """One horizontal bar per row, stacked from (part name, length, colour)."""
    row, left = 26, 20 + 7 * max(len(name) for name, _ in rows)
    height = TOP + row * len(rows) + BOTTOM
    totals = [sum(value for _, value, _ in parts) for _, parts in rows]
    ticks = nice_ticks(0.0, max(max(totals), 1e-9), 6)
    axes = Axes(0, ticks[-1], 0, 1, width=2 * WIDTH, height=height, left=left, right=56, x_ticks=ticks)
    body = [segment(axes.px(tick), TOP, axes.px(tick), height - BOTTOM, "grid") for tick in ticks]
    body += frame(axes, x_label, "")
    for i, (name, parts) in enumerate(rows):
        y, at = TOP + row * i, 0.0
        body.append(text(left - 8, y + row / 2 + 4, name, "t strong", "end"))
        for part, value, colour in parts:
            width = axes.px(at + value) - axes.px(at)
            tip = f"{name}, {part}: {number(value)}"
            body.append(rect(axes.px(at), y + 4, width, row - 8, f"fill gap c{colour % COLOURS}", tip))
            at += value
        body.append(text(axes.px(at) + 6, y + row / 2 + 4, number(totals[i]), "t", "start"))
    return svg(body, label, width=2 * WIDTH, height=height)


def reliability(
    curves: Sequence[tuple[str, Sequence[dict[str, float]], int]], x_label: str, y_label: str, label: str
) -> str:
    """Accuracy over confidence with the diagonal of perfect calibration; dots grow with the pairs in a bin.

    Each curve is a name, its bins (see posttrain.calibration.reliability_bins) and a palette index.
    """
    lowest = min([0.5] + [row["accuracy"] for _, rows, _ in curves for row in rows])
    y_ticks = nice_ticks(lowest, 1.0)
    axes = Axes(
        0.5, 1.0, y_ticks[0], y_ticks[-1], height=290, x_ticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0], y_ticks=y_ticks
    )
    body = frame(axes, x_label, y_label)
    body.append(segment(axes.px(0.5), axes.py(0.5), axes.px(1.0), axes.py(1.0), "guide"))
    for name, rows, colour in curves:
        css = f"c{colour % COLOURS}"
        body.append(
            path([(axes.px(row["confidence"]), axes.py(row["accuracy"])) for row in rows], f"line {css}")
        )
        total = sum(row["count"] for row in rows)
        for row in rows:
            said, right = number(row["confidence"]), number(row["accuracy"])
            tip = f"{name}: says {said}, right {right}, {row['count']} pairs"
            radius = round(2.5 + 9 * math.sqrt(row["count"] / total), 1)
            body.append(
                dot(axes.px(row["confidence"]), axes.py(row["accuracy"]), radius, f"fill ring {css}", tip)
            )
    return svg(body, label, height=290)


def histogram(counts: Sequence[int], edges: Sequence[float], x_label: str, y_label: str, label: str) -> str:
    """Counts per bin; bins wholly below zero are drawn in the warning colour."""
    x_ticks, y_ticks = nice_ticks(edges[0], edges[-1], 6), nice_ticks(0, max(counts))
    axes = Axes(x_ticks[0], x_ticks[-1], 0, y_ticks[-1], height=290, x_ticks=x_ticks, y_ticks=y_ticks)
    body = frame(axes, x_label, y_label)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        colour = 2 if high <= 0 else 1
        top = axes.py(count)
        tip = f"{number(low)} to {number(high)}: {count}"
        width = axes.px(high) - axes.px(low)
        body.append(rect(axes.px(low), top, width, axes.py(0) - top, f"fill gap c{colour}", tip))
    if edges[0] < 0 < edges[-1]:
        body.append(segment(axes.px(0), axes.top, axes.px(0), axes.py(0), "guide"))
    return svg(body, label, height=290)
