"""Records as a model sees them: the chat template applied, tokens counted, trained tokens told apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from data_prep.records import (
    ConversationRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)
from posttrain.errors import DataError, UserError
from posttrain.inputs import download, resolve

Piece = tuple[str, bool]


def visible(text: str) -> str:
    """The text with escape characters, and those that turn the direction of what follows, shown, so that
    data cannot steer the terminal.
    """
    return text.translate(_SHOWN)


_DIRECTION = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Embeddings, overrides and isolates; the marks that Arabic and Hebrew need stay."""
_SHOWN = {0x1B: "\u241b", 0x9B: "\u241b"} | {code: f"\\u{code:x}" for code in _DIRECTION}


@dataclass(frozen=True)
class Rendered:
    """One rendered text. pieces: (text, whether its tokens are trained on under `assistant_only_loss`).

    trained: the number of those tokens; None where the template does not mark them.
    """

    title: str
    pieces: list[Piece]
    tokens: int
    trained: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The text with its counts as JSON values."""
        text = "".join(piece for piece, _ in self.pieces)
        return {"title": self.title, "text": text, "tokens": self.tokens, "trained_tokens": self.trained}

    def print(self, console: Console) -> None:
        """Write the text; trained pieces green, between >>> and <<< without colours."""
        counts = f"{self.tokens:,} tokens"
        if self.trained is not None:
            counts += f", {self.trained:,} of them trained on"
        console.print(Text(f"  {self.title} ({counts})", "bold dim"))
        text = Text()
        for piece, trained in self.pieces:
            piece = visible(piece)
            plain = trained and console.color_system is None
            text.append(f">>>{piece}<<<" if plain else piece, style="green" if trained else "")
        console.print(text, soft_wrap=True)


class Renderer:
    """Renders records with the chat template of a tokenizer.

    Raises UserError: the tokenizer cannot be loaded, or has no chat template and the record has turns.
    """

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.tokenizer = load_tokenizer(ref)
        self.marked = _marked_template(self.tokenizer)

    def render(self, record: Record) -> list[Rendered]:
        """The texts of a record: the dialogue; of a pair the prompt and both answers; the document."""
        if isinstance(record, TextRecord):
            tokens = self.tokenizer(record.text, add_special_tokens=False)["input_ids"]
            return [Rendered("text", [(record.text, False)], len(tokens))]
        tools = _tools(record)
        if isinstance(record, ConversationRecord):
            return [self._dialogue(record.messages, tools)]
        if isinstance(record, PromptRecord):
            return [self._prompt(record.prompt, tools)]
        if isinstance(record, PreferenceRecord):
            answers = [("chosen", record.chosen), ("rejected", record.rejected)]
        else:
            assert isinstance(record, UnpairedPreferenceRecord)
            answers = [("desirable" if record.label else "undesirable", record.completion)]
        prompt = self._prompt(record.prompt, tools)
        return [prompt, *(self._answer(name, record.prompt, side, tools) for name, side in answers)]

    def _dialogue(self, turns: tuple[Message, ...], tools: Any) -> Rendered:
        ids, text = self._ids(turns, tools), self._text(turns, tools)
        if self.marked is None:
            return Rendered("dialogue", [(text, False)], len(ids))
        encoded = self.tokenizer.apply_chat_template(
            _plain(turns),
            tools=tools,
            chat_template=self.marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = encoded["assistant_masks"]
        pieces: list[tuple[list[int], bool]] = []
        for token, trained in zip(encoded["input_ids"], mask, strict=True):
            if not pieces or pieces[-1][1] != bool(trained):
                pieces.append(([], bool(trained)))
            pieces[-1][0].append(token)
        shown = [(self.tokenizer.decode(tokens), trained) for tokens, trained in pieces]
        return Rendered("dialogue", shown, len(encoded["input_ids"]), sum(mask))

    def _prompt(self, turns: tuple[Message, ...], tools: Any) -> Rendered:
        text = self._text(turns, tools, add_generation_prompt=True)
        return Rendered("prompt", [(text, False)], len(self._ids(turns, tools, add_generation_prompt=True)))

    def _answer(
        self, name: str, prompt: tuple[Message, ...], side: tuple[Message, ...], tools: Any
    ) -> Rendered:
        before = self._text(prompt, tools, add_generation_prompt=True)
        whole = self._text((*prompt, *side), tools)
        text = whole.removeprefix(before)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Rendered(name, [(text, True)], len(tokens))

    def _text(self, turns: tuple[Message, ...], tools: Any, **options: Any) -> str:
        return self._apply(turns, tools, tokenize=False, **options)

    def _ids(self, turns: tuple[Message, ...], tools: Any, **options: Any) -> list[int]:
        return self._apply(turns, tools, return_dict=True, **options)["input_ids"]

    def _apply(self, turns: tuple[Message, ...], tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.ref}: the tokenizer has no chat template\n"
                "    leave --tokenizer out, or name a chat model"
            )
        try:
            return self.tokenizer.apply_chat_template(_plain(turns), tools=tools, **options)
        except TemplateError as error:
            raise DataError(
                f"{self.ref}: the chat template refuses this dialogue ({error})\n"
                "    show it without --tokenizer, or choose a template that takes its roles"
            ) from error


def _plain(turns: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _tools(record: Record) -> list[Any] | None:
    """The record's tool definitions, where they are a list or the JSON text of one."""
    tools = json.loads(record.meta).get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    return tools if isinstance(tools, list) and tools else None


def load_tokenizer(ref: str) -> Any:
    """The tokenizer of a model or tokenizer directory, a run or a Hub id. Raises UserError for none."""
    from transformers import AutoTokenizer

    place = Path(ref).expanduser()
    if (place / "tokenizer.json").is_file() or (place / "tokenizer_config.json").is_file():
        directory = place
    else:
        directory = download(resolve(ref, "model"))
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{ref}: transformers loads no tokenizer from it ({first})\n"
            "    name a model or tokenizer directory"
        ) from error


def _marked_template(tokenizer: Any) -> str | None:
    """A template of the same text that marks the assistant's tokens: the tokenizer's own, or TRL's of it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.chat_template is None:
        return None
    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        return None
