"""What card.md and report.html say of the operations: rows left after each, drops with examples, figures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 520
ROW = 26


def waterfall(info: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """(what, rows dropped, rows repeated, rows left) from reading to the last operation and the split.

    Empty without operations. Every line's rows left are those of the line before, plus repeated, less
    dropped.
    """
    operations = info.get("operations")
    if not operations:
        return []
    first = operations[0]["rows_in"]
    lines = [("read", 0, 0, info["rows_in"])]
    if first != info["rows_in"]:
        lines.append(("unusable, filters, dedup", info["rows_in"] - first, 0, first))
    for at in operations:
        lines.append((at["op"], sum(at["drops"].values()), at["repeated"], at["rows_out"]))
    out = sum(info["rows_out"].values())
    if out != lines[-1][3]:
        lines.append(("split", lines[-1][3] - out, 0, out))
    return lines


def card_lines(info: Mapping[str, Any]) -> list[str]:
    """Lines of card.md: the waterfall, what each operation dropped, changed or found; sources, licences."""
    if "operations" not in info:
        return []
    steps = waterfall(info)
    if not steps:
        return _mixture(info)
    lines = ["## Operations", "", "| step | dropped | repeated | rows left |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {gone:,} | {more:,} | {left:,} |" for what, gone, more, left in steps]
    for number, at in enumerate(info["operations"], start=1):
        lines += ["", f"{number}. `{at['op']}` {_inline(at['settings'])}"]
        lines += [f"   - dropped {count:,}: {reason}" for reason, count in at["drops"].items()]
        lines += [f"   - {count:,} rows: {note}" for note, count in at["notes"].items()]
        lines += [f"   - {name}: {_inline(value)}" for name, value in at["facts"].items()]
    return [*lines, "", *_mixture(info)]


def _mixture(info: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Sources and licences of the rows",
        "",
        "| source | side | rows | share |",
        "|---|---|---:|---:|",
    ]
    for side, shares in info["mixture"].items():
        lines += [
            f"| {table_cell(name)} | {side} | {at['rows']:,} | {at['share']:.4%} |"
            for name, at in shares.items()
        ]
    licences = info["licences"]
    rolled = ", ".join(f"{name} {rows:,} rows" for name, rows in licences["rows_by_licence"].items())
    lines += ["", f"Licences: {rolled}."]
    if not licences["commercial"]:
        lines[-1] += " Not all of them are known to allow commercial use."
    if licences["share_alike"]:
        lines[-1] += f" Share-alike: {', '.join(licences['share_alike'])}."
    return [*lines, ""]


def table_cell(text: str) -> str:
    """As the text of a cell of a Markdown table, on one line."""
    return text.replace("|", "\\|").replace("\n", " ")


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value, ensure_ascii=False)}`"


def report_section(info: Mapping[str, Any]) -> str:
    """The section of report.html, data escaped; empty without operations."""
    steps = waterfall(info)
    if not steps:
        return ""
    blocks = "".join(_operation(number, at) for number, at in enumerate(info["operations"], start=1))
    return f"<h2>Rows left after each operation</h2>\n{_bars(steps)}\n{blocks}"


def _bars(steps: Sequence[tuple[str, int, int, int]]) -> str:
    scale = WIDTH / max(max(left, left + gone) for _, gone, _, left in steps)
    parts = []
    for index, (what, gone, more, left) in enumerate(steps):
        top = index * ROW
        said = f"{left:,}" + (f" (-{gone:,})" if gone else "") + (f" (+{more:,})" if more else "")
        parts.append(
            f'<text x="0" y="{top + 15}">{html.escape(what)}</text>'
            f'<rect x="150" y="{top + 4}" width="{left * scale:.1f}" height="16"></rect>'
            f'<rect x="{150 + left * scale:.1f}" y="{top + 4}" width="{gone * scale:.1f}" height="16" '
            f'fill-opacity="0.25"><title>{gone:,} dropped</title></rect>'
            f'<text x="{156 + (left + gone) * scale:.1f}" y="{top + 15}">{said}</text>'
        )
    width, height = WIDTH + 290, len(steps) * ROW
    return (
        f'<div class="wide"><svg class="waterfall" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="rows left after each step">{"".join(parts)}</svg></div>'
    )


def _operation(number: int, at: Mapping[str, Any]) -> str:
    lines = [f"<li>{count:,} rows: {html.escape(note)}</li>" for note, count in at["notes"].items()]
    lines += [
        f"<li>{html.escape(name)}: <code>{html.escape(json.dumps(value, ensure_ascii=False))}</code></li>"
        for name, value in at["facts"].items()
    ]
    for reason, count in at["drops"].items():
        shown = "".join(
            f"<li><code>{html.escape(example['at'])}</code> {html.escape(example['detail'])}"
            f"<br>{html.escape(example['excerpt'])}</li>"
            for example in at["examples"].get(reason, ())
        )
        lines.append(f"<li>{count:,} dropped: {html.escape(reason)}<ul>{shown}</ul></li>")
    settings = html.escape(json.dumps(at["settings"], ensure_ascii=False))
    return (
        f"<h3>{number}. {html.escape(at['op'])}</h3><p><code>{settings}</code></p><ul>{''.join(lines)}</ul>\n"
    )
