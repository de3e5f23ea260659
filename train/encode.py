"""Dialogues to token ids, once, in the form that training, calibration and scoring share.

The rendered text is what the tokenizer's chat template makes of the messages; no token is added to it and
none is removed. What would train a model on nonsense is refused here, with the ids of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.errors import DataError, UserError
from posttrain.models import whole_dialogue

IGNORED = -100
"""Label of a token that carries no loss."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one dialogue and the labels of its loss, both of the same length."""

    input_ids: list[int]
    labels: list[int]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to render with when only the assistant's tokens are trained; None for the tokenizer's own.

    Raises:
        UserError: the template has no ``{% generation %}`` markers and TRL knows no marked version of it.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "trainer.assistant_only_loss needs a chat template that marks the assistant's tokens with "
            "{% generation %} ... {% endgeneration %}; the template of "
            f"{tokenizer.name_or_path} has no such markers. Add them to its chat_template.jinja, or set "
            "trainer.assistant_only_loss=false."
        ) from error


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    ids: Sequence[str],
    assistant_only: bool = True,
) -> list[Encoded]:
    """Render and tokenize dialogues; labels are the ids, or IGNORED where the assistant did not speak.

    Raises:
        DataError: dialogues in which no token, or no end-of-turn token, carries loss; their `ids` are named.
        UserError: see `training_template`.
    """
    template = training_template(tokenizer) if assistant_only else None
    rendered: Any = tokenizer.apply_chat_template(
        list(conversations),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=assistant_only,
    )
    masks = (
        rendered["assistant_masks"] if assistant_only else [[1] * len(row) for row in rendered["input_ids"]]
    )
    encoded = [
        Encoded(row, [token if kept else IGNORED for token, kept in zip(row, mask, strict=True)])
        for row, mask in zip(rendered["input_ids"], masks, strict=True)
    ]
    silent = [
        name for name, row in zip(ids, encoded, strict=True) if all(label == IGNORED for label in row.labels)
    ]
    if silent:
        raise DataError(
            f"{len(silent)} of {len(encoded)} dialogues have no token to learn from: no turn of role "
            "assistant, or a chat template that does not mark it. "
            f"First ids: {_first(silent)}. Drop them in the curate stage."
        )
    end = tokenizer.eos_token_id
    endless = [name for name, row in zip(ids, encoded, strict=True) if end not in row.labels]
    if endless:
        raise DataError(
            f"in {len(endless)} of {len(encoded)} dialogues the end-of-turn token {tokenizer.eos_token} "
            f"carries no loss, so that the model would never learn to stop. First ids: {_first(endless)}. "
            "Put it inside {% generation %} ... {% endgeneration %} in the chat template."
        )
    return encoded


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], ids: Sequence[str]
) -> list[list[int]]:
    """Token ids of dialogues that a reward model scores; see `whole_dialogue`.

    Raises:
        DataError: a rendered dialogue does not end with the end-of-turn token, at which the score is read.
    """
    texts = [whole_dialogue(tokenizer, messages) for messages in conversations]
    rendered: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    open_ended = [name for name, row in zip(ids, rendered, strict=True) if row[-1] != end]
    if open_ended:
        raise DataError(
            f"{len(open_ended)} of {len(rendered)} rendered dialogues do not end with "
            f"{tokenizer.eos_token}, where the score is read. First ids: {_first(open_ended)}. "
            "The chat template must end a dialogue with that token and nothing but white space after it."
        )
    return rendered


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> list[tuple[list[int], list[int]]]:
    """(chosen ids, rejected ids) of preference rows, prompt included.

    Raises:
        DataError: see `encode_whole`; also a pair whose two sides are the same tokens.
    """
    ids = [row["id"] for row in rows]
    chosen = encode_whole(tokenizer, [row["prompt"] + row["chosen"] for row in rows], ids)
    rejected = encode_whole(tokenizer, [row["prompt"] + row["rejected"] for row in rows], ids)
    same = [name for name, a, b in zip(ids, chosen, rejected, strict=True) if a == b]
    if same:
        raise DataError(
            f"{len(same)} of {len(ids)} pairs have chosen equal to rejected. First ids: {_first(same)}. "
            "Drop them in the curate stage."
        )
    return list(zip(chosen, rejected, strict=True))


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5])
