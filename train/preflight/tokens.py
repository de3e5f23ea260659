"""The tokenizer: special tokens, a doubled BOS, its fit to the model's embedding; and the example to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.models import load_chat_tokenizer, load_tokenizer
from posttrain.preflight import Findings
from posttrain.preflight_report import Piece
from train.encode import Fault
from train.preflight.models import read_config


def read_tokenizer(path: Path, field: str, findings: Findings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model to train, with what is wrong with it in `findings`; None if it is unusable."""
    try:
        return load_tokenizer(path)
    except UserError as error:
        findings.fail_with(field, error)
    try:
        tokenizer = load_chat_tokenizer(path)
    except UserError:
        return None
    return None if tokenizer.eos_token_id is None else tokenizer


def read_model(path: Path, findings: Findings) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase] | None:
    """Configuration and tokenizer of the model to train, with what is wrong with the tokenizer in `findings`;
    None if one of them is unusable. A configuration that cannot be read is reported by `check_trained`, or by
    the check of PPO's policy.
    """
    config = read_config(path, "model", Findings())
    tokenizer = read_tokenizer(path, "model", findings)
    if tokenizer is None or config is None:
        return None
    check_vocabulary(tokenizer, config, "model", findings)
    return config, tokenizer


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, field: str, findings: Findings
) -> None:
    """Add a problem when the tokenizer has ids that the model has no embedding for."""
    rows = config.get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        findings.fail(
            field,
            f"{tokenizer.name_or_path}: the tokenizer's highest id is {highest}, the model's embedding has "
            f"{rows} rows (vocab_size)",
            "resize the model's embedding and save it, or use the tokenizer that belongs to this model",
        )


def doubled_bos(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Sequence[int]], ids: Sequence[str]
) -> Fault | None:
    """The rows that begin with two BOS tokens; None when there are none."""
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        return None
    doubled = [name for name, row in zip(ids, rendered, strict=True) if list(row[:2]) == [bos, bos]]
    if not doubled:
        return None
    what = f"begin with {tokenizer.bos_token}{tokenizer.bos_token} once rendered"
    remedy = "Let the chat template write bos_token once: nothing else in posttrain adds it."
    return Fault(doubled, len(rendered), "rows", what, remedy)


def check_added_bos(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[int], findings: Findings) -> None:
    """Add a warning when the tokenizer puts a BOS before text that the template has begun with one."""
    bos: Any = tokenizer.bos_token_id
    if bos is None or not rendered or rendered[0] != bos:
        return
    again: list[int] = tokenizer(tokenizer.bos_token)["input_ids"]
    if again[:2] == [bos, bos]:
        findings.warn(
            "model",
            f"{tokenizer.name_or_path}: the chat template writes {tokenizer.bos_token}, and the tokenizer "
            "adds it too: posttrain tokenises rendered text without adding anything, other programs may not",
            "use add_special_tokens=False wherever this model is read; export removes the habit",
        )


@contextmanager
def rendering(
    tokenizer: PreTrainedTokenizerBase, place: str, field: str, findings: Findings
) -> Iterator[None]:
    """Turn the chat template's own refusal of rows inside the block into a problem, and end the block."""
    try:
        yield
    except TemplateError as error:
        findings.fail(
            field,
            f"{place}: the chat template of {tokenizer.name_or_path} refuses a row ({error})",
            "drop such rows in the curate stage, or use a model whose template takes them",
        )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], supervised: Sequence[bool]) -> list[Piece]:
    """The text of a row in stretches of supervised and of other tokens."""
    tokens = zip(ids, supervised, strict=True)
    runs = [(kept, [token for token, _ in run]) for kept, run in groupby(tokens, key=lambda item: item[1])]
    return [(str(tokenizer.decode(run, skip_special_tokens=False)), kept) for kept, run in runs]
