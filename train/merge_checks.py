"""The proof that a merged model computes what the adapter computed: logits, and greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.dataset import read_split
from posttrain.errors import PosttrainError
from posttrain.stage import StageContext
from train.merge_config import MergeConfig

SAMPLES = 16
PROMPTS = 8
PROMPT_TOKENS = 16
"""Of prompts that are cut out of plain text or ids."""


@dataclass(frozen=True)
class Samples:
    """texts: token ids (1, T) to compare logits on. prompts: token ids (1, T) to continue."""

    texts: list[Tensor]
    prompts: list[Tensor]


@dataclass(frozen=True)
class Answer:
    """What a model wrote greedily: token ids, and the scores (T, V) they are the largest of."""

    ids: list[int]
    scores_TV: Tensor


@dataclass(frozen=True)
class Agreement:
    """Greedy answers compared. tokens: those before the first difference of each prompt; ties: differences
    between tokens whose scores were equal within the tolerance; first: the first other difference, in words.
    """

    tokens: int
    mismatches: int
    ties: int
    first: str | None


def read_samples(
    config: MergeConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> Samples:
    """Dialogues and prompts of `data`, else ids that span the vocabulary."""
    longest = min(256, model_config.max_position_embeddings)
    room = max(1, longest - config.greedy_tokens)
    if config.data is None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(model_config.vocab_size, generator=generator)[: SAMPLES * longest]
        prompts = order.split(min(PROMPT_TOKENS, room))[:PROMPTS]
        return Samples([chunk[None] for chunk in order.split(longest)], [chunk[None] for chunk in prompts])
    split = read_split(context.path("data"), "eval", None)
    rows = [split[index] for index in range(min(SAMPLES, len(split)))]
    encode = {"add_special_tokens": False}
    whole: Any = tokenizer([_text(row, tokenizer) for row in rows], **encode)["input_ids"]
    begun: Any = tokenizer([_prompt(row, tokenizer) for row in rows[:PROMPTS]], **encode)["input_ids"]
    if "text" in rows[0]:
        begun = [ids[:PROMPT_TOKENS] for ids in begun]
    return Samples(
        [torch.tensor([ids[:longest]]) for ids in whole], [torch.tensor([ids[-room:]]) for ids in begun]
    )


def _text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in row:
        return str(row["text"])
    messages = row["messages"] if "messages" in row else row["prompt"] + row.get("chosen", [])
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """What precedes the last answer, with the beginning of the assistant's turn."""
    if "text" in row:
        return str(row["text"])
    messages = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def logits_of(model: torch.nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
    """Logits (1, T, V) of each text, or scores (1, 1) of a reward model, as float32."""
    return [
        model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits.float()
        for ids_1T in texts
    ]


def largest_gap(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Tensor], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """The most probable continuation of each prompt, up to `length` tokens or the end token; none if 0."""
    if not length:
        return []
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    answers = []
    for ids_1T in prompts:
        result = model.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings
        )
        ids = result.sequences[0, ids_1T.shape[1] :].tolist()
        answers.append(Answer(ids, torch.cat(result.scores).float()))
    return answers


def compare_greedy(
    expected: Sequence[Answer],
    actual: Sequence[Answer],
    tolerance: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Agreement:
    """Where answers differ first, prompt by prompt; what follows a difference is not compared.

    Scores that are each off by up to `tolerance` can change places when they are 2 * tolerance apart: a tie.
    """
    tokens = mismatches = ties = 0
    first = None
    for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
        places = (place for place, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b)
        place = next(places, None)
        tokens += len(one.ids) if place is None else place
        if place is None:
            continue
        a, b = one.ids[place], other.ids[place]
        gap = (one.scores_TV[place, a] - one.scores_TV[place, b]).item()
        if gap <= 2 * tolerance:
            ties += 1
            continue
        mismatches += 1
        if first is None:
            first = (
                f"prompt {number}, token {place}: the adapter writes {tokenizer.decode([a])!r} ({a}), the "
                f"merged model {tokenizer.decode([b])!r} ({b}), which the adapter scores {gap:.3g} lower; "
                f"before that both write {tokenizer.decode(one.ids[:place])!r}"
            )
    return Agreement(tokens, mismatches, ties, first)


def check_merge(difference: float, change: float, tolerance: float) -> None:
    """Raise PosttrainError when the merge altered the function, or altered nothing."""
    if not difference <= tolerance:
        raise PosttrainError(
            f"merged logits differ from the adapter's by {difference:.3g}, more than "
            f"tolerance={tolerance:.3g}. Nothing was written. Large differences come from tied weights or "
            "modules_to_save; small ones from rounding, for which the tolerance may be raised."
        )
    if change == 0:
        raise PosttrainError(
            "the merged model computes what the base model computes: the adapter does nothing"
        )


def check_greedy(agreement: Agreement) -> None:
    """Raise PosttrainError when the merged model writes something else than the adapter."""
    if agreement.mismatches:
        raise PosttrainError(
            f"the merged model's greedy answers differ from the adapter's on {agreement.mismatches} prompts. "
            f"Nothing was written. The first: {agreement.first}."
        )


def check_saved(saved: PreTrainedModel, merged: PreTrainedModel) -> None:
    """Raise PosttrainError unless what was read back are exactly the weights in memory."""
    there = saved.state_dict()
    wrong = [name for name, value in merged.state_dict().items() if not torch.equal(value, there[name])]
    if wrong:
        raise PosttrainError(f"{len(wrong)} tensors read back differ from the merged ones: {wrong[:3]}")
