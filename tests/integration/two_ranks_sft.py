"""One process of an SFT run on several, of which the last one gets SIGTERM.

torchrun --nproc-per-node 2 two_ranks_sft.py MODEL DATA FOLDER SIGTERM_STEP
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from trl import SFTTrainer

from posttrain.context import StageContext
from posttrain.errors import RequeueError
from posttrain.inputs import resolve
from posttrain.models import load_tokenizer
from train.adapters import load_policy
from train.callbacks import fit
from train.config import SftConfig
from train.sft import load_rows
from train.trainer_args import build_args

BATCH, STEPS = 8, 6


class Preempt(TrainerCallback):
    """Sends this process SIGTERM in step `at`; 0 for never."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.at:
            signal.raise_signal(signal.SIGTERM)


def train(model: Path, data: Path, folder: Path, processes: int, rank: int, stop: int) -> str:
    """Train in `folder`, where rank 0 leaves ``weights.pt``; how far it came."""
    trainer_block = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // processes,
        "learning_rate": 1e-3,
        "logging_steps": 4,
        "save_steps": 100,
    }
    config = SftConfig(model=str(model), data=str(data), peft=None, trainer=trainer_block)
    inputs = {"model": resolve(str(model), "model"), "data": resolve(str(data), "dataset")}
    run_dir = folder / f"rank-{rank}"
    run_dir.mkdir(parents=True, exist_ok=True)
    context = StageContext(run_dir=run_dir, config=config, inputs=inputs, console=Console(quiet=True))
    tokenizer = load_tokenizer(model)
    rows, _ = load_rows(context, "train", tokenizer, config.trainer, 256)
    args = build_args(config, folder / "checkpoints", max_length=256, assistant_only_loss=False)
    args.assistant_only_loss = False
    trainer = SFTTrainer(
        model=load_policy(model, config, context.checkpoints).model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.add_callback(Preempt(stop if rank == processes - 1 else 0))
    try:
        fit(trainer, context, "sft")
    except RequeueError as error:
        return error.place
    if rank == 0:
        weights = {name: weight.detach().cpu() for name, weight in trainer.model.named_parameters()}
        torch.save(weights, folder / "weights.pt")
    return "the end"


if __name__ == "__main__":
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, data, folder = map(Path, sys.argv[1:4])
    place = train(model, data, folder, processes, rank, int(sys.argv[4]))
    (folder / f"place-{rank}").write_text(place)
    torch.distributed.destroy_process_group()
