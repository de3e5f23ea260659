"""A study as written: one YAML file, and the pairs of answers it is about.

name: answers-in-spring
items: runs/tiny/eval            # a run of the eval stage, its samples.jsonl, or a .jsonl of items
overlap: 2
gold_share: 0.1
criteria: [helpful, correct]
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from data_prep.records import InvalidRecord, Message, check_prompt, check_text
from data_prep.turns import parse_turns
from posttrain.config import StrictModel
from posttrain.errors import ConfigError, DataError, UserError
from posttrain.hashing import hash_file, hash_json
from posttrain.validation import validate
from posttrain.yaml_source import load_document

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
VERDICTS = ("tie", "both_bad")
MAX_ANSWER_CHARACTERS = 200_000


class StudyConfig(StrictModel):
    """What `posttrain annotate create` reads."""

    name: Name = Field(description="What the study is called, in its database and on its pages.")
    items: str = Field(
        description="A run directory of the eval stage, its samples.jsonl, or a .jsonl of items: prompt, "
        "answer_a, answer_b and optionally id, model_a, model_b, gold."
    )
    pairs: list[tuple[str, str]] = Field(
        default_factory=list, description="Models that are compared, [[sft, ppo]]; default: every two."
    )
    max_items: int | None = Field(None, ge=1, description="At most so many pairs, drawn with `seed`.")
    seed: int = Field(0, ge=0, description="Seed of that draw.")
    gold: str | None = Field(
        None, description="A .jsonl of items with `gold`, the known answer, beside those of `items`."
    )
    gold_share: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of an annotator's items that are gold checks, while any are left.",
    )
    overlap: int = Field(1, ge=1, le=1000, description="Annotators who vote on an item.")
    instructions: str = Field("", max_length=20_000, description="Shown above every item, as plain text.")
    criteria: list[Name] = Field(
        default_factory=list, max_length=12, description="Also asked, each: which answer is better here?"
    )
    lease_minutes: float = Field(
        30.0, gt=0, description="An item that was opened and left returns to the others after so long."
    )

    @model_validator(mode="after")
    def _distinct(self) -> StudyConfig:
        for what, values in (("criteria", self.criteria), ("pairs", [tuple(sorted(p)) for p in self.pairs])):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names something twice")
        if any(first == second for first, second in self.pairs):
            raise ValueError("pairs compares a model with itself")
        return self


@dataclass(frozen=True)
class Item:
    """A prompt and two answers. gold: the known answer, first, second, tie or both_bad."""

    name: str
    prompt: list[dict[str, str]]
    answers: tuple[str, str]
    models: tuple[str, str]
    gold: str | None = None


@dataclass
class Loaded:
    """Items, what was left out, by reason, and the files they came from, with their hashes."""

    items: list[Item] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)


def load_study(path: Path | None, overrides: Sequence[str] = ()) -> StudyConfig:
    """The configuration. Raises ConfigError with every mistake, UserError for a file that is not there."""
    document = load_document(path, overrides)
    config, problems = validate(StudyConfig, document.data, document, ())
    if config is None:
        raise ConfigError(problems)
    return config


def load_items(config: StudyConfig) -> Loaded:
    """The pairs that the study is about, in the order of their file. Raises DataError, UserError."""
    import random

    loaded = Loaded()
    _read(config.items, config, loaded)
    regular = [item for item in loaded.items if item.gold is None]
    if config.max_items is not None and len(regular) > config.max_items:
        kept = set(random.Random(config.seed).sample(range(len(regular)), config.max_items))
        loaded.left_out["over_max_items"] = len(regular) - len(kept)
        dropped = {item.name for number, item in enumerate(regular) if number not in kept}
        loaded.items = [item for item in loaded.items if item.name not in dropped]
    if config.gold is not None:
        _read(config.gold, config, loaded, prefix="gold-")
    if not any(item.gold is None for item in loaded.items):
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(loaded.left_out.items()))
        raise DataError(
            f"{config.items}: holds no two answers that can be compared ({reasons or 'nothing read'})\n"
            "    give answers of two models to the same prompts, or correct `pairs`"
        )
    return loaded


def named_models(config: StudyConfig, items: Sequence[Item]) -> list[str]:
    """Models whose names the study's own words, which annotators see, hold: name, criteria, instructions."""
    words = " ".join([config.name, *config.criteria, config.instructions]).casefold()
    models = sorted({model for item in items for model in item.models if len(model) > 1})
    return [
        model for model in models if re.search(rf"(?<![^\W_]){re.escape(model.casefold())}(?![^\W_])", words)
    ]


