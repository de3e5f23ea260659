"""Merge: fold a LoRA adapter into its base model, and prove that the result computes the same.

    posttrain merge model=runs/tiny/sft --output runs/merged

The sum W + (alpha / r) B A is made in float32, whatever the type it is saved in. Three checks stand between
the merge and ``model/``: the logits of adapter and merged model differ by at most ``tolerance``; the merged
weights differ from the base; and the directory, read back, holds exactly the merged weights (rounded to
``dtype``). Works for causal language models and for reward models, whose head and calibration are carried
over.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data_prep.dataset import read_split
from posttrain.errors import PosttrainError, UserError
from posttrain.models import is_adapter, load_tokenizer
from posttrain.stage import StageContext
from train.adapters import torch_dtype
from train.config import MergeConfig
from train.peft_setup import quiet_libraries

CALIBRATION_FILE = "reward_calibration.json"
SAMPLES = 16


def run(config: MergeConfig, context: StageContext) -> dict[str, Any]:
    """Merge and write ``model/``.

    Raises:
        UserError: `model` is not an adapter, or its base model is gone.
        PosttrainError: the merged model is not the adapted one.
    """
    quiet_libraries()
    source = context.path("model")
    with context.phase("load"):
        adapted, loader = load_adapted(source, config.model)
        tokenizer = load_tokenizer(source)
        samples = sample_ids(config, context, tokenizer, adapted.config.get_text_config())
    with context.phase("merge"):
        expected = [_logits(adapted, ids_1T) for ids_1T in samples]
        with adapted.disable_adapter():
            untouched = [_logits(adapted, ids_1T) for ids_1T in samples]
        merged = adapted.merge_and_unload(safe_merge=True)
        actual = [_logits(merged, ids_1T) for ids_1T in samples]
    difference, change = largest_gap(actual, expected), largest_gap(actual, untouched)
    check_merge(difference, change, config.tolerance)

    merged.to(torch_dtype(config.dtype))
    set_special_tokens(merged, tokenizer)
    with context.phase("save"), context.staging("model") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (source / CALIBRATION_FILE).exists():
            shutil.copyfile(source / CALIBRATION_FILE, folder / CALIBRATION_FILE)
        check_saved(folder, merged, loader)
    return {
        "max_logit_difference": difference,
        "tolerance": config.tolerance,
        "compared_tokens": sum(ids_1T.shape[1] for ids_1T in samples),
        "max_logit_change_from_base": change,
        "dtype": config.dtype,
    }


def load_adapted(path: Path, ref: str) -> tuple[PeftModel, Any]:
    """The base model in float32 under its adapter, in evaluation mode, and the class that loads such a model.

    Raises:
        UserError: `path` is not a PEFT directory, or the base model it names does not exist.
    """
    if not is_adapter(path):
        raise UserError(
            f"model: {ref} has no adapter_config.json: it is a full model already, there is nothing to merge"
        )
    settings = PeftConfig.from_pretrained(str(path))
    base = settings.base_model_name_or_path
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"model: the adapter {path} belongs to the base model {base}, which is not there any more. Put "
            "it back, or correct base_model_name_or_path in adapter_config.json."
        )
    classifier = settings.task_type == TaskType.SEQ_CLS
    loader: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options = {"num_labels": 1} if classifier else {}
    model = loader.from_pretrained(base, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(model, path).eval(), loader


def sample_ids(
    config: MergeConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> list[torch.Tensor]:
    """Token ids to compare on, each (1, T): dialogues of `data`, else ids that span the vocabulary."""
    longest = min(256, model_config.max_position_embeddings)
    if config.data is None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(model_config.vocab_size, generator=generator)[: SAMPLES * longest]
        return [chunk[None] for chunk in order.split(longest)]
    rows = read_split(context.path("data"), "eval", None)
    texts = [_text(rows[index], tokenizer) for index in range(min(SAMPLES, len(rows)))]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
    return [torch.tensor([ids]) for ids in encoded]


def _text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in row:
        return row["text"]
    messages = row["messages"] if "messages" in row else row["prompt"] + row.get("chosen", [])
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


@torch.no_grad()
def _logits(model: torch.nn.Module, ids_1T: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits.float()


def largest_gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


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


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make configuration and generation configuration end and pad with the tokenizer's tokens."""
    text_config = model.config.get_text_config()
    text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if model.can_generate():
        generation = model.generation_config
        generation.pad_token_id = tokenizer.pad_token_id
        stops = generation.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        others = [stop for stop in stops if stop != tokenizer.eos_token_id]
        generation.eos_token_id = [tokenizer.eos_token_id, *others] if others else tokenizer.eos_token_id


def check_saved(folder: Path, merged: PreTrainedModel, loader: Any) -> None:
    """Raise PosttrainError unless the directory loads to exactly the weights in memory."""
    saved = loader.from_pretrained(folder, dtype=merged.dtype).state_dict()
    wrong = [name for name, value in merged.state_dict().items() if not torch.equal(value, saved[name])]
    if wrong:
        raise PosttrainError(
            f"{folder}: {len(wrong)} tensors read back differ from the merged ones: {wrong[:3]}"
        )
