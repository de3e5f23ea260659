"""Figures of report.html as SVG: histograms and bars of counts. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from data_prep.figures import Counts, quantile
from posttrain.charts import stacked_bars
from posttrain.svg import Axes, frame, nice_ticks, number, rect, segment, svg, text

BINS = 24
SKEWED = 8
"""The axis is logarithmic where the 99 % quantile is more than so many times the median."""
SHOWN_BARS = 12
SHOWN_SOURCES = 5


def figure(title: str, drawing: str, caption: str = "", css: str = "") -> str:
    """A titled figure. drawing: markup; title and caption: text."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{css}"><div class="title">{escape(title)}</div>{drawing}{below}</figure>'


def histogram(name: str, unit: str, counts: Counts) -> str:
    """Rows by length, up to the 99 % quantile; the last bar also takes what is longer."""
    middle, high = quantile(counts, 0.5), quantile(counts, 0.99)
    logarithmic = high > SKEWED * max(middle, 1)
    edges = _edges(min(counts), high, logarithmic)
    bars = [0] * (len(edges) - 1)
    for value, count in counts.items():
        place = sum(edge <= value for edge in edges[1:-1]) if value < edges[-1] else len(bars) - 1
        bars[place] += count
    title = f"{name}, in {unit}"
    caption = f"Median {middle:,}, longest {max(counts):,}."
    if max(counts) > high:
        caption += " The last bar also holds the longest 1 %."
    if logarithmic:
        caption += " Logarithmic axis."
    tips = [f"from {math.ceil(edges[i]):,}: {count:,} rows" for i, count in enumerate(bars)]
    drawing = _columns(edges, bars, tips, [1] * len(bars), unit, f"rows by length of {name}", logarithmic)
    return figure(title, drawing, caption)


def _edges(low: int, high: int, logarithmic: bool) -> list[float]:
    """Whole numbers wherever a bar would be narrower than 1."""
    if logarithmic:
        start = math.log(max(low, 1))
        step = (math.log(high + 1) - start) / BINS
        edges = sorted({round(math.exp(start + step * i)) for i in range(BINS + 1)})
        return [float(edge) for edge in edges]
    width = max(1, math.ceil((high + 1 - low) / BINS))
    return [float(low + width * i) for i in range(max(1, math.ceil((high + 1 - low) / width)) + 1)]


def differences(counts: Counts) -> str:
    """Pairs by how much longer the chosen answer is, in characters: bars on both sides of equal lengths."""
    reach = quantile(_absolute(counts), 0.99)
    width = max(1, math.ceil((reach + 0.5) / (BINS / 2)))
    places = math.ceil((reach + 0.5) / width)
    right = [0.5 + width * index for index in range(places + 1)]
    edges = [*(-edge for edge in reversed(right)), *right]
    bars = [0] * (len(edges) - 1)
    for value, count in counts.items():
        steps = min(math.ceil(abs(value) / width), places)
        bars[places + (steps if value > 0 else -steps)] += count
    colours = [2] * places + [0] + [1] * places
    tips = [_span(edges[i], edges[i + 1], count) for i, count in enumerate(bars)]
    label = "pairs by length of chosen less that of rejected"
    return figure(
        "Chosen less rejected, in characters",
        _columns(edges, bars, tips, colours, "characters", label, False),
        "Right of the middle the chosen answer is the longer one. The outer bars hold the last 1 %.",
    )


def _absolute(counts: Counts) -> dict[int, int]:
    found: dict[int, int] = {}
    for value, count in counts.items():
        found[abs(value)] = found.get(abs(value), 0) + count
    return found


def _span(low: float, high: float, count: int) -> str:
    first, last = math.ceil(low), math.floor(high)
    span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
    return f"{span}: {count:,} pairs"


