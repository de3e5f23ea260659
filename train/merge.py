"""Folding a LoRA adapter, or several, into the base model, with proof that the result computes the same.

    posttrain merge model=runs/tiny/sft --output runs/merged

The sum W + (alpha / r) B A is made in float32, whatever the type it is saved in. Before ``model/`` is
written: the logits of adapter and merged model differ by at most ``tolerance``, and their greedy answers are
the same; the merged weights differ from the base; and the directory, read back, holds exactly the merged
weights (rounded to ``dtype``). How far rounding moves the logits is a metric. Works for causal language
models and for reward models, whose head and calibration are carried over. Configuration files are written so
that transformers 4 reads them too.

Several adapters of one base (``adapters:``) are combined by peft's add_weighted_adapter; the comparison is
then between the combined adapter and the merged weights.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from peft import PeftModel, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.models import load_tokenizer
from posttrain.portable import make_portable
from posttrain.stage import StageContext
from train.adapters import torch_dtype
from train.merge_checks import (
    Answer,
    Samples,
    check_greedy,
    check_merge,
    check_saved,
    compare_greedy,
    greedy,
    largest_gap,
    logits_of,
    read_samples,
)
from train.merge_config import MergeConfig
from train.merge_load import Adapted, load_adapted
from train.peft_setup import quiet_libraries

CALIBRATION_FILE = "reward_calibration.json"


def run(config: MergeConfig, context: StageContext) -> dict[str, Any]:
    """Merge and write ``model/``.

    Raises:
        UserError: an input is not an adapter, its base model is gone, or adapters cannot be combined.
        PosttrainError: the merged model is not the adapted one.
    """
    quiet_libraries()
    paths = [context.path(field) for field in config.refs]
    say_what_was_quantised(config, context)
    with context.phase("load"):
        adapted = load_adapted(paths, config)
        tokenizer = load_tokenizer(paths[0])
        samples = read_samples(config, context, tokenizer, adapted.model.config.get_text_config())
    comparison = Comparison(config, samples, tokenizer, adapted)
    if config.output == "adapter":
        return facts(config, context) | save_adapter(context, adapted, tokenizer, comparison)
    with context.phase("merge"):
        merged: Any = adapted.model.merge_and_unload(safe_merge=True, adapter_names=[adapted.name])
        metrics = comparison.of(merged)
    merged.to(torch_dtype(config.dtype))
    set_special_tokens(merged, tokenizer)
    with context.phase("save"), context.staging("model") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_portable(folder, str(tokenizer.chat_template))
        if (paths[0] / CALIBRATION_FILE).exists():
            shutil.copyfile(paths[0] / CALIBRATION_FILE, folder / CALIBRATION_FILE)
        saved = adapted.loader.from_pretrained(folder, dtype=merged.dtype).eval()
        check_saved(saved, merged)
        metrics |= comparison.as_saved(saved)
    return facts(config, context) | metrics | {"dtype": config.dtype}


class Comparison:
    """What the adapter computes, taken before it is merged, and comparisons with it."""

    def __init__(
        self, config: MergeConfig, samples: Samples, tokenizer: PreTrainedTokenizerBase, adapted: Adapted
    ):
        self._config, self._samples, self._tokenizer = config, samples, tokenizer
        writes = adapted.model.peft_config[adapted.name].task_type == TaskType.CAUSAL_LM
        self._length = config.greedy_tokens if writes else 0
        self._logits = logits_of(adapted.model, samples.texts)
        self._answers = self._greedy(adapted.model)
        with adapted.model.disable_adapter():
            self._base = logits_of(adapted.model, samples.texts)

    def of(self, merged: Any) -> dict[str, Any]:
        """Metrics of the comparison. Raises PosttrainError where the two are not the same model."""
        logits = logits_of(merged, self._samples.texts)
        difference, change = largest_gap(logits, self._logits), largest_gap(logits, self._base)
        check_merge(difference, change, self._config.tolerance)
        agreement = compare_greedy(
            self._answers, self._greedy(merged), self._config.tolerance, self._tokenizer
        )
        check_greedy(agreement)
        metrics = {
            "max_logit_difference": difference,
            "tolerance": self._config.tolerance,
            "compared_tokens": sum(ids_1T.shape[1] for ids_1T in self._samples.texts),
            "max_logit_change_from_base": change,
        }
        if self._length:
            metrics |= {
                "greedy_prompts": len(self._answers),
                "greedy_tokens": agreement.tokens,
                "greedy_mismatches": agreement.mismatches,
                "greedy_ties": agreement.ties,
            }
        return metrics

    def as_saved(self, saved: Any) -> dict[str, Any]:
        """The same of the model in the type it was saved in, where rounding decides; nothing is refused."""
        difference = largest_gap(logits_of(saved, self._samples.texts), self._logits)
        metrics: dict[str, Any] = {"max_logit_difference_as_saved": difference}
        if self._length:
            agreement = compare_greedy(self._answers, self._greedy(saved), 0.0, self._tokenizer)
            metrics["greedy_mismatches_as_saved"] = agreement.mismatches
        return metrics

    def _greedy(self, model: Any) -> list[Answer]:
        return greedy(model, self._samples.prompts, self._length, self._tokenizer)


def save_adapter(
    context: StageContext, adapted: Adapted, tokenizer: PreTrainedTokenizerBase, comparison: Comparison
) -> dict[str, Any]:
    """Write the combined adapter as ``model/`` and compare it, read back onto its base.

    Raises:
        PosttrainError: it is not the adapter in memory.
    """
    with context.phase("save"), context.staging("model") as folder:
        adapted.model.save_pretrained(str(folder), selected_adapters=[adapted.name])
        for file in (folder / adapted.name).iterdir():
            file.rename(folder / file.name)
        (folder / adapted.name).rmdir()
        (folder / "README.md").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        base = adapted.loader.from_pretrained(adapted.base, dtype=torch.float32, **adapted.options)
        metrics = comparison.of(PeftModel.from_pretrained(base, folder).eval())
    settings = vars(adapted.model.peft_config[adapted.name])
    return metrics | {"adapter_rank": settings["r"], "dtype": "float32"}


def facts(config: MergeConfig, context: StageContext) -> dict[str, Any]:
    """What the metrics say besides comparisons: how adapters were combined, and what they were trained on."""
    found: dict[str, Any] = {}
    if config.adapters is not None:
        found |= {"adapters": len(config.adapters), "method": config.method or "cat"}
    quantised = sorted(set(quantised_inputs(config, context).values()))
    return found | ({"trained_on": ", ".join(quantised)} if quantised else {})


def quantised_inputs(config: MergeConfig, context: StageContext) -> dict[str, str]:
    """Adapters that were trained on a quantised base -> how it was quantised, by their runs' manifests."""
    runs = {ref: context.inputs[field].manifest for field, ref in config.refs.items()}
    kinds = {ref: (manifest or {}).get("metrics", {}).get("quantization") for ref, manifest in runs.items()}
    return {ref: kind for ref, kind in kinds.items() if kind}


def say_what_was_quantised(config: MergeConfig, context: StageContext) -> None:
    """One line for each adapter that was trained on something else than what it is merged into."""
    for ref, kind in quantised_inputs(config, context).items():
        context.console.print(
            f"merge: {ref} was trained on a base in {kind}; it goes into the unquantised base, which is not "
            "quite the model it was trained on: evaluate the result",
            highlight=False,
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
