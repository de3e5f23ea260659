"""Base model: train a tokenizer and pretrain a small Llama-architecture model from scratch.

    posttrain run configs/tiny/pipeline.yaml --only base

The embedded default needs a model that nothing has to download and that a laptop makes in two minutes. Hidden
matrices are optimised with Muon (Jordan et al. 2024), embeddings, head and norms with AdamW: measured on this
corpus, AdamW alone had not learned to copy identifiers from the prompt after four minutes, Muon has after
one. The loss is the language-modelling loss, with the tokens outside assistant turns weighted down: the
desk's notes are random facts, and predicting them would drown the gradient of what can be learnt, to read
them. Sequences of similar length share a batch.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from data_prep.dataset import read_split
from posttrain.errors import DataError, PosttrainError, RequeueError
from posttrain.preemption import PreemptionFlag
from posttrain.stage import StageContext
from train.base_config import BaseConfig
from train.checkpoints import discard_incomplete, last_complete_checkpoint, mark_complete, step_of
from train.peft_setup import quiet_libraries
from train.tokenizer import build_tokenizer


def run(config: BaseConfig, context: StageContext) -> dict[str, Any]:
    """Train a tokenizer and a model, and write ``model/``.

    Raises:
        DataError: a data set of another kind than text or conversation.
        PosttrainError: the loss is not finite.
        RequeueError: SIGTERM came; there is a checkpoint of the step it stopped at.
    """
    quiet_libraries()
    rows = {split: read_split(context.path("data"), split) for split in ("train", "eval")}
    with context.phase("tokenizer"):
        tokenizer = build_tokenizer(
            _plain_texts(rows["train"]),
            config.vocab_size,
            config.architecture.max_position_embeddings,
            config.keep_whole,
        )
        sequences = {
            split: encode(tokenizer, data, config.max_length, config.prompt_loss_weight)
            for split, data in rows.items()
        }
    model = build_model(config, tokenizer)
    with context.phase("train"):
        _pretrain(model, sequences["train"], config, context)
    with context.phase("evaluate"):
        eval_loss = evaluate(model, sequences["eval"], tokenizer.pad_token_id)
    with context.staging("model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    context.log(config.steps, eval_loss=eval_loss)
    return {
        "eval_loss": eval_loss,
        "eval_perplexity": math.exp(eval_loss),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "train_sequences": len(sequences["train"]),
    }


def build_model(config: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A freshly initialised model whose special token ids are the tokenizer's."""
    torch.manual_seed(config.seed)
    size = config.architecture
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=size.num_attention_heads,
            max_position_embeddings=size.max_position_embeddings,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _plain_texts(rows: Dataset) -> list[str]:
    if "text" in rows.column_names:
        return list(rows["text"])
    return [f"{turn['role']}\n{turn['content']}" for messages in rows["messages"] for turn in messages]


