"""The data card (Markdown) and the report (one HTML page without a network) of a dataset directory."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.dataset import SPLITS
from data_prep.figures import Counts, Figures, label, quantile
from data_prep.operations.report import card_lines, report_section
from data_prep.records import Kind, excerpt

if TYPE_CHECKING:
    from data_prep.ingest import Reject

SAMPLES = 3
SAMPLE_CHARS = 1500
BINS = 24
_MEANING = {
    "text": "plain documents",
    "conversation": "demonstrations: dialogues ending with the assistant's answer",
    "preference": "a prompt with a chosen and a rejected answer",
    "unpaired_preference": "a prompt with one answer, labelled desirable or undesirable",
    "prompt": "prompts waiting for an answer",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #3b82c4; --soft: #8881 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } .wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: .9em; overflow-wrap: anywhere }
figure { display: inline-block; margin: 0 1.5rem 1rem 0 } figcaption { font-size: .9em }
svg rect { fill: var(--bar) } svg text { font-size: 10px; fill: currentColor }
.turn { border-left: 3px solid var(--bar); background: var(--soft); padding: .3rem .7rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere } .turn b { display: block; font-size: .8em; opacity: .7 }
"""


def card_markdown(info: dict[str, Any]) -> str:
    """card.md: what the data set is, its sources, what was dropped, how it was split, what to mind."""
    split, rows = info["split"], info["rows_out"]
    sources = [
        f"| {_cell(at['name'])} | {at['format']} | {at['rows']:,} | `{at['sha256'][:16]}` "
        f"| {_cell(_details(at))} |"
        for at in info["sources"]
    ]
    drops = [
        f"| {reason} | {count:,} | {count / info['rows_in']:.2%} |" for reason, count in info["drops"].items()
    ]
    lengths = [
        f"| {name} | {at['min']:,} | {at['p50']:,} | {at['p95']:,} | {at['max']:,} |"
        for name, at in info["lengths"].items()
        if isinstance(at, dict)
    ]
    lines = [
        f"# Data card: {info['kind']}",
        "",
        f"{rows['train'] + rows['eval']:,} rows of kind `{info['kind']}` ({_MEANING[info['kind']]}), made "
        f"from {info['rows_in']:,} rows read. Content hash `{info['content_hash']}`.",
        "",
        "| side | rows | groups |",
        "|---|---:|---:|",
        *(f"| {side} | {rows[side]:,} | {split['groups'][side]:,} |" for side in SPLITS),
        "",
        "## Sources",
        "",
        "| source | format | rows read | sha256 | settings |",
        "|---|---|---:|---|---|",
        *sources,
        "",
        "## Dropped",
        "",
        *(["| reason | rows | share |", "|---|---:|---:|", *drops] if drops else ["Nothing."]),
        "",
        "Every dropped row is in `rejects.jsonl` with its file, line and reason.",
        "",
        "## Split",
        "",
        f"By {split['by']}: sha256 of the salt `{split['salt']}` and the group; the lowest "
        f"{100 * split['eval_fraction']:g} % of all values go to eval. A group is never on both sides, and "
        "lands on the same side in every data set with this salt and fraction.",
        "",
        *_shortened(info),
        *card_lines(info),
        "## Lengths in characters",
        "",
        "| part | min | median | 95 % | max |",
        "|---|---:|---:|---:|---:|",
        *lengths,
        *_balance(info),
        "",
        "## What was not done",
        "",
        _not_done(info),
        "",
        "## Reading it",
        "",
        "```python",
        "from data_prep.dataset import read_split",
        "",
        f'train = read_split("this/directory", "train", "{info["kind"]}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _repeated(info: dict[str, Any]) -> str:
    """How many rows mixing added, so that in + repeated = out + dropped; nothing where none."""
    count = info.get("rows_repeated")
    return f" {count:,} repeated," if count else ""


_SEARCHES = {
    "near_duplicates": "near-duplicates",
    "pii": "personal data",
    "toxicity": "toxic text",
    "decontaminate": "overlap with evaluation sets",
}


def _not_done(info: dict[str, Any]) -> str:
    if "operations" not in info:
        off = "" if info["dedup"] else " (switched off here)"
        return (
            f"Only exact duplicates were looked for{off}. There was no search for near-duplicates, personal "
            "data, toxic text, licences or overlap with evaluation sets."
        )
    done = {operation["op"] for operation in info["operations"]}
    missing = [what for name, what in _SEARCHES.items() if name not in done]
    searched = f"There was no search for {', '.join(missing)}. " if missing else ""
    return (
        f"{searched}What the operations that ran cannot find is in docs/curation.md: paraphrases of "
        "evaluation items, names and addresses of people, near-duplicates in other words."
    )


def _shortened(info: dict[str, Any]) -> list[str]:
    if info["last_user_turns"] is None:
        return []
    return [
        "## Shortened",
        "",
        f"Dialogues begin with the last {info['last_user_turns']} turns of the user; what came before was "
        "cut, after the split group was taken from the whole dialogue.",
        "",
    ]


def _balance(info: dict[str, Any]) -> list[str]:
    lengths = info["lengths"]
    if "desirable_share" in lengths:
        return ["", f"{lengths['desirable_share']:.1%} of the answers are labelled desirable."]
    if "chosen_longer" not in lengths:
        return []
    return ["", f"The chosen answer is the longer one in {lengths['chosen_longer']:.1%} of the pairs."]


def _details(source: dict[str, Any]) -> str:
    known = ("name", "format", "rows", "sha256")
    details = {key: value for key, value in source.items() if key not in known}
    return json.dumps(details, ensure_ascii=False) if details else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def report_html(
    info: dict[str, Any],
    figures: Figures,
    samples: Sequence[Mapping[str, Any]],
    first_drops: Mapping[str, Reject],
    drop_counts: Mapping[str, int],
) -> str:
    """report.html: counts, drops with an example each, length histograms, samples. All data are escaped.

    samples: rows as in the dataset directory. first_drops, drop_counts: by reason, in the order in which the
    reasons first came up.
    """
    kind = info["kind"]
    kept = info["rows_out"]
    plots = "".join(_histogram(name, counts) for name, counts in figures.parts().items())
    bias = "".join(f"<p>{line}</p>" for line in _balance(info) if line)
    shown = "".join(_sample(kind, row) for row in samples)
    sources = _table(
        ("source", "format", "rows read", "sha256", "settings"),
        [(at["name"], at["format"], at["rows"], at["sha256"][:16], _details(at)) for at in info["sources"]],
    )
    sides = _table(("side", "rows", "groups"), [(s, kept[s], info["split"]["groups"][s]) for s in SPLITS])
    drops = _drops(info["rows_in"], first_drops, drop_counts) + report_section(info)
    gone = sum(info["drops"].values())
    body = f"""<h1>Data set: {html.escape(kind)}</h1>
<p>{info["rows_in"]:,} rows in,{_repeated(info)} {sum(kept.values()):,} out, {gone:,} dropped.
{html.escape(_MEANING[kind].capitalize())}.<br>
Content hash <code>{html.escape(info["content_hash"])}</code></p>
{sides}
<h2>Sources</h2>
{sources}
<h2>Dropped</h2>
{drops}
<h2>Lengths in characters</h2>
{plots}{bias}
<h2>Samples</h2>
{shown}"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data set: {html.escape(kind)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _drops(rows_in: int, first: Mapping[str, Reject], counts: Mapping[str, int]) -> str:
    if not counts:
        return "<p>Nothing.</p>"
    rows = []
    for reason, count in sorted(counts.items(), key=lambda at: -at[1]):
        at = first[reason]
        rows.append((reason, count, f"{count / rows_in:.2%}", f"{at.file}:{at.line}", excerpt(at.detail)))
    return _table(("reason", "rows", "share", "first at", "why"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{html.escape(str(value))}</td>"

    numeric = [isinstance(value, int) for value in rows[0]]
    head = "".join(
        f'<th class="n">{name}</th>' if number else f"<th>{name}</th>"
        for name, number in zip(header, numeric, strict=True)
    )
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def sample_places(rows: int, count: int = SAMPLES) -> list[int]:
    """Places, from 0, of the `count` rows that are shown of `rows`: evenly spread."""
    count = min(count, rows)
    return [index * rows // count for index in range(count)]


def _sample(kind: Kind, row: Mapping[str, Any]) -> str:
    turns: list[tuple[str, str]] = [("text", row["text"])] if kind == "text" else []
    for name in ("messages", "prompt"):
        turns += [(turn["role"], turn["content"]) for turn in row.get(name, ())]
    for name in ("chosen", "rejected", "completion"):
        title = label(row) if name == "completion" and name in row else name
        turns += [(title, turn["content"]) for turn in row.get(name, ())]
    shown = "".join(
        f'<div class="turn"><b>{html.escape(title)}</b>{html.escape(_shorten(text))}</div>'
        for title, text in turns
    )
    return f"<h3><code>{html.escape(row['id'])}</code> from {html.escape(row['source'])}</h3>{shown}"


def _shorten(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " ..."


def _histogram(name: str, lengths: Counts) -> str:
    """Bars over BINS equal bins up to the 99th percentile; the last bin also takes what is longer."""
    low, high = min(lengths), quantile(lengths, 0.99)
    width = max((high - low) / BINS, 1)
    counts = [0] * BINS
    for value, count in lengths.items():
        counts[min(int((value - low) / width), BINS - 1)] += count
    scale = 80 / max(counts)
    bars = "".join(
        f'<rect x="{index * 12}" y="{90 - count * scale:.1f}" width="11" height="{count * scale:.1f}">'
        f"<title>from {low + index * width:,.0f}: {count:,} rows</title></rect>"
        for index, count in enumerate(counts)
        if count
    )
    said = html.escape(name)
    return (
        '<figure><svg viewBox="0 0 288 104" width="288" height="104" role="img" '
        f'aria-label="lengths of {said}">{bars}<text x="0" y="102">{low:,}</text>'
        f'<text x="288" y="102" text-anchor="end">{low + BINS * width:,.0f}+</text></svg>'
        f"<figcaption>{said}: median {quantile(lengths, 0.5):,}, longest {max(lengths):,}</figcaption>"
        "</figure>"
    )
