"""What measures a record beyond its text: tokenizer, sentence encoder, reward model and tag functions.

A baseline notes each by path and content hash, and later traffic is measured with the same or not at all.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import DataError, UserError
from posttrain.hashing import fingerprint_tokenizer, hash_path
from serving.drift.embedding import Floats, sentence_encoder
from serving.drift.features import words
from serving.drift.language import Method, available_method, detector
from serving.drift.records import Record

_BATCH = 16
_OPTIONS = {"tokenizer": "--tokenizer", "embedding": "--embedding", "reward_model": "--reward-model"}


@dataclass(frozen=True)
class Settings:
    """With what a baseline was measured. tokenizer, embedding, reward_model: {"path", "hash"} or None. tags:
    name -> "module:function"."""

    language: Method = "script"
    tokenizer: dict[str, str] | None = None
    embedding: dict[str, str] | None = None
    reward_model: dict[str, str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: Path | None = None,
        embedding: Path | None = None,
        reward_model: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Settings:
        """The settings of a new baseline. Raises UserError for a path that is not there or not the thing."""
        return cls(
            available_method(),
            _noted("tokenizer", tokenizer),
            _noted("embedding", embedding),
            _noted("reward_model", reward_model),
            dict(tags or {}),
        )

    def moved_to(self, tokenizer: Path | None, embedding: Path | None, reward_model: Path | None) -> Settings:
        """These settings with things found where they are now. Raises UserError when one is another thing."""
        given = {"tokenizer": tokenizer, "embedding": embedding, "reward_model": reward_model}
        found = {}
        for name, path in given.items():
            noted: dict[str, str] | None = vars(self)[name]
            if path is None:
                if noted is None:
                    continue
                path = Path(noted["path"])
            here = _noted(name, path)
            if here is None or noted is None or here["hash"] != noted["hash"]:
                raise UserError(
                    f"{_OPTIONS[name]} {path}: the baseline was made "
                    + (f"with another one ({noted['path']})" if noted else "without one")
                    + "\n    make the baseline again with the same option, or leave the option out"
                )
            found[name] = here
        return replace(
            self,
            tokenizer=found.get("tokenizer"),
            embedding=found.get("embedding"),
            reward_model=found.get("reward_model"),
        )


def _noted(name: str, path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    if not path.is_dir():
        raise UserError(f"{_OPTIONS[name]} {path}: no such directory\n    name a local model directory")
    path = _model_directory(path)
    content = fingerprint_tokenizer(path)["tokenizer"] if name == "tokenizer" else hash_path(path)
    return {"path": str(path), "hash": content}


def _model_directory(path: Path) -> Path:
    """The model of a training run or of an export's newest version, else `path` itself."""
    if (path / "model").is_dir():
        return path / "model"
    weights = sorted(path.glob("model_repository/*/*/weights"), key=lambda found: found.parent.name)
    return weights[-1] if weights else path


@dataclass(frozen=True)
class Instruments:
    """The loaded things. tokens: text to the tokens that are counted. encode: None for TF-IDF and SVD."""

    settings: Settings
    detect: Callable[[str], str]
    count_tokens: Callable[[str], int]
    tokens: Callable[[str], list[str]]
    encode: Callable[[Sequence[str]], Floats] | None
    score: Callable[[Sequence[Record]], Floats] | None
    tags: Mapping[str, Callable[[dict[str, Any]], Any]]


def load_instruments(settings: Settings) -> Instruments:
    """Load what the settings name. Raises UserError with the remedy for what is missing."""
    count_tokens: Callable[[str], int] = lambda text: len(text.split())  # noqa: E731
    tokens = words
    if settings.tokenizer is not None:
        from posttrain.models import load_tokenizer

        tokenizer = load_tokenizer(Path(settings.tokenizer["path"]))

        def tokens(text: str) -> list[str]:
            return [str(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

        def count_tokens(text: str) -> int:
            return len(tokens(text))

    return Instruments(
        settings,
        detector(settings.language),
        count_tokens,
        tokens,
        sentence_encoder(Path(settings.embedding["path"])) if settings.embedding else None,
        reward_scorer(Path(settings.reward_model["path"])) if settings.reward_model else None,
        {name: load_tag(name, target) for name, target in settings.tags.items()},
    )


def reward_scorer(path: Path) -> Callable[[Sequence[Record]], Floats]:
    """A function from records to rewards (n,), NaN where the chat template refuses the dialogue.

    Dialogues longer than the model's positions lose their beginning. Raises UserError.
    """
    import torch
    from jinja2 import TemplateError

    from posttrain.models import load_chat_tokenizer, load_reward_model, score_ids, whole_dialogue

    model, calibration = load_reward_model(path)
    tokenizer = load_chat_tokenizer(path)
    longest = int(model.config.max_position_embeddings)

    def ids(record: Record) -> list[int]:
        dialogue = [*record.messages, {"role": "assistant", "content": record.answer or ""}]
        try:
            text = whole_dialogue(tokenizer, dialogue)
        except TemplateError:
            return []
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])[-longest:]

    def score(records: Sequence[Record]) -> Floats:
        scores = np.full(len(records), np.nan, dtype=np.float32)
        rows = [(i, dialogue) for i, record in enumerate(records) if (dialogue := ids(record))]
        rows.sort(key=lambda row: len(row[1]))
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            width = max(len(row) for _, row in batch)
            padded = torch.tensor([row + [0] * (width - len(row)) for _, row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for _, row in batch])
            with torch.inference_mode():
                rewards = score_ids(model, calibration, padded, mask)
            scores[[i for i, _ in batch]] = rewards.float().numpy()
        return scores

    return score


def load_tag(name: str, target: str) -> Callable[[dict[str, Any]], Any]:
    """The function `target` ("module:function") of --tag; the working directory is searched last.

    Raises UserError: not of that form, not importable, no such function.
    """
    module_name, _, function = target.partition(":")
    if not module_name or not function.isidentifier():
        raise UserError(f"--tag {name}={target}: is not NAME=module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"--tag {name}={target}: the module cannot be imported ({error})\n"
            "    put its directory on PYTHONPATH, or run the command there"
        ) from error
    found = vars(module).get(function)
    if not callable(found):
        raise UserError(f"--tag {name}={target}: {module_name} has no function {function}")
    return found


def tag_values(name: str, tag: Callable[[dict[str, Any]], Any], records: Sequence[Record]) -> list[Any]:
    """The tag of every record: all bool, or all numbers. Raises DataError for anything else."""
    values = [tag(record.as_dict()) for record in records]
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    kinds = {bool if isinstance(value, bool) else type(value) for value in values}
    if not (kinds == {bool} or kinds <= {int, float}):
        raise DataError(
            f"--tag {name}: gave {', '.join(sorted(kind.__name__ for kind in kinds))}\n"
            "    a tag function returns True or False for every record, or a number for every record"
        )
    return values
