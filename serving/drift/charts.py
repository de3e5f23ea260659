"""Two small charts in SVG: reference beside today. Colours are classes of the page's style sheet."""

from __future__ import annotations

from html import escape

from markupsafe import Markup

from serving.drift.compare import Finding

WIDTH, HEIGHT, FLOOR = 420, 190, 160
ROW, LABEL, SHOWN = 34, 110, 10


def histogram(finding: Finding) -> Markup:
    """Shares in equal cells: the reference as an area, today as bars over it."""
    edges, before, now = (finding.chart[key] for key in ("labels", "reference", "today"))
    top = max(*before, *now)
    step = (WIDTH - 20) / len(before)
    body = []
    for i, (old, new) in enumerate(zip(before, now, strict=True)):
        x, tip = 10 + i * step, f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {old:.1%} before, {new:.1%} now"
        for share, css, left, width in ((old, "before", x, step), (new, "now", x + step / 4, step / 2)):
            height = (FLOOR - 10) * share / top
            body.append(_rect(left, FLOOR - height, width, height, css, tip))
    for i in (0, len(before) // 2, len(before)):
        anchor = {0: "start", len(before): "end"}.get(i, "middle")
        body.append(_text(10 + i * step, FLOOR + 18, f"{edges[i]:.4g}", anchor))
    return _svg(body, HEIGHT, f"{finding.feature}: {finding.reference} before, {finding.today} now")


def bars(finding: Finding) -> Markup:
    """A pair of bars for each label, the most frequent ones of both sides first, ten at most."""
    rows = list(zip(*(finding.chart[key] for key in ("labels", "reference", "today")), strict=True))
    rows = sorted(rows, key=lambda row: -max(row[1:]))[:SHOWN]
    longest = max(max(row[1:]) for row in rows)
    room, body = WIDTH - LABEL - 60, []
    for i, (label, old, new) in enumerate(rows):
        y = 6 + i * ROW
        body.append(_text(LABEL - 8, y + 18, str(label)[:16], "end"))
        for share, css, offset in ((old, "before", 0), (new, "now", 13)):
            width = room * share / longest
            body.append(_rect(LABEL, y + offset, width, 11, css, f"{label}: {share:.1%}"))
            body.append(_text(LABEL + width + 5, y + offset + 10, f"{share:.1%}", "start"))
    return _svg(body, 6 + len(rows) * ROW, f"{finding.feature}: {finding.reference} before")


def _rect(x: float, y: float, width: float, height: float, css: str, tip: str) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {size} class="{css}"><title>{escape(tip)}</title></rect>'


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _svg(body: list[str], height: float, label: str) -> Markup:
    said = escape(label, quote=True)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{said}">{"".join(body)}</svg>'
    )
