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

MAX_UNSUPERVISED = 0.01
"""Largest share of dialogues without a supervised token; up to it they are left out and counted."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one dialogue and the labels of its loss, both of the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Fault:
    """Rows that cannot be trained on: their `ids`, of how many, what they are, what is wrong, the remedy."""

    ids: list[str]
    total: int
    noun: str
    what: str
    remedy: str

    @property
    def share(self) -> float:
        """The part of all rows that it is, from 0 to 1."""
        return len(self.ids) / self.total

    @property
    def message(self) -> str:
        """Count, share, what is wrong, and the first ids."""
        first = ", ".join(self.ids[:5])
        return (
            f"{len(self.ids)} of {self.total} {self.noun} ({self.share:.1%}) {self.what}. First ids: {first}"
        )

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}"


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
    """`label_conversations`, refusing what would teach nothing, or never to stop.

    Raises:
        DataError: more than MAX_UNSUPERVISED of the dialogues carry no loss, or the end-of-turn token of one
            does not; their `ids` are named.
        UserError: see `training_template`.
    """
    encoded = label_conversations(tokenizer, conversations, assistant_only)
    silent = unsupervised([row.labels for row in encoded], ids)
    if silent and silent.share > MAX_UNSUPERVISED:
        raise DataError(str(silent))
    endless = never_ending(tokenizer, encoded, ids)
    if endless:
        raise DataError(str(endless))
    return encoded


def label_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], assistant_only: bool = True
) -> list[Encoded]:
    """Render and tokenize dialogues; labels are the ids, or IGNORED where the assistant did not speak.

    Raises:
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
    return [
        Encoded(row, [token if kept else IGNORED for token, kept in zip(row, mask, strict=True)])
        for row, mask in zip(rendered["input_ids"], masks, strict=True)
    ]


def unsupervised(labels: Sequence[Sequence[int]], ids: Sequence[str]) -> Fault | None:
    """The dialogues in which no token carries loss; None when there are none."""
    silent = [name for name, row in zip(ids, labels, strict=True) if all(label == IGNORED for label in row)]
    if not silent:
        return None
    what = "have no token to learn from: no turn of role assistant, or a chat template that does not mark it"
    return Fault(silent, len(labels), "dialogues", what, "Drop them in the curate stage.")


def never_ending(
    tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], ids: Sequence[str]
) -> Fault | None:
    """The dialogues with supervised tokens of which none is the end of a turn; None when there are none."""
    end = tokenizer.eos_token_id
    endless = [
        name
        for name, row in zip(ids, encoded, strict=True)
        if end not in row.labels and any(label != IGNORED for label in row.labels)
    ]
    if not endless:
        return None
    what = (
        f"give the end-of-turn token {tokenizer.eos_token} no loss, so that the model would never learn to "
        "stop"
    )
    remedy = (
        "Put it inside {% generation %} ... {% endgeneration %} in the chat template; if the template ends a "
        "turn with another token, make that one the tokenizer's eos_token."
    )
    return Fault(endless, len(encoded), "dialogues", what, remedy)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts as the tokenizer writes them, each with the end token at its end."""
    encoded: Any = tokenizer(list(texts))["input_ids"]
    end: Any = tokenizer.eos_token_id
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in encoded]


def windows_of(documents: Sequence[list[int]], max_length: int) -> list[list[int]]:
    """Documents cut into stretches of at most `max_length` tokens.

    A last token that would be alone is left out: the loss is on all tokens but the first.
    """
    starts = ((ids, start) for ids in documents for start in range(0, len(ids), max_length))
    windows = [ids[start : start + max_length] for ids, start in starts]
    return [window for window in windows if len(window) > 1]


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], ids: Sequence[str]
) -> list[list[int]]:
    """Token ids of dialogues that a reward model scores; see `whole_dialogue`.

    Raises:
        DataError: a rendered dialogue does not end with the end-of-turn token, at which the score is read.
    """
    rendered = render_whole(tokenizer, conversations)
    fault = open_ended(tokenizer, rendered, ids)
    if fault:
        raise DataError(str(fault))
    return rendered


def render_whole(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[list[int]]:
    """Token ids of whole dialogues, as the chat template writes them; see `whole_dialogue`."""
    texts = [whole_dialogue(tokenizer, messages) for messages in conversations]
    rendered: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return rendered


def open_ended(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Sequence[int]], ids: Sequence[str]
) -> Fault | None:
    """The dialogues that do not end with the end-of-turn token; None when there are none."""
    end = tokenizer.eos_token_id
    cut = [name for name, row in zip(ids, rendered, strict=True) if row[-1] != end]
    if not cut:
        return None
    what = f"do not end with {tokenizer.eos_token} once rendered, where the score is read"
    remedy = "The chat template must end a dialogue with that token; only white space may follow."
    return Fault(cut, len(rendered), "dialogues", what, remedy)


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
    pairs = list(zip(chosen, rejected, strict=True))
    fault = identical_sides(pairs, ids)
    if fault:
        raise DataError(str(fault))
    return pairs


def identical_sides(pairs: Sequence[tuple[list[int], list[int]]], ids: Sequence[str]) -> Fault | None:
    """The pairs whose two sides are the same tokens; None when there are none."""
    same = [name for name, (chosen, rejected) in zip(ids, pairs, strict=True) if chosen == rejected]
    if not same:
        return None
    what = "have chosen equal to rejected once rendered"
    return Fault(same, len(pairs), "pairs", what, "Drop them in the curate stage.")