def _read(place: str, config: StudyConfig, loaded: Loaded, prefix: str = "") -> None:
    path = Path(place)
    if path.is_dir():
        path = path / "samples.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file\n    name a run directory of the eval stage, or a .jsonl file of items"
        )
    seen = {item.name for item in loaded.items}
    before = len(loaded.items)
    with path.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                found = list(_items(row, config, loaded.left_out, f"{prefix}line-{number}"))
            except (ValueError, InvalidRecord) as error:
                raise DataError(f"{where}: {error}\n    {FORMS}") from error
            for item in found:
                if prefix and item.gold is None:
                    raise DataError(f"{where}: has no `gold`\n    every item of the file `gold` needs one")
                if item.name in seen:
                    raise DataError(f"{where}: the id {item.name!r} was used before\n    give each its own")
                seen.add(item.name)
                loaded.items.append(item)
    loaded.sources.append(
        {"file": str(path.resolve()), "sha256": hash_file(path), "items": len(loaded.items) - before}
    )


FORMS = (
    "a line is {prompt, answer_a, answer_b} or {prompt, answers: {model: text, model: text}}; gold is a, b "
    "(or a model's name), tie or both_bad"
)


def _items(row: Any, config: StudyConfig, left_out: Counter[str], fallback: str) -> Iterator[Item]:
    """The pairs of one line. Raises ValueError or InvalidRecord."""
    if not isinstance(row, dict) or not row.get("prompt"):
        raise ValueError("is no object with a `prompt`")
    turns = (
        (Message("user", row["prompt"]),)
        if isinstance(row["prompt"], str)
        else parse_turns(row["prompt"], "prompt")
    )
    check_prompt(turns)
    prompt = [{"role": turn.role, "content": turn.content} for turn in turns]
    name = str(row.get("id") or fallback)
    if "answers" not in row:
        models = (str(row.get("model_a", "a")), str(row.get("model_b", "b")))
        answers = (_text(row, "answer_a"), _text(row, "answer_b"))
        gold = {"a": "first", "b": "second"}.get(str(row.get("gold")), row.get("gold"))
        yield from _item(name, prompt, answers, models, gold, left_out)
        return
    given = row["answers"]
    if not isinstance(given, dict) or len(given) < 2:
        raise ValueError("`answers` must hold the answers of two or more models")
    texts = {model: _text(given, model) for model in given}
    pairs = config.pairs or list(itertools.combinations(sorted(texts), 2))
    for models in pairs:
        if not set(models) <= set(texts):
            left_out["model_missing"] += 1
            continue
        gold = row.get("gold")
        if gold is not None and gold not in VERDICTS:
            if gold not in models:
                left_out["gold_of_other_pair"] += 1
                continue
            gold = ("first", "second")[models.index(gold)]
        one_pair = len(pairs) == 1
        named = name if one_pair else f"{name}/{hash_json(list(models))[:8]}"
        yield from _item(named, prompt, (texts[models[0]], texts[models[1]]), models, gold, left_out)


def _item(
    name: str,
    prompt: list[dict[str, str]],
    answers: tuple[str, str],
    models: tuple[str, str],
    gold: Any,
    left_out: Counter[str],
) -> Iterator[Item]:
    if gold is not None and gold not in ("first", "second", *VERDICTS):
        raise ValueError(f"gold is {gold!r}")
    if not all(answer.strip() for answer in answers):
        left_out["empty_answer"] += 1
    elif answers[0].split() == answers[1].split():
        left_out["identical_answers"] += 1
    else:
        yield Item(name, prompt, answers, models, gold)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"the answer {key!r} is no text")
    if text.strip():
        check_text(text, f"the answer {key!r}")
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise ValueError(f"the answer {key!r} has {len(text)} characters, more than {MAX_ANSWER_CHARACTERS}")
    return text
