"""SVG by hand: elements, axes and ticks. Small, the same on every run, coloured by the page's style sheet.

Every function returns markup in which all text is escaped. Colours are classes (`c0` to `c5`), so the
figures follow the page into dark mode. Sizes are in SVG units; the page scales a figure to its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 40
COLOURS = 6


@dataclass(frozen=True)
class Axes:
    """Data limits and the mapping to SVG units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = BOTTOM
    x_ticks: Sequence[float] = field(default_factory=list)
    y_ticks: Sequence[float] = field(default_factory=list)

    def px(self, x: float) -> float:
        return self.left + (x - self.x_low) / (self.x_high - self.x_low) * (
            self.width - self.left - self.right
        )

    def py(self, y: float) -> float:
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - (y - self.y_low) / (self.y_high - self.y_low) * inner


def number(value: float, digits: int = 3) -> str:
    """A number as a person writes it: a few significant digits, thousands as k, no trailing zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.{digits}g}k"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 1e-3 else digits}g}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high]; the first is <= low and the last >= high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def svg(body: Sequence[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """The outer element; `label` is what a screen reader says."""
    size = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'


def text(x: float, y: float, content: str, css: str = "t", anchor: str = "start", extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'
    )


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "", radius: float = 0) -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="{radius:g}"'
    return f'<rect {size} class="{css}">{title}</rect>'


def segment(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def dot(x: float, y: float, radius: float, css: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}">{title}</circle>'


def path(points: Sequence[tuple[float, float]], css: str) -> str:
    steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{css}"/>'


def frame(axes: Axes, x_label: str, y_label: str) -> list[str]:
    """Grid lines, tick labels and axis titles."""
    right, floor = axes.width - axes.right, axes.height - axes.bottom
    body = []
    for y in axes.y_ticks:
        body.append(segment(axes.left, axes.py(y), right, axes.py(y), "grid"))
        body.append(text(axes.left - 6, axes.py(y) + 4, number(y, 4), "t", "end"))
    for x in axes.x_ticks:
        body.append(segment(axes.px(x), floor, axes.px(x), floor + 4, "axis"))
        body.append(text(axes.px(x), floor + 16, number(x, 4), "t", "middle"))
    body.append(segment(axes.left, floor, right, floor, "axis"))
    body.append(text((axes.left + right) / 2, axes.height - 6, x_label, "t label", "middle"))
    middle = (axes.top + floor) / 2
    turn = f' transform="rotate(-90 12 {middle:.1f})"'
    body.append(text(12, middle, y_label, "t label", "middle", turn))
    return body


def fitted_axes(
    x: Sequence[float], y: Sequence[float], include_y: Sequence[float] = (), width: float = WIDTH
) -> Axes:
    """Axes around the data: the x axis ends at the data, the y axis at round numbers."""
    y_ticks = nice_ticks(min([*y, *include_y]), max([*y, *include_y]))
    x_low, x_high = min(x), max(x)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    x_ticks = [
        tick for tick in nice_ticks(x_low, x_high, 5 if width < WIDTH else 6) if x_low <= tick <= x_high
    ]
    return Axes(x_low, x_high, y_ticks[0], y_ticks[-1], width, x_ticks=x_ticks, y_ticks=y_ticks)
