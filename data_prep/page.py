"""report.html of a dataset directory: one page without network and scripts. All data are escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.card import MEANING, balance, source_details
from data_prep.dataset import SPLITS
from data_prep.figures import Figures, label, share_interval, source_file
from data_prep.operations.report import report_section
from data_prep.plots import bars, differences, figure, histogram, mixture, most
from data_prep.records import Kind, excerpt

if TYPE_CHECKING:
    from data_prep.ingest import Reject

SAMPLES = 9
SAMPLE_CHARS = 1500
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1d2530; --muted: #5d6876;
  --line: #e3e5e9; --soft: #f1f2f4; --c0: #8b95a3; --c1: #2b6cb0; --c2: #d4702c; --c3: #2c8a68; --c4: #7656a4;
  --c5: #b08d24 }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1a2027; --ink: #e5e9ee;
  --muted: #9aa5b2; --line: #2c343e; --soft: #222932; --c0: #8f9aa8; --c1: #6aa9ea; --c2: #f0975a;
  --c3: #5fc39c; --c4: #b295e0; --c5: #dbb957 } }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 66rem; margin: 2rem auto;
  padding: 0 1rem; background: var(--page); color: var(--ink) }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.4rem } h3 { font-size: 1rem }
table { border-collapse: collapse; width: 100% } .wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: .9em; overflow-wrap: anywhere }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; min-width: 0; max-width: 34rem } figure.full { grid-column: 1 / -1; max-width: none }
.title { font-weight: 600 } figcaption { font-size: .88em; color: var(--muted) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; margin: .3rem 0; padding: 0 }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px }
.k0 { background: var(--c0) } .k1 { background: var(--c1) } .k2 { background: var(--c2) }
.k3 { background: var(--c3) } .k4 { background: var(--c4) } .k5 { background: var(--c5) }
svg { display: block; max-width: 100%; height: auto } figure svg { width: 100% }
svg .c0 { --c: var(--c0) } svg .c1 { --c: var(--c1) } svg .c2 { --c: var(--c2) }
svg .c3 { --c: var(--c3) } svg .c4 { --c: var(--c4) } svg .c5 { --c: var(--c5) }
svg text { font-size: 12px; fill: currentColor } svg .t { fill: var(--muted) }
svg .strong { fill: var(--ink) } svg .grid { stroke: var(--line) } svg .axis { stroke: var(--muted) }
svg .fill { fill: var(--c) } svg .gap { stroke: var(--card) } svg.waterfall rect { fill: var(--c1) }
.turn { border-left: 3px solid var(--c0); background: var(--soft); padding: .3rem .7rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere } .turn b { display: block; font-size: .8em; opacity: .7 }
.turn.assistant, .turn.chosen, .turn.desirable { border-color: var(--c3) }
.turn.rejected, .turn.undesirable { border-color: var(--c2) }
.samples > label { display: inline-block; margin: .2rem 1rem .2rem .2rem }
"""


