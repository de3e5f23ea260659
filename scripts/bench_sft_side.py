"""One run of `bench_sft.py` in a process of its own: train as a rung says, then look at what came of it.

    python scripts/bench_sft_side.py FOLDER RUNG SEED RESULT.json

`trl` is TRL's own script (`trl.scripts.sft`) with its own command line; `ours` is the sft stage. Both end in
the same trainer and collator, where the same clock, token count and memory are read.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench_ppo_common import PeakMemory, now
from bench_sft_common import RUNGS, Rung, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Recorder:
    """What the training steps of one run were: when each ended, what each batch held, peak memory.

    Batches are counted where TRL's collator makes them. One is made ahead of the step that reads it, and the
    evaluation's come after training, so the first ones are those of the steps.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []
        self.batches: list[dict[str, int]] = []
        self.memory: dict[str, float] = {}
        self._peak = PeakMemory(device)

    def install(self) -> None:
        """Read along in every trainer and collator made from now on."""
        import transformers.trainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        recorder, collate = self, DataCollatorForLanguageModeling.torch_call

        class Clock(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                recorder.ends.append(now(recorder.device))

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                recorder.ends.append(now(recorder.device))
                if state.global_step == state.max_steps:
                    recorder.memory = recorder._peak.read()

        def counted(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(self, examples)
            cells = batch["input_ids"].numel()
            tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else cells
            supervised = int((batch["labels"] != -100).sum())
            recorder.batches.append({"cells": cells, "tokens": tokens, "supervised": supervised})
            return batch

        transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
        DataCollatorForLanguageModeling.torch_call = counted


def start(folder: Path, rung: Rung) -> Path:
    """The model that a rung starts from: with LoRA what an earlier rung has trained, if there was one."""
    learned = folder / "start"
    return learned if rung.lora and learned.is_dir() else folder / "model"


def train_trl(settings: Settings, rung: Rung, folder: Path, seed: int, output: Path) -> Path:
    """`trl sft` as its command line runs it; returns the directory of the model."""
    from trl.scripts.sft import main, make_parser

    arguments = {
        "model_name_or_path": start(folder, rung),
        "dataset_name": folder / "peer",
        "output_dir": output / "model",
        "max_steps": settings.steps,
        "seed": seed,
        "learning_rate": settings.lora_learning_rate if rung.lora else settings.learning_rate,
    }
    if settings.batch_size != 8:
        arguments["per_device_train_batch_size"] = settings.batch_size
    if settings.device == "cpu":  # without it TRL's own default, bf16, is an error where there is no GPU
        arguments["use_cpu"] = True
    arguments |= rung.trainer
    command = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    if rung.lora:
        command += ["--use_peft", "--lora_r", str(settings.lora_rank)]
        command += ["--lora_alpha", str(2 * settings.lora_rank), "--lora_dropout", "0"]
        command += ["--lora_target_modules", "all-linear"]
    main(*make_parser().parse_args_and_config(command, fail_with_unknown_args=False))
    return output / "model"


def train_ours(settings: Settings, rung: Rung, folder: Path, seed: int, output: Path) -> Path:
    """The sft stage; returns the directory of the model."""
    import train.sft
    from posttrain.stage import execute_stage
    from train.config import SftConfig

    if rung.whole_head:
        train.sft.score_supervised_only = lambda model: False
    rate = settings.lora_learning_rate if rung.lora else settings.learning_rate
    trainer: dict[str, Any] = {"max_steps": settings.steps, "learning_rate": rate}
    if settings.batch_size != 8:
        trainer["per_device_train_batch_size"] = settings.batch_size
    if rung.trainer.get("packing"):  # as many tokens a step, in two rows
        length = math.ceil(settings.batch_size * mean_length(folder) / 2)
        trainer |= {"per_device_train_batch_size": 2, "max_length": min(length, settings.positions)}
    config = SftConfig.model_validate(
        {
            "model": str(start(folder, rung)),
            "data": str(folder / "data"),
            "seed": seed,
            "peft": {"r": settings.lora_rank, "lora_alpha": 2 * settings.lora_rank} if rung.lora else None,
            "attn_implementation": rung.attention,
            "trainer": trainer | rung.trainer,
        }
    )
    execute_stage("sft", config, output)
    return output / "model"


def mean_length(folder: Path) -> float:
    """Tokens of the average training row."""
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    return world["tokens"] / world["rows"]


def held_out_loss(settings: Settings, folder: Path, model_dir: Path) -> dict[str, float]:
    """Mean negative log-likelihood (nats) of the supervised tokens of the held-out rows, in float32."""
    import torch
    import torch.nn.functional as F

    from data_prep.dataset import read_split
    from posttrain.models import load_causal_lm, load_tokenizer
    from train.encode import encode_conversations

    tokenizer = load_tokenizer(folder / "model")
    rows = read_split(folder / "data", "eval", "conversation").select(range(settings.held_out))
    encoded = encode_conversations(tokenizer, list(rows["messages"]), list(rows["id"]))
    encoded.sort(key=lambda row: len(row.input_ids))
    model = load_causal_lm(model_dir).to(settings.device)
    total, count = 0.0, 0
    for start in range(0, len(encoded), 16):
        batch = encoded[start : start + 16]
        width = max(len(row.input_ids) for row in batch)
        ids_BT = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels_BT = torch.full((len(batch), width), -100)
        for index, row in enumerate(batch):
            ids_BT[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels_BT[index, : len(row.labels)] = torch.tensor(row.labels)
        with torch.no_grad():
            logits = model(input_ids=ids_BT.to(settings.device), use_cache=False).logits[:, :-1].float()
        targets = labels_BT[:, 1:].to(settings.device)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    return {"loss": total / count, "tokens": count}


def total(steps: list[dict[str, Any]], name: str) -> Any:
    return sum(step[name] for step in steps)


def undisturbed(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps without the tenth that took longest for their size, padding included: now and then something
    else has the machine."""
    kept = len(steps) - len(steps) // 10
    return sorted(steps, key=lambda step: step["seconds"] / step["cells"])[:kept]


def needed_flops(settings: Settings, rung: Rung, steps: list[dict[str, Any]], length: float) -> float:
    """Floating-point operations that the model needs for these steps: real tokens, and the head only where
    there is a label. length: mean tokens of a dialogue, which attention sees half of."""
    from train.ppo.throughput import Attention, model_flops

    per_layer = 4 * settings.hidden**2 + 3 * settings.hidden * settings.intermediate
    tokens, supervised = total(steps, "tokens"), total(steps, "supervised")
    attention = Attention(settings.layers, settings.hidden, context=length / 2)
    body = model_flops(
        settings.layers * per_layer, tokens, trained=True, frozen_backbone=rung.lora, attention=attention
    )
    head = model_flops(
        settings.hidden * settings.vocabulary, supervised, trained=True, frozen_backbone=rung.lora
    )
    adapter = 0.0
    if rung.lora:
        sizes = 4 * (2 * settings.hidden) + 3 * (settings.hidden + settings.intermediate)
        adapter = model_flops(settings.lora_rank * sizes * settings.layers, tokens, trained=True)
    return body + head + adapter


def summarise(settings: Settings, rung: Rung, recorder: Recorder, length: float) -> dict[str, Any]:
    """Speed of the timed steps; shares and counts of all steps; what parent and reader need for the rest."""
    import torch

    from train.ppo.throughput import matmul_throughput

    lasted = [after - before for before, after in zip(recorder.ends, recorder.ends[1:], strict=False)]
    trained = recorder.batches[: len(lasted)]
    steps = [batch | {"seconds": seconds} for batch, seconds in zip(trained, lasted, strict=True)]
    timed = steps[settings.warmup :]
    calm = undisturbed(timed)
    bf16 = rung.trainer.get("bf16", rung.side == "trl" or settings.device == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    rate = matmul_throughput(torch.device(settings.device), dtype)
    return {
        "steps": steps,
        "tokens": total(steps, "tokens"),
        "supervised_tokens": total(steps, "supervised"),
        "padding": 1 - total(steps, "tokens") / total(steps, "cells"),
        "seconds_warmup": sum(lasted[: settings.warmup]),
        "tokens_per_second": total(calm, "tokens") / total(calm, "seconds"),
        "tokens_per_second_all": total(timed, "tokens") / total(timed, "seconds"),
        "flops_per_second": needed_flops(settings, rung, calm, length) / total(calm, "seconds"),
        "matmul_flops_per_second": rate,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "memory": recorder.memory,
    }


def main() -> None:
    folder, name, seed, result = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    settings, rung = Settings.read(folder / "settings.json"), RUNGS[name]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(settings.threads)
    import trl.scripts.sft  # noqa: F401  (before memory is measured)
    from trl import SFTTrainer  # noqa: F401

    import train.sft  # noqa: F401

    recorder = Recorder(settings.device)
    recorder.install()
    started = time.perf_counter()
    train = train_trl if rung.side == "trl" else train_ours
    model = train(settings, rung, folder, seed, result.with_suffix(""))
    whole = time.perf_counter() - started
    report = summarise(settings, rung, recorder, mean_length(folder)) | {"seconds_whole": whole}
    report["held_out"] = held_out_loss(settings, folder, model)
    result.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
