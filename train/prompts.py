"""What ppo, grpo and rloo do before a policy answers: read the prompts that fit, settle how answers end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.dataset import Split, read_split
from posttrain.errors import UserError
from posttrain.stage import StageContext
from train.merge import set_special_tokens
from train.ppo.rollout import encode_prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts that fit: their token ids, their rows in the data set, and how many did not."""

    ids: list[list[int]]
    rows: Dataset
    dropped: int


def read_prompts(
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    max_prompt_tokens: int,
    stage: str,
    limit: int | None = None,
) -> Prompts:
    """The prompts of one split, at most `limit`, without those over max_prompt_tokens.

    stage: its name, for the line that says how many were dropped. Raises DataError when none is left.
    """
    rows = read_split(context.path("data"), split, "prompt")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    ids, kept = encode_prompts(rows["prompt"], tokenizer, max_prompt_tokens)
    dropped = len(rows) - len(kept)
    if dropped:
        context.console.print(
            f"{stage}: dropped {dropped} of {len(rows)} {split} prompts, longer than "
            f"max_prompt_tokens={max_prompt_tokens}"
        )
    return Prompts(ids, rows.select(kept), dropped)


def check_positions(name: str, model: PreTrainedConfig, lengths: Mapping[str, int]) -> None:
    """Raise UserError when prompt and response do not fit the context of a model of this configuration.

    name: the field that names the model. lengths: the longest prompt and response, by field.
    """
    longest, limit = sum(lengths.values()), model.get_text_config().max_position_embeddings
    if longest > limit:
        parts = " + ".join(f"{field} {length}" for field, length in lengths.items())
        raise UserError(
            f"{parts} = {longest} tokens, but the model in `{name}` reads at most {limit}: lower one of the "
            "two"
        )


def end_with(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's generation settings, ending with the tokenizer's end token, in a form that can be saved.

    Some published models name a temperature without saying that they sample, which transformers reads but
    refuses to write; better found out before training than after it.
    """
    set_special_tokens(model, tokenizer)
    generation_config = model.generation_config
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True
        generation_config.validate(strict=True)
    return generation_config
