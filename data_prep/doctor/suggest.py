"""Which settings of a source read a file: its format, or the columns that stand for a format's fields."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.detection import Detection, detect_rows
from data_prep.doctor.columns import places
from data_prep.formats import FORMATS, candidates
from data_prep.records import Kind
from posttrain.errors import DataError

Row = dict[str, Any]
_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "task", "input", "user", "human", "goal")
_ANSWERS = (
    "completion",
    "response",
    "answer",
    "best_answer",
    "output",
    "target",
    "ground_truth",
    "solution",
    "reference",
    "assistant",
    "summary",
)
_CHOSEN = ("chosen", "preferred", "accepted", "better", "win", "response_chosen", "answer_chosen")
_REJECTED = ("rejected", "dispreferred", "worse", "lose", "response_rejected", "answer_rejected")
_TEXTS = (
    "text",
    "full_text",
    "content",
    "body",
    "document",
    "passage",
    "article",
    "tweet",
    "sentence",
    "code",
)
_CONTEXTS = ("input", "context")
_IDS = (
    "id",
    "idx",
    "key",
    "uuid",
    "uid",
    "question_id",
    "task_id",
    "prompt_id",
    "conversation_id",
    "example_id",
)
META = (
    "answer",
    "reference",
    "ground_truth",
    "solution",
    "instruction_id_list",
    "kwargs",
    "label",
    "class",
    "category",
)
ENOUGH = 0.9


@dataclass
class Suggestion:
    """How a file is to be read. settings: of the source; notes: what a person should know of the choice."""

    kind: Kind
    settings: dict[str, Any]
    why: str
    detection: Detection | None = None
    notes: list[str] = field(default_factory=list)


def suggest(rows: Sequence[tuple[int, Row]], place: str) -> Suggestion | None:
    """The settings for a file that begins with these (line, row) pairs; None when it holds no text."""
    if not rows:
        return None
    found = _known_format(rows, place) or _by_names(rows) or _conversation(rows) or _longest_text(rows)
    if found is None:
        return None
    columns = found.settings.get("columns", {})
    if any(_has_reasoning(row) for _, row in rows):
        found.settings["reasoning"] = "think_tags"
        found.notes.append(
            "answers come with reasoning: it goes before them in <think> tags; drop leaves it out"
        )
    name = _id_column(rows, set(columns.values()))
    if name:
        found.settings["id_column"] = name
    return found


def _known_format(rows: Sequence[tuple[int, Row]], place: str) -> Suggestion | None:
    try:
        found = detect_rows(rows, place)
    except DataError as error:
        names = [names for _, row in rows if len(names := candidates(row)) > 1]
        if not names:
            return None
        first = str(error).splitlines()[0]
        name = names[0][0]
        notes = [f"{first}; {name} was taken, change `format` if another is meant"]
        return Suggestion(FORMATS[name].native, {"format": name}, f"{name}, one of {names[0]}", notes=notes)
    return Suggestion(FORMATS[found.format].native, {"format": found.format}, found.why(), found)


def _by_names(rows: Sequence[tuple[int, Row]]) -> Suggestion | None:
    """A format whose fields are there under other names of the field."""
    texts = _text_columns(rows)
    prompt, answer = _first(texts, _PROMPTS), _first(texts, _ANSWERS)
    chosen, rejected = _first(texts, _CHOSEN), _first(texts, _REJECTED)
    if prompt and chosen and rejected:
        return _mapped("preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    context = _first(texts, _CONTEXTS)
    if prompt and answer and context and context not in (prompt, answer):
        return _mapped("alpaca", {"instruction": prompt, "input": context, "output": answer})
    if prompt and answer:
        return _mapped("prompt_completion", {"prompt": prompt, "completion": answer})
    text = _first(texts, _TEXTS)
    if text:
        return _mapped("text", {"text": text})
    return _mapped("prompt", {"prompt": prompt}) if prompt else None


def _mapped(name: str, columns: dict[str, str]) -> Suggestion:
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    said = ", ".join(f"{ours} from {theirs!r}" for ours, theirs in columns.items())
    settings: dict[str, Any] = {"format": name, **({"columns": columns} if columns else {})}
    return Suggestion(FORMATS[name].native, settings, f"{name}, by the names of its columns: {said}")


def _text_columns(rows: Sequence[tuple[int, Row]]) -> dict[str, str]:
    """Columns that hold text in most rows: name as words with underscores -> name in the file."""
    counts = Counter(
        name for _, row in rows for name, value in row.items() if isinstance(value, str) and value.strip()
    )
    return {
        re.sub(r"\W+", "_", name.strip().lower()): name
        for name, count in counts.items()
        if count >= ENOUGH * len(rows)
    }


def _first(texts: dict[str, str], names: Sequence[str]) -> str | None:
    return next((texts[name] for name in names if name in texts), None)


def _conversation(rows: Sequence[tuple[int, Row]]) -> Suggestion | None:
    """A column of turns under a name of its own."""
    for name, value in rows[0][1].items():
        turns = [row.get(name) for _, row in rows]
        fits = sum(isinstance(turn, list) and bool(turn) and _is_turn(turn[0]) for turn in turns)
        if isinstance(value, list) and fits >= ENOUGH * len(rows):
            return _mapped("messages", {"messages": name})
    return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))


def _longest_text(rows: Sequence[tuple[int, Row]]) -> Suggestion | None:
    """The place with the longest texts of several words, as plain text: a guess, and said to be one."""
    characters: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    for _, row in rows:
        for place, text in places(row):
            if len(text.split()) > 1:
                characters[place] += len(text)
                filled[place] += 1
    usable = [place for place, count in filled.items() if count >= 0.5 * len(rows)]
    if not usable:
        return None
    best = max(usable, key=lambda place: (characters[place], place))
    found = _mapped("text", {"text": best})
    found.why = f"text, a guess: no known format, {best!r} has the longest texts"
    others = sorted(set(usable) - {best}, key=lambda place: -characters[place])[:5]
    if others:
        found.notes.append(f"other places with text: {', '.join(others)}")
    return found


def _has_reasoning(row: Row) -> bool:
    turns = (
        turn for value in row.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)
    )
    return any(
        turn.get("reasoning_content")
        or isinstance(turn.get("content"), list)
        and any(
            isinstance(part, dict) and part.get("type") in ("reasoning", "thinking")
            for part in turn["content"]
        )
        for turn in turns
    )


def _id_column(rows: Sequence[tuple[int, Row]], taken: set[str]) -> str | None:
    """A column named as ids are, that differs in all rows looked at which have one."""
    for name in _IDS:
        values = [row[name] for _, row in rows if row.get(name) not in (None, "")]
        named = len(values) >= ENOUGH * len(rows) and all(isinstance(value, (str, int)) for value in values)
        if name not in taken and named and len(set(map(str, values))) == len(values):
            return name
    return None
