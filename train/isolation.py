"""Rows that share a sequence must not see each other: measured on the model before it is trained.

Packing and ``padding_free`` put several dialogues into one sequence and rely on the attention to keep them
apart, by position ids that begin anew or by sequence offsets. An attention that reads neither trains every
dialogue on its neighbours, with a loss that looks healthy (trl#3067).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from posttrain.errors import UserError

TOLERANCE = 0.02
"""Largest relative change of a row's logits that counts as rounding. Between rows that do not see each other
it is 0 in float32; the first token of a row that does see its neighbour sees many tokens instead of one."""
PROBE = 48
"""Tokens of each row that are looked at."""


def check_isolation(trainer: SFTTrainer, rows: Sequence[Sequence[int]]) -> float:
    """Change one row of a sequence and see whether the logits of the next one change; returns by how much.

    rows: token ids of rows, of which the first two are taken. Nothing is looked at, and 0 returned, where the
    trainer puts one row into each sequence or there is only one, and where the model is not whole before
    training begins (FSDP, DeepSpeed).

    Raises:
        UserError: the rows see each other; it says which attention it was.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not trainer.padding_free or sharded or len(rows) < 2:
        return 0.0
    first, second = [list(row[:PROBE]) for row in rows[:2]]
    # A repeated token instead of the row's own text: another context in every respect that attention sees.
    other = [second[0]] * len(first)
    plain, changed = (_logits(trainer, [row, second])[len(first) :] for row in (first, other))
    change = float((changed - plain).norm(dim=-1).max() / plain.norm(dim=-1).max())
    if not change <= TOLERANCE:
        args: Any = trainer.args
        model: Any = trainer.model
        field = "packing" if args.packing else "padding_free"
        attention, kind = model.config._attn_implementation, model.config.model_type
        raise UserError(
            f"trainer.{field}: rows in one sequence see each other with attn_implementation `{attention}` "
            f"on a {kind} model (changing one moves the logits of the next by {change:.0%})\n"
            "    use attn_implementation: sdpa or flash_attention_2, or packing and padding_free: false"
        )
    return change


@torch.no_grad()
def _logits(trainer: SFTTrainer, rows: list[list[int]]) -> Tensor:
    """Logits [T, V] of these rows as the trainer would put them into one sequence."""
    model = trainer.model
    assert model is not None
    batch = trainer._prepare_inputs(trainer.data_collator([{"input_ids": row} for row in rows]))
    batch.pop("labels")
    training = model.training
    model.eval()
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        logits = model(**batch, use_cache=False).logits[0].float()
    model.train(training)
    return logits