def _columns(
    edges: Sequence[float],
    bars: Sequence[int],
    tips: Sequence[str],
    colours: Sequence[int],
    x_label: str,
    label: str,
    logarithmic: bool,
) -> str:
    """Upright bars between the edges."""
    at = [math.log10(max(edge, 1)) for edge in edges] if logarithmic else list(edges)
    y_ticks = nice_ticks(0, max(bars))
    if logarithmic:
        marks = [10.0**p * m for p in range(10) for m in (1, 3) if edges[0] <= 10.0**p * m <= edges[-1]]
        x_ticks = [math.log10(mark) for mark in marks]
    else:
        x_ticks = [tick for tick in nice_ticks(at[0], at[-1], 6) if at[0] <= tick <= at[-1]]
    axes = Axes(at[0], at[-1], 0, y_ticks[-1], x_ticks=[] if logarithmic else x_ticks, y_ticks=y_ticks)
    body = frame(axes, x_label, "rows")
    if logarithmic:
        floor = axes.height - axes.bottom
        for mark, x in zip(marks, x_ticks, strict=True):
            body.append(segment(axes.px(x), floor, axes.px(x), floor + 4, "axis"))
            body.append(text(axes.px(x), floor + 16, number(mark, 4), "t", "middle"))
    for index, count in enumerate(bars):
        if count:
            left, right, top = axes.px(at[index]), axes.px(at[index + 1]), axes.py(count)
            height = axes.height - axes.bottom - top
            body.append(
                rect(left + 0.5, top, right - left - 1, height, f"fill c{colours[index]}", tips[index])
            )
    return svg(body, label)


def bars(rows: Sequence[tuple[str, int, int]], label: str, unit: str = "rows") -> str:
    """Horizontal bars of (name, count, colour), in the order given, with the counts written beside them."""
    row, width, left = 26, 460, 20 + 7 * min(max(len(name) for name, _, _ in rows), 24)
    height = 8 + row * len(rows)
    scale = (width - left - 70) / max(max(count for _, count, _ in rows), 1)
    body = []
    for index, (name, count, colour) in enumerate(rows):
        top = 4 + row * index
        short = name if len(name) <= 24 else name[:21] + "..."
        body.append(text(left - 8, top + 17, short, "t strong", "end"))
        tip = f"{name}: {count:,} {unit}"
        body.append(rect(left, top + 4, count * scale, row - 8, f"fill c{colour}", tip, 2))
        body.append(text(left + count * scale + 6, top + 17, f"{count:,}", "t"))
    return svg(body, label, width, height)


def most(counts: Mapping[str, int], shown: int = SHOWN_BARS) -> list[tuple[str, int]]:
    """The largest counts first, and the rest as one."""
    ordered = sorted(counts.items(), key=lambda at: (-at[1], at[0]))
    rest = sum(count for _, count in ordered[shown:])
    return [*ordered[:shown], *([(f"{len(ordered) - shown} others", rest)] if rest else [])]


def mixture(shares: Mapping[str, Mapping[str, float]]) -> str:
    """One stacked bar a row of `shares`: {row: {source: share of 1}}; the largest sources have a colour."""
    total: dict[str, float] = {}
    for parts in shares.values():
        for name, share in parts.items():
            total[name] = total.get(name, 0) + share
    named = sorted(total, key=lambda name: (-total[name], name))[:SHOWN_SOURCES]
    rows = []
    for title, parts in shares.items():
        rest = sum(share for name, share in parts.items() if name not in named)
        stack = [(name, 100 * parts.get(name, 0.0), index + 1) for index, name in enumerate(named)]
        rows.append((title, [*stack, *([("others", 100 * rest, 0)] if rest else [])]))
    keys = [f'<li><i class="k{index + 1}"></i>{escape(name)}</li>' for index, name in enumerate(named)]
    keys += ['<li><i class="k0"></i>others</li>'] if len(total) > len(named) else []
    drawing = stacked_bars(rows, "% of rows", "share of each source by side")
    return f'<ul class="legend">{"".join(keys)}</ul>{drawing}'
