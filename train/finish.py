"""The end of every training stage: train to the end, check that something was learned, save."""

from __future__ import annotations

from typing import Any

from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedTokenizerBase, Trainer

from posttrain.stage import StageContext
from train.adapters import Start
from train.callbacks import fit
from train.peft_setup import check_learned, save_model, snapshot


def train_and_save(
    trainer: Trainer,
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    description: str,
    *,
    tokens_in_state: bool = False,
) -> dict[str, Any]:
    """Train from the last complete checkpoint, write ``model/``, return the last metrics.

    start: what the trainer was built on. tokens_in_state: see `RunCallback`.

    Raises:
        PosttrainError: the loss is not finite, nothing was learned, or what was saved is not what was
        trained.
    """
    use_loraplus(trainer, start)
    before = snapshot(trainer)
    with context.phase("train"):
        metrics = fit(trainer, context, description, tokens_in_state=tokens_in_state)
    check_learned(trainer, before)
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder, start.others)
    return metrics | start.facts


def use_loraplus(trainer: Trainer, start: Start) -> None:
    """Give the trainer the optimizer of LoRA+ (Hayou et al. 2024, 2402.12354), if `start` asks for it.

    That is ``trainer.optim`` with its arguments, in peft's groups. The trainer makes an optimizer only where
    it has none, and saves and loads this one like its own.
    """
    if start.loraplus_lr_ratio is None:
        return
    model: Any = trainer.model
    kind, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    trainer.optimizer = create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=start.loraplus_lr_ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **arguments,
    )
