"""What is wrong with a file, in words, the worst first; and everything about it as JSON values."""

from __future__ import annotations

from typing import Any, Literal

from data_prep.doctor.examine import REMEMBERED, Examined, languages

Severity = Literal["error", "warning", "note"]
LABEL_SHARE = 0.1
LENGTH_BIAS = 0.2
MEANING = {
    "roles_not_alternating": "turns of the user and the assistant do not alternate",
    "empty_content": "a turn or answer is empty",
    "identical_sides": "chosen and rejected are the same",
    "invalid_utf8": "bytes that are not UTF-8; of another encoding? then set read.encoding, e.g. latin-1",
    "last_turn_not_assistant": "there is no answer at the end",
    "malformed_json": "not JSON",
    "oversized_row": "larger than read.max_row_bytes",
    "ragged_row": "not as many cells as the header",
    "truncated_file": "the file breaks off; fetch it again",
    "damaged_file": "the file is damaged; fetch it again",
    "prompt_mismatch": "chosen and rejected have other prompts",
    "unsupported_content": "content that is no text",
}


def findings(found: Examined) -> list[tuple[Severity, str]]:
    """(severity, text) pairs: what is wrong with the file and its rows."""
    if found.error is not None:
        return [("error", found.error)]
    said: list[tuple[Severity, str]] = []
    if not found.rows:
        said.append(("error", "no rows"))
    elif found.suggestion is None:
        said.append(
            ("error", "no known format, and no column with texts of several words: nothing to train on")
        )
    elif not found.good:
        said.append(("error", "none of the rows can be used"))
    for reason, count in found.rejects.most_common():
        meaning = f" ({MEANING[reason]})" if reason in MEANING else ""
        places = "; ".join(f"{found.path.name}:{line}: {detail}" for line, detail in found.examples[reason])
        said.append(("warning", f"{_share(count, found.rows)} rejected as {reason}{meaning}: {places}"))
    said += [("warning", text) for text in _repeated(found)]
    said += [("warning", text) for text in _balance(found)]
    if found.replaced:
        said.append(
            ("warning", f"{_share(found.replaced, found.good)} hold U+FFFD: bytes were lost in a conversion")
        )
    if found.facts.header is False:
        said.append(
            ("note", "the first line was taken for a row, not for a header; set read.header if it is one")
        )
    if found.facts.note:
        said.append(("note", found.facts.note))
    if found.suggestion:
        said += [("note", text) for text in found.suggestion.notes]
    return said


def _share(count: int, rows: int) -> str:
    return f"{count:,} of {rows:,} rows ({count / rows:.1%})"


def _repeated(found: Examined) -> list[str]:
    said = []
    limit = f" among the first {REMEMBERED:,}" if found.good > REMEMBERED else ""
    for seen, what in ((found.contents, "repeat the content of an earlier row"), (found.ids, "repeat an id")):
        if seen.repeated:
            places = ", ".join(f"{found.path.name}:{line}" for line in seen.lines)
            said.append(f"{_share(seen.repeated, found.rows)} {what}{limit}, first {places}")
    return said


def _balance(found: Examined) -> list[str]:
    said = []
    if found.labels:
        good = found.labels["true"] / found.labels.total()
        if not LABEL_SHARE <= good <= 1 - LABEL_SHARE:
            said.append(f"{good:.1%} of the labels are true: one side is nearly missing")
    if "chosen" in found.lengths:
        longer = found.chosen_longer / found.good
        if abs(longer - 0.5) > LENGTH_BIAS:
            said.append(
                f"the chosen answer is the longer one in {longer:.1%} of the pairs: length tells the sides"
            )
    return said


def as_json(found: Examined) -> dict[str, Any]:
    """Everything about a file as JSON values."""
    if found.error is not None:
        return {"path": str(found.path), "error": found.error}
    chosen = found.suggestion
    rows = max(found.rows, 1)
    return {
        "path": str(found.path),
        "bytes": found.bytes,
        "compression": found.facts.compression,
        "encoding": found.facts.encoding,
        "layout": found.facts.layout,
        "header": found.facts.header,
        "delimiter": found.facts.delimiter or None,
        "rows": found.rows,
        "columns": {name: column.as_json(rows) for name, column in found.columns.items()},
        "format": chosen.settings["format"] if chosen else None,
        "kind": chosen.kind if chosen else None,
        "why": chosen.why if chosen else None,
        "usable_rows": found.good,
        "rejects": dict(found.rejects.most_common()),
        "reject_examples": {
            reason: [{"line": line, "detail": detail} for line, detail in places]
            for reason, places in found.examples.items()
        },
        "duplicate_rows": found.contents.repeated,
        "duplicate_ids": found.ids.repeated,
        "characters": {name: lengths.as_json() for name, lengths in found.lengths.items()},
        "roles": dict(found.roles.most_common()),
        "turns": {str(count): rows for count, rows in sorted(found.turns.items())},
        "labels": dict(found.labels),
        "chosen_longer": round(found.chosen_longer / found.good, 4) if "chosen" in found.lengths else None,
        "languages": languages(found.texts.kept),
        "licence": {"name": found.licence[0], "file": str(found.licence[1])} if found.licence else None,
        "findings": [{"severity": severity, "text": text} for severity, text in findings(found)],
    }
