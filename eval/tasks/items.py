"""The items of a task: rows of a file, or of the eval split of a data set, as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.dataset import read_split
from eval.generators.base import Message
from eval.generators.rows import cell, read_rows
from eval.held_out import pick
from posttrain.errors import DataError


@dataclass(frozen=True)
class Item:
    """One question. where: its place, for messages; row: its columns; prompt: what intervals cluster by."""

    id: str
    where: str
    messages: list[Message]
    question: str
    row: dict[str, Any]

    @property
    def prompt(self) -> str:
        """Equal for equal prompts."""
        return repr([(message["role"], message["content"]) for message in self.messages])

    def column(self, name: str) -> Any:
        """The value of a column. Raises DataError naming the columns there are."""
        return cell(self.row, name, self.where)

    def texts(self, name: str) -> list[str]:
        """A column with a text, a number or a non-empty list of them, as texts."""
        value = self.column(name)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, (str, int, float)) for one in values):
            raise DataError(f"{self.where}: `{name}` is neither a text nor a list of texts")
        return [str(one) for one in values]


class Asked(Protocol):
    """The settings that make a prompt of a row."""

    @property
    def question_column(self) -> str: ...
    @property
    def id_column(self) -> str | None: ...
    @property
    def template(self) -> str: ...
    @property
    def system(self) -> str | None: ...


def environment() -> ImmutableSandboxedEnvironment:
    """Where templates of tasks are rendered: unknown columns are errors, and nothing can be changed."""
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def sampled(items: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """All of them, or a seeded sample in their order."""
    return list(items) if limit is None else [items[i] for i in pick(len(items), limit, seed)]


def file_items(path: Path, asked: Asked, limit: int | None, seed: int) -> list[Item]:
    """One item per row of a file. Raises DataError for a missing column, or an id given twice."""
    template = environment().from_string(asked.template)
    system = [] if asked.system is None else [{"role": "system", "content": asked.system}]
    items = []
    for number, (where, row) in enumerate(read_rows(path)):
        question = cell(row, asked.question_column, where)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: `{asked.question_column}` is no text")
        named = str(number) if asked.id_column is None else str(cell(row, asked.id_column, where))
        try:
            text = template.render({**row, "question": question})
        except TemplateError as error:
            raise DataError(f"{where}: the template cannot be filled in ({error.message})") from None
        items.append(Item(named, where, [*system, {"role": "user", "content": text}], question, row))
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise DataError(f"{path}: the id {twice} is there twice; name another id_column")
    return sampled(items, limit, seed)


def dataset_items(path: Path, kind: Any, system: str | None, limit: int | None, seed: int) -> list[Item]:
    """The eval split of a data set. row: `reference` of conversations, `choices` and `answer` of pairs."""
    before = [] if system is None else [{"role": "system", "content": system}]
    items = []
    for row in read_split(path, "eval", kind).to_list():
        where = f"{path}: {row['id']}"
        if kind == "conversation":
            last = max(
                (i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant"), default=0
            )
            if last == 0:
                raise DataError(f"{where}: no assistant's turn with a turn before it")
            messages = row["messages"][:last]
            columns = {"reference": row["messages"][last]["content"]}
        else:
            messages = row["prompt"]
            columns = {}
            if kind == "preference":
                columns = {
                    "choices": [row[side][-1]["content"] for side in ("chosen", "rejected")],
                    "answer": 0,
                }
        turns = messages if messages[0]["role"] == "system" else [*before, *messages]
        items.append(Item(row["id"], where, turns, messages[-1]["content"], columns))
    return sampled(items, limit, seed)