def sample_places(rows: int, count: int = SAMPLES) -> list[int]:
    """Places, from 0, of the `count` rows that are shown of `rows`: evenly spread."""
    count = min(count, rows)
    return [index * rows // count for index in range(count)]


def report_html(
    info: Mapping[str, Any],
    figures: Figures,
    samples: Sequence[Mapping[str, Any]],
    first_drops: Mapping[str, Reject],
    drop_counts: Mapping[str, int],
) -> str:
    """report.html: counts, drops with an example each, plots, samples by source.

    info: dataset.json. samples: rows as in the dataset directory. first_drops, drop_counts: by reason, in the
    order in which the reasons first came up.
    """
    kind, kept = figures.kind, info["rows_out"]
    sources = _table(
        ("source", "format", "rows read", "sha256", "settings"),
        [
            (at["name"], at["format"], at["rows"], at["sha256"][:16], source_details(at))
            for at in info["sources"]
        ],
    )
    sides = _table(("side", "rows", "groups"), [(s, kept[s], info["split"]["groups"][s]) for s in SPLITS])
    drops = _drops(info["rows_in"], first_drops, drop_counts) + report_section(info)
    gone = sum(drop_counts.values())
    body = f"""<h1>Data set: {html.escape(kind)}</h1>
<p>{info["rows_in"]:,} rows in,{_repeated(info)} {sum(kept.values()):,} out, {gone:,} dropped.
{html.escape(MEANING[kind].capitalize())}.<br>
Content hash <code>{html.escape(info["content_hash"])}</code></p>
{sides}
<h2>Sources</h2>
{sources}{_section("", _mixture(info, figures))}
<h2>Dropped</h2>
{drops}{_section("Duplicates", _duplicates(info))}{_section("Decontamination", _contamination(info))}
<h2>Lengths</h2>
{_section("", _lengths(figures))}{_bias(info, figures)}{_section("Languages", _languages(figures))}
{_section("Personal data", _personal(info, figures, drop_counts))}
<h2>Samples</h2>
{_samples(kind, samples)}"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data set: {html.escape(kind)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<main>{body}\n</main></body></html>\n"
    )


def _section(title: str, figures: Sequence[str]) -> str:
    """Nothing without a figure."""
    head = f"\n<h2>{title}</h2>" if title else ""
    return f'{head}\n<div class="figures">{"".join(figures)}</div>' if figures else ""


def _repeated(info: Mapping[str, Any]) -> str:
    """How many rows mixing added, so that in + repeated = out + dropped; nothing where none."""
    count = info.get("rows_repeated")
    return f" {count:,} repeated," if count else ""


def _operations(info: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [at for at in info.get("operations", ()) if at["op"] == name]


def _mixture(info: Mapping[str, Any], figures: Figures) -> list[str]:
    """Shares by side, by the sources' names in the configuration or else by file; what mix aimed at."""
    sides: dict[str, dict[str, float]]
    if "mixture" in info:
        sides = {side: {name: at["share"] for name, at in info["mixture"][side].items()} for side in SPLITS}
    else:
        sides = {
            side: {name: count / figures.rows[side] for name, count in figures.sources[side].items()}
            for side in SPLITS
        }
    if len({name for parts in sides.values() for name in parts}) < 2:
        return []
    caption = ""
    for at in _operations(info, "mix"):
        weights = at["settings"].get("weights")
        if weights:
            sides["target"] = {name: weight / sum(weights.values()) for name, weight in weights.items()}
            caption = "Target: the weights of mix. Quotas and caps on epochs may keep a source below it."
    return [figure("Rows by source", mixture(sides), caption, "full")]


def _duplicates(info: Mapping[str, Any]) -> list[str]:
    found = []
    for at in info.get("operations", ()):
        sizes = at["facts"].get("cluster_sizes")
        if not sizes:
            continue
        rows = [(f"{size} rows", count, 1) for size, count in _by_size(sizes)]
        drawing = bars(rows, f"clusters of {at['op']} by size", "clusters")
        caption = f"{sum(sizes.values()):,} clusters, {at['facts']['rows_in_clusters']:,} rows in them."
        found.append(figure(f"Clusters of {at['op']} by size", drawing, caption))
        largest = [(one["first"], one["rows"], 4) for one in at["facts"].get("largest_clusters", ())]
        if largest:
            drawing = bars(largest, f"largest clusters of {at['op']}")
            found.append(figure("Largest clusters, by their first row", drawing))
    return found


def _by_size(sizes: Mapping[str, int], shown: int = 12) -> list[tuple[str, int]]:
    """Clusters by size, from the smallest on; where there are many sizes, the largest are one bar."""
    ordered = [(int(size), count) for size, count in sizes.items()]
    ordered.sort()
    rest = sum(count for _, count in ordered[shown:])
    more = [(f"{ordered[shown][0]} or more", rest)] if rest else []
    return [*((str(size), count) for size, count in ordered[:shown]), *more]


def _contamination(info: Mapping[str, Any]) -> list[str]:
    found = []
    for at in _operations(info, "decontaminate"):
        sets = ", ".join(at["settings"]["against"])
        rows = [(reason, count, 2) for reason, count in at["drops"].items()]
        rows += [(note.split(", in ")[0], count, 4) for note, count in at["notes"].items()]
        said = f"Against {sets}. Rows near an item are kept, and listed in review.jsonl for a reader."
        if rows:
            found.append(figure("Rows flagged", bars(rows, f"rows flagged against {sets}"), said))
        else:
            found.append(figure("Rows flagged", "<p>None.</p>", said))
    return found


def _lengths(figures: Figures) -> list[str]:
    found = [histogram(name, "characters", counts) for name, counts in figures.parts().items()]
    if figures.tokens:
        found.append(histogram("whole row", "tokens", figures.tokens))
    if len(figures.turns) > 1:
        found.append(
            histogram("dialogue" if figures.kind == "conversation" else "prompt", "turns", figures.turns)
        )
    return found


def _bias(info: Mapping[str, Any], figures: Figures) -> str:
    said = "".join(f"<p>{line}</p>" for line in balance(info) if line)
    if figures.kind != "preference":
        return said
    longer = sum(count for value, count in figures.differences.items() if value > 0)
    unlike = figures.differences.total() - figures.differences[0]
    if unlike:
        low, high = share_interval(longer, unlike)
        said += (
            f"<p>Of the {unlike:,} pairs with answers of unlike length the chosen one is longer in "
            f"{longer / unlike:.1%} (95 % interval {low:.1%} to {high:.1%}).</p>"
        )
    return f"\n<h2>Length bias of the pairs</h2>\n{said}{_section('', [differences(figures.differences)])}"


def _languages(figures: Figures) -> list[str]:
    if not figures.languages:
        return []
    rows = [(name, count, 1) for name, count in most(figures.languages)]
    return [figure("Rows by language", bars(rows, "rows by language"), "As tagged; und: undetermined.")]


def _personal(info: Mapping[str, Any], figures: Figures, drops: Mapping[str, int]) -> list[str]:
    operations = _operations(info, "pii")
    if not operations:
        return []
    actions = {at["settings"]["action"] for at in operations}
    redacted = actions == {"redact"}
    title = "Findings by type, redacted" if redacted else "Findings by type, left in the rows"
    said = "What has no form of its own, as names and addresses, is not found."
    if drops.get("personal_data"):
        said = f"{drops['personal_data']:,} rows with personal data were dropped. {said}"
    if not figures.pii_values:
        return [figure("Findings by type", "<p>None in the rows that are left.</p>", said)]
    rows = [(name, count, 3 if redacted else 2) for name, count in most(figures.pii_values)]
    most_rows = ", ".join(f"{name} in {count:,}" for name, count in most(figures.pii_rows, 20))
    return [figure(title, bars(rows, "personal data by type", "findings"), f"Rows: {most_rows}. {said}")]


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


def _samples(kind: Kind, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as turns, with a choice of source that needs no script: style rules hide the others."""
    sources = list(dict.fromkeys(source_file(row["source"]) for row in rows))
    shown = "".join(_sample(kind, row, sources.index(source_file(row["source"]))) for row in rows)
    if len(sources) < 2:
        return f'<div class="samples">{shown}</div>'
    chosen = "".join(
        f'<input type="radio" name="source" id="f{index}"{"" if index else " checked"}>'
        f'<label for="f{index}">{html.escape(name)}</label>'
        for index, name in enumerate(["all sources", *sources])
    )
    rules = "".join(
        f"#f{index}:checked ~ article:not(.s{index - 1}) {{ display: none }}\n"
        for index in range(1, len(sources) + 1)
    )
    return f'<style>{rules}</style><div class="samples">{chosen}{shown}</div>'


def _sample(kind: Kind, row: Mapping[str, Any], source: int) -> str:
    turns: list[tuple[str, str]] = [("text", row["text"])] if kind == "text" else []
    for name in ("messages", "prompt"):
        turns += [(turn["role"], turn["content"]) for turn in row.get(name, ())]
    for name in ("chosen", "rejected", "completion"):
        title = label(row) if name == "completion" and name in row else name
        turns += [(title, turn["content"]) for turn in row.get(name, ())]
    shown = "".join(
        f'<div class="turn {title}"><b>{title}</b>{html.escape(_shorten(text))}</div>'
        for title, text in ((html.escape(title), text) for title, text in turns)
    )
    head = f"<h3><code>{html.escape(row['id'])}</code> from {html.escape(row['source'])}</h3>"
    return f'<article class="s{source}">{head}{shown}</article>'


def _shorten(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " ..."