@dataclass(frozen=True)
class Sequence:
    """Token ids and the loss weight of each, of equal length."""

    ids: list[int]
    weights: list[float]


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int, prompt_loss_weight: float
) -> list[Sequence]:
    """Tokenize a dataset of kind text (weight 1 everywhere) or conversation (assistant turns weigh 1)."""
    if "text" in rows.column_names:
        texts = [text + tokenizer.eos_token for text in rows["text"]]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        masks = [[1] * len(ids) for ids in encoded]
    elif "messages" in rows.column_names:
        rendered: Any = tokenizer.apply_chat_template(
            list(rows["messages"]), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded, masks = rendered["input_ids"], rendered["assistant_masks"]
    else:
        raise DataError(
            f"the base stage reads a dataset of kind text or conversation, this one has {rows.column_names}"
        )
    return [
        Sequence(ids[:max_length], [1.0 if bit else prompt_loss_weight for bit in mask[:max_length]])
        for ids, mask in zip(encoded, masks, strict=True)
    ]


def batches(lengths: list[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row indices of ``steps`` batches: a new shuffle each epoch, and rows of like length together."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[list[int]] = []
    for _ in range(steps):
        if not queue:
            order = torch.randperm(len(lengths), generator=generator).tolist()
            window = batch_size * 16
            for start in range(0, len(order), window):
                near = sorted(order[start : start + window], key=lengths.__getitem__)
                queue += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            queue = [queue[i] for i in torch.randperm(len(queue), generator=generator).tolist()]
        yield queue.pop()


def collate(sequences: list[Sequence], pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """Right-pad: ``input_ids``, ``attention_mask`` and ``weights`` (0 on padding), each (batch, time)."""
    width = max(len(sequence.ids) for sequence in sequences)
    assert pad_token_id is not None
    ids_BT = torch.full((len(sequences), width), pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    weights_BT = torch.zeros(ids_BT.shape)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids_BT[row, :length] = torch.tensor(sequence.ids)
        mask_BT[row, :length] = 1
        weights_BT[row, :length] = torch.tensor(sequence.weights)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "weights": weights_BT}


def weighted_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of weight x negative log-likelihood (nats) over predicted tokens, and the sum of the weights."""
    logits_BTV = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    weights = batch["weights"][:, 1:].flatten()
    nll = F.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return (nll * weights).sum(), weights.sum()


def build_optimizers(model: LlamaForCausalLM, config: BaseConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings (tied head) and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=config.matrix_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up over ``warmup`` steps, constant, then linear decay to zero over the last 30 %."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (total - step) / (0.3 * total))


@dataclass
class _State:
    """Everything a resumed run needs besides the configuration and the data."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[torch.optim.lr_scheduler.LambdaLR]

    @property
    def parts(self) -> list[Any]:
        """What is saved, in a fixed order."""
        return [self.model, *self.optimizers, *self.schedulers]

    def save(self, root: Path, step: int) -> None:
        """Write ``checkpoint-<step>``, its marker last, and drop older checkpoints."""
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.save([part.state_dict() for part in self.parts], folder / "state.pt")
        mark_complete(folder)
        for other in root.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)

    def load(self, root: Path) -> int:
        """Restore the last complete checkpoint and return its step; 0 where there is none."""
        discard_incomplete(root)
        folder = last_complete_checkpoint(root)
        if folder is None:
            return 0
        saved = torch.load(folder / "state.pt", weights_only=True)
        for part, values in zip(self.parts, saved, strict=True):
            part.load_state_dict(values)
        return step_of(folder)


def _pretrain(
    model: LlamaForCausalLM, sequences: list[Sequence], config: BaseConfig, context: StageContext
) -> None:
    optimizers = build_optimizers(model, config)
    factor = partial(learning_rate_factor, warmup=config.warmup_steps, total=config.steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    state = _State(model, optimizers, schedulers)
    done = state.load(context.checkpoints)
    context.rewind(done)
    lengths = [len(sequence.ids) for sequence in sequences]
    plan = islice(batches(lengths, config.batch_size, config.steps, config.seed), done, None)
    model.train()
    with PreemptionFlag() as flag, context.progress("pretraining", total=config.steps) as bar:
        bar.advance(done)
        for step, rows in enumerate(plan, start=done + 1):
            batch = collate([sequences[row] for row in rows], model.config.pad_token_id)
            loss = _step(model, batch, state, config.bf16)
            if not math.isfinite(loss):
                raise PosttrainError(f"pretraining loss is {loss} at step {step}: lower learning_rate")
            bar.advance()
            if step % config.log_every == 0 or step == config.steps:
                bar.update(text=f"loss {loss:.3f}")
                context.log(step, loss=loss, learning_rate=schedulers[1].get_last_lr()[0])
            stop = flag.requested
            if stop or (step % config.save_every == 0 and step < config.steps):
                state.save(context.checkpoints, step)
            if stop:
                raise RequeueError(f"step {step} of {config.steps}")
    model.eval()


def _step(model: LlamaForCausalLM, batch: dict[str, Tensor], state: _State, bf16: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total, weight = weighted_loss(model, batch)
    loss = total / weight
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, scheduler in zip(state.optimizers, state.schedulers, strict=True):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, sequences: list[Sequence], pad_token_id: int | None) -> float:
    """Weighted mean negative log-likelihood per predicted token, in nats."""
    sums = [
        weighted_loss(model, collate(sequences[start : start + 64], pad_token_id))
        for start in range(0, len(sequences), 64)
    ]
    return float(sum(total for total, _ in sums) / sum(weight for _, weight in sums))
