"""Rows of answer, question and vote files: read, and looked into. Every mistake names its file and line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.hashing import hash_json

Message = dict[str, str]
PROMPT_KEYS = ("prompt", "messages", "instruction", "question")


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a file of JSON lines, or of one JSON list (its entries numbered).

    Raises DataError for a file that cannot be read, holds nothing, or a line that is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    rows = []
    if text.lstrip().startswith("["):
        value = _decoded(text, path, 1)
        rows = list(enumerate(value, 1)) if isinstance(value, list) else []
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((number, _decoded(line, path, number)))
    if not rows:
        raise DataError(f"{path}: holds no row")
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: is not a JSON object")
    return rows


def _decoded(text: str, path: Path, line: int) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{line + error.lineno - 1}: is not valid JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise DataError(
            f"{path}:{line}: holds half of a surrogate pair (\\ud800 to \\udfff), no text"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise DataError(f"{path}:{line}: cannot be read as JSON ({error})") from None
    return value


def text_of(row: dict[str, Any], key: str) -> str:
    """The text of an optional column, empty where there is none."""
    value = row.get(key)
    return "" if value is None else str(value)


def prompt_key(messages: Sequence[Message]) -> str:
    """Equal for equal prompts."""
    return hash_json([[message["role"], message["content"]] for message in messages])[:16]


def prompt_of(row: dict[str, Any], where: str) -> list[Message] | None:
    """The prompt of a row as messages, None where it has none."""
    return None if first_of(row, PROMPT_KEYS) is None else prompt(row, where)


def prompt(row: dict[str, Any], where: str) -> list[Message]:
    value = first_of(row, PROMPT_KEYS)
    if isinstance(value, str):
        extra = row.get("input")
        text = f"{value}\n\n{extra}" if "instruction" in row and isinstance(extra, str) and extra else value
        return [{"role": "user", "content": text}]
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return [{"role": item["role"], "content": item["content"]} for item in value]
    raise DataError(f"{where}: its prompt is neither text nor a list of messages with role and content")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def choices_of(row: dict[str, Any], where: str) -> list[str]:
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise DataError(f"{where}: choices must be a list of objects with `turns`")
    return texts_of(choices[0].get("turns"), f"{where}: choices.0.turns")


def texts_of(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: must be a list of texts")
    return value


def is_finished(row: dict[str, Any]) -> bool:
    return row.get("finished") is not False


def first_of(row: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)
