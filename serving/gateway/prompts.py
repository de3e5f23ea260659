"""From a conversation to the text that Triton gets, with the exported tokenizer and its chat template.

The template is the one the model was trained with: the export's tokenizer is loaded with the same function as
everywhere in this package, and its fingerprints must be those the export wrote down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer
from posttrain.models import load_tokenizer
from serving.gateway.errors import ApiError, shown
from serving.repository import MANIFEST, read_index, weights_dir

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class ExportLimits:
    """What the export says a request may ask for. Characters of the prompt; tokens of the answer, of both."""

    max_prompt_characters: int
    max_output_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt and its length in tokens, as the server will count them."""

    text: str
    tokens: int


class Renderer:
    """Renders and counts. One thread does the work: a fast tokenizer must not be used by several at once."""

    def __init__(self, tokenizer: Any, name: str, limits: ExportLimits, threads: ThreadPoolExecutor) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.limits = limits
        self.threads = threads
        added = tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
        self.special_ids = special - {tokenizer.unk_token_id}

    async def chat(self, messages: Messages, special_tokens: str) -> Prompt:
        """A conversation, ready for the answer to it.

        Raises ApiError 400: too long, a special token inside a message, or refused by the template.
        """
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        return await self._in_thread(self._render_and_count, messages, special_tokens == "refuse")

    async def text(self, prompt: str) -> Prompt:
        """A prompt that is sent as it is. Raises ApiError 400 when it is empty or too long."""
        self._check_length(len(prompt), "prompt")
        return await self._in_thread(self._count, prompt, "prompt")

    async def _in_thread(self, work: Any, *arguments: Any) -> Prompt:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _render_and_count(self, messages: Messages, refuse_special: bool) -> Prompt:
        import jinja2

        if refuse_special:
            self._check_special(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ApiError(
                400,
                f"the model's chat template refuses these messages: {shown(str(error), 200)}",
                param="messages",
            ) from error
        return self._count(text, "messages")

    def _count(self, text: str, param: str) -> Prompt:
        self._check_length(len(text), param)
        tokens = len(self.tokenizer(text)["input_ids"])
        if tokens == 0:
            raise ApiError(400, f"{param} holds no tokens", param=param)
        if tokens >= self.limits.max_model_len:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens, which leaves no room for an answer in the model's "
                f"{self.limits.max_model_len}",
                param=param,
                code="context_length_exceeded",
            )
        return Prompt(text, tokens)

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.limits.max_prompt_characters:
            raise ApiError(
                400,
                f"the prompt has {characters} characters, at most {self.limits.max_prompt_characters} "
                "are accepted",
                param=param,
                code="context_length_exceeded",
            )

    def _check_special(self, messages: Messages) -> None:
        """By token id, so that a spelling which the tokenizer normalises into a special token counts too."""
        for index, message in enumerate(messages):
            ids = self.tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            if found := self.special_ids.intersection(ids):
                token = self.tokenizer.convert_ids_to_tokens(min(found))
                raise ApiError(
                    400,
                    f"messages[{index}].content holds the special token {token}, which would be read as "
                    "the end or the beginning of a turn",
                    param=f"messages[{index}].content",
                    code="special_token_in_message",
                )

    def answer_tokens(self, prompt: Prompt, wanted: int | None, default: int | None, param: str) -> int:
        """max_tokens of a request: `wanted`, else `default`, else all that fits.

        Raises ApiError 400 when what is wanted does not fit.
        """
        room = self.limits.max_model_len - prompt.tokens
        longest = min(self.limits.max_output_tokens, room)
        if wanted is None:
            return longest if default is None else min(default, longest)
        if wanted > self.limits.max_output_tokens:
            raise ApiError(
                400, f"{param} is {wanted}; at most {self.limits.max_output_tokens} are accepted", param=param
            )
        if wanted > room:
            raise ApiError(
                400,
                f"the prompt's {prompt.tokens} tokens and {param}={wanted} are more than the model's "
                f"{self.limits.max_model_len}",
                param=param,
                code="context_length_exceeded",
            )
        return wanted


def load_renderer(export_dir: Path, version: int | None, threads: ThreadPoolExecutor) -> Renderer:
    """The tokenizer and limits of a version of an export (the newest by default). Weights are not read.

    Raises UserError when it is not an export, has no such version, or the version's tokenizer cannot be read
    or is not the one that was exported.
    """
    path = export_dir / MANIFEST
    try:
        manifest = _manifest_of(export_dir, version)
        limits = ExportLimits(
            **{key: manifest["limits"][key] for key in ("max_prompt_characters", "max_output_tokens")},
            max_model_len=manifest["max_model_len"],
        )
        name, fingerprints = manifest["name"], manifest["fingerprints"]
        weights = weights_dir(export_dir, manifest)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})\n    name the run directory of a `posttrain export`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not the manifest of an export ({error!r}); export again") from error
    try:
        exported = fingerprint_tokenizer(weights) == fingerprints
        tokenizer = load_tokenizer(weights) if exported else None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{weights}: its tokenizer cannot be read ({error}); export again") from error
    if tokenizer is None:
        raise UserError(
            f"{weights}: the tokenizer or its chat template is not the one that was exported; export again"
        )
    return Renderer(tokenizer, name, limits, threads)


def _manifest_of(export_dir: Path, version: int | None) -> dict[str, Any]:
    """A version's manifest. Raises UserError when there is none, and whatever a broken index gives."""
    index = read_index(export_dir)
    path = export_dir / MANIFEST
    if index is None:
        raise UserError(
            f"{path}: cannot be read (no such file)\n    name the run directory of a `posttrain export`"
        )
    versions: dict[str, dict[str, Any]] = index["versions"]
    chosen = str(version or index["version"])
    if chosen not in versions:
        raise UserError(
            f"{path}: has no version {chosen}; its versions are {', '.join(versions)}\n"
            "    set model_version to one of them, or leave it out for the newest"
        )
    return versions[chosen]
