"""The end of every training stage: train to the end, check that something was learned, save."""

from __future__ import annotations

from typing import Any

from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedTokenizerBase, Trainer

from posttrain.stage import StageContext
from train.adapters import Start
from train.callbacks import fit
from train.peft_setup import REFERENCE, check_learned, save_model, snapshot


def train_and_save(
    trainer: Trainer,
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    description: str,
    *,
    tokens_in_state: bool = False,
    stop_period: int = 1,
) -> dict[str, Any]:
    """Train from the last complete checkpoint, write ``model/``, return the last metrics.

    start: what the trainer was built on. tokens_in_state: see `RunCallback`. stop_period: see `StopCallback`.

    Raises:
        RequeueError: SIGTERM came; there is a checkpoint of the step it stopped at.
        PosttrainError: the loss is not finite, nothing was learned, or what was saved is not what was
        trained.
    """
    make_ready(trainer, start)
    before = snapshot(trainer)
    with context.phase("train"):
        metrics = fit(trainer, context, description, tokens_in_state=tokens_in_state, stop_period=stop_period)
    check_learned(trainer, before)
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder, start.others)
    return metrics | start.facts


def make_ready(trainer: Trainer, start: Start) -> None:
    """What a trainer needs that was just built: see `settle_types` and `use_loraplus`."""
    settle_types(trainer, start)
    use_loraplus(trainer, start)


def settle_types(trainer: Trainer, start: Start) -> None:
    """Modules_to_save in float32, and on a quantised base the reference in the type of the policy.

    On 16-bit weights peft keeps A and B in float32 and everything else in 16 bits, where most updates of a
    score head or an embedding round to nothing; under autocast float32 fits. On a quantised base TRL holds
    everything trainable in bfloat16, which is meant for A and B; and the copy that is the reference, which
    TRL leaves in float32, would not compute what the policy computes before the first step.
    """
    assert trainer.model is not None
    if start.quantization is None:
        if trainer.args.bf16 or trainer.args.fp16:
            for name, parameter in trainer.model.named_parameters():
                if "modules_to_save.default" in name:
                    parameter.data = parameter.data.float()
        return
    named = dict(trainer.model.named_parameters())
    for name, parameter in named.items():
        copy = named.get(name.replace(".default.", f".{REFERENCE}.")) if ".default." in name else None
        if "modules_to_save.default" in name:
            of_base = named[name.replace("modules_to_save.default", "original_module")]
            given = copy if start.lora is None else of_base
            parameter.data = (parameter if given is None else given).data.float().clone()
        elif copy is not None:
            copy.data = copy.data.to(parameter.dtype)


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
