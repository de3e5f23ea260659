"""Conversations to ask: of a data set's eval split, or a few general ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data_prep.dataset import read_split
from posttrain.errors import DataError
from serving.parity import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

GENERAL = (
    "Hello!",
    "Who are you?",
    "What can you help me with?",
    "Write one sentence about the sea.",
    "What is 17 + 25? Answer with the number only.",
    "List three fruits.",
    "Translate 'good morning' into Spanish, German and Japanese.",
    "Explain in two sentences why the sky is blue.",
    "Summarise: the meeting moved from Monday to Wednesday, 10:30, room 4.",
    "Write a Python function that reverses a string.",
    "Geben Sie mir bitte einen kurzen Rat für ein Gespräch.",
    "请用一句话介绍你自己。",
    'Quote this exactly: "naïve café, 50 € – 🙂"',
    "I am sorry, I did not understand. Can you say it again?",
)
FOLLOW_UP = ("Where is my order?", "Could you tell me its number?", "It is K154.")
SYSTEM = "You are a helpful assistant. Answer briefly."


def select_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, longest: int
) -> list[Messages]:
    """The first `count` conversations of the eval split, less their last answer, of at most `longest` tokens.

    Raises DataError when the rows hold no conversation, or none fits.
    """
    rows = read_split(path, "eval")
    column = next((name for name in ("prompt", "messages") if name in rows.column_names), None)
    if column is None:
        raise DataError(
            f"{path}: holds no prompts\n    name a data set of kind prompt, preference or conversation"
        )
    chosen: list[Messages] = []
    for row in rows:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row[column]]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages and _fits(messages, tokenizer, longest):
            chosen.append(messages)
        if len(chosen) == count:
            break
    if not chosen:
        raise DataError(f"{path}: no prompt of the eval split has at most {longest} tokens")
    return chosen


def general_prompts(tokenizer: PreTrainedTokenizerBase, count: int, longest: int) -> list[Messages]:
    """At most `count` conversations that fit and that the chat template takes (some refuse a system turn).

    Raises DataError when there is none.
    """
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, FOLLOW_UP, strict=True)]
    candidates: list[Messages] = [[{"role": "user", "content": text}] for text in GENERAL[:1]]
    candidates += [turns, [{"role": "system", "content": SYSTEM}, turns[0]]]
    candidates += [[{"role": "user", "content": text}] for text in GENERAL[1:]]
    chosen: list[Messages] = []
    for messages in candidates:
        try:
            fits = _fits(messages, tokenizer, longest)
        except TemplateError:
            continue
        if fits:
            chosen.append(messages)
    if not chosen:
        raise DataError(f"no general prompt has at most {longest} tokens; set `prompts`")
    return chosen[:count]


def _fits(messages: Messages, tokenizer: PreTrainedTokenizerBase, longest: int) -> bool:
    text = render(tokenizer, messages)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= longest
