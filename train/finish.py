"""The end of every training stage: train to the end, check that something was learned, save."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Trainer

from posttrain.stage import StageContext
from train.callbacks import fit
from train.peft_setup import check_learned, save_model, snapshot


def train_and_save(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    description: str,
    *,
    tokens_in_state: bool = False,
    stop_period: int = 1,
) -> dict[str, float]:
    """Train from the last complete checkpoint, write ``model/``, return the last metrics.

    tokens_in_state: see `RunCallback`. stop_period: see `StopCallback`.

    Raises:
        RequeueError: SIGTERM came; there is a checkpoint of the step it stopped at.
        PosttrainError: the loss is not finite, nothing was learned, or what was saved is not what was
        trained.
    """
    before = snapshot(trainer)
    with context.phase("train"):
        metrics = fit(trainer, context, description, tokens_in_state=tokens_in_state, stop_period=stop_period)
    check_learned(trainer, before)
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder)
    return metrics
