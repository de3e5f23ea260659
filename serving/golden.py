"""The golden set of an export: prompts with the trained model's greedy answers, stored beside the weights.

With it `posttrain parity` needs no original weights, only the export and a server. It is made from the model
as training left it, an adapter still unmerged on its base, and once more from the files that were written:

    columns of what is served without a lora_name     adapter | trained, merged | exported
    columns of each adapter served by name            adapter, merged

The first column is the reference. `base` has the answers without any adapter, by which parity recognises a
server that applies none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.context import StageContext
from posttrain.errors import UserError
from posttrain.hashing import adapter_base
from posttrain.models import is_adapter, load_causal_lm
from serving.config import ExportConfig
from serving.parity import as_served, generate_greedily, render, stop_tokens
from serving.prompts import Messages, general_prompts, select_prompts
from serving.repository import ADAPTERS, GOLDEN, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA_VERSION = 1
TOP = 5
CONTEXT_TOKENS = 6
PLAIN = ""


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    logprobs: of the answer's own tokens, in nats. top: per position [token id, log-probability] of the TOP
    likeliest tokens, likeliest first. finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    top: list[list[list[float]]]


@dataclass(frozen=True)
class GoldenSet:
    """What golden.json holds.

    prompts: {"messages", "text", "token_ids"} each. served: by lora_name (PLAIN: none given) the columns, the
    reference first. base: answers without an adapter, None where there is none.
    """

    dtype: str
    max_new_tokens: int
    stop_token_ids: list[int]
    prompts: list[dict[str, Any]]
    served: dict[str, dict[str, list[Answer]]]
    base: list[Answer] | None


def read_golden(version_dir: Path) -> GoldenSet | None:
    """The golden set of an exported version, None when it was made with golden_prompts: 0.

    Raises UserError when another release wrote it.
    """
    path = version_dir / GOLDEN
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    if value.pop("schema_version", None) != SCHEMA_VERSION:
        raise UserError(f"{path}: was not written by this version of posttrain; export again")
    served = {
        name: {column: [Answer(**answer) for answer in answers] for column, answers in columns.items()}
        for name, columns in value.pop("served").items()
    }
    base = value.pop("base")
    return GoldenSet(served=served, base=base and [Answer(**answer) for answer in base], **value)


def write_golden(version_dir: Path, golden: GoldenSet) -> None:
    """Write golden.json."""
    value = {"schema_version": SCHEMA_VERSION, **asdict(golden)}
    (version_dir / GOLDEN).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def golden_conversations(
    config: ExportConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Messages]:
    """Conversations of `prompts`, or general ones, whose prompts have at most `longest` tokens."""
    if config.prompts is None:
        return general_prompts(tokenizer, config.golden_prompts, longest)
    return select_prompts(context.path("prompts"), tokenizer, config.golden_prompts, longest)


class GoldenMaker:
    """Asks models the golden prompts, one after the other, each as it computes alone."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        context: StageContext,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.context = context
        self.prompts: list[dict[str, Any]] = []
        for messages in conversations:
            text = render(tokenizer, messages)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            self.prompts.append({"messages": messages, "text": text, "token_ids": ids})

    def ask(self, model: PreTrainedModel, what: str) -> list[Answer]:
        """The answers of `model`, which is named `what` in the progress line."""
        with as_served(model), self.context.progress(f"golden answers, {what}", len(self.prompts)) as bar:
            answers = []
            for prompt in self.prompts:
                answers.append(greedy_answer(model, self.tokenizer, prompt["token_ids"], self.max_new_tokens))
                bar.advance()
        return answers


def make_golden(
    maker: GoldenMaker, config: ExportConfig, trained: Path, adapters: dict[str, Path], written: Path
) -> GoldenSet:
    """Ask the trained model and what was written; one model is in memory at a time.

    Args:
        trained: the model as training left it; an adapter directory is asked unmerged on its base.
        adapters: those that are served by name on `trained`.
        written: version folder with weights/ and adapters/.
    """
    served: dict[str, dict[str, list[Answer]]] = {}
    base = None
    if is_adapter(trained):
        with unmerged(adapter_base(trained), trained, config.dtype) as model:
            stops = stop_tokens(model.get_base_model(), maker.tokenizer)
            served[PLAIN] = {"adapter": maker.ask(model.get_base_model(), "adapter")}
            with model.disable_adapter():
                base = maker.ask(model.get_base_model(), "base")
        del model
        served[PLAIN]["merged"] = maker.ask(_loaded(written / WEIGHTS, config.dtype), "merged")
    else:
        model = _loaded(trained, config.dtype)
        stops = stop_tokens(model, maker.tokenizer)
        served[PLAIN] = {"trained": maker.ask(model, "trained")}
        del model
        served[PLAIN]["exported"] = maker.ask(_loaded(written / WEIGHTS, config.dtype), "exported")
    for name, path in adapters.items():
        with unmerged(trained, path, config.dtype) as model:
            served[name] = {"adapter": maker.ask(model.get_base_model(), name)}
        del model
        with unmerged(written / WEIGHTS, written / ADAPTERS / name, config.dtype) as model:
            merged = model.merge_and_unload(safe_merge=True)
            served[name]["merged"] = maker.ask(merged, f"{name} merged")
        del model, merged
    return GoldenSet(config.dtype, maker.max_new_tokens, stops, maker.prompts, served, base)


@contextmanager
def unmerged(base: Path, adapter: Path, dtype: str) -> Iterator[Any]:
    """A PeftModel: the base with the adapter in place, in evaluation mode."""
    from peft import PeftModel

    yield PeftModel.from_pretrained(_loaded(base, dtype), str(adapter)).eval()


def _loaded(path: Path, dtype: str) -> PreTrainedModel:
    """The model on the GPU where there is one: a large one takes hours on a CPU."""
    import torch

    model = load_causal_lm(path, dtype=dtype)
    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]


def greedy_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> Answer:
    """`generate()` of one prompt, with the log-probabilities of the raw logits it chose by."""
    import torch

    output = generate_greedily(model, tokenizer, prompt_ids, max_new_tokens)
    ids = output.sequences[0, len(prompt_ids) :].tolist()
    logits_TV = torch.stack([step_1V[0] for step_1V in output.logits]).float()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1).cpu()
    likeliest = logprobs_TV.topk(min(TOP, logprobs_TV.shape[1]), dim=-1)
    chosen = logprobs_TV.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    ended = ids[-1] in stop_tokens(model, tokenizer)
    return Answer(
        token_ids=ids,
        logprobs=[round(value, 6) for value in chosen],
        text=answer_text(tokenizer, prompt_ids, ids),
        finish_reason="stop" if ended else "length",
        top=[
            [[token, round(value, 6)] for token, value in zip(tokens, values, strict=True)]
            for tokens, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ],
    )


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int]) -> str:
    """The answer's text, decoded behind the prompt's end so that a leading space survives."""
    context = prompt_ids[-CONTEXT_TOKENS:]
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(context, **options), tokenizer.decode(context + ids, **options)
    return str(whole)[len(before) :]
