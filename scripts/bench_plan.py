"""`posttrain plan` against what training really holds: each configuration runs in a process of its own.

    python scripts/bench_plan.py --output docs/benchmarks/plan-cpu.json
    python scripts/bench_plan.py --only tiny-sft-full 100m-dpo-lora

Every case makes a model with random weights and generated rows, runs a few steps of the real stage, its final
evaluation and saving included, and compares the peak with the prediction, which reads the same YAML settings.

Measured is what torch's allocator had given out at its peak: on a GPU torch.cuda.max_memory_allocated, on the
CPU the same number, from the memory events of torch's profiler, which sees every allocation and release of a
tensor's storage on the thread it was started on (so weights are loaded on that one, not in transformers'
pool). That is what `posttrain plan` predicts. Beside it stands the growth of the resident set of the process
(VmHWM less VmRSS before the stage), which holds freed memory, buffers of the matrix library and everything
that is no tensor too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LORA = {"r": 16, "lora_alpha": 32}
TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
MODELS = {"tiny": TINY | {"vocab_size": 1400}, "100m": SMALL | {"vocab_size": 16_384}}
"""Llama architectures: 1.2 and 110 million parameters, output matrix of its own."""
WORDS = {"short": (8, 24), "long": (60, 120)}
"""Words of an answer, from and to; a word is one to three tokens."""


@dataclass(frozen=True)
class Case:
    """One configuration. settings: of the stage; trainer: of its TRL trainer; words: length of the
    answers.
    """

    stage: str
    model: str
    rows: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    words: str = "long"
    reward_model: bool = False


SCORED = {"rewards": {"functions": [{"function": "bench_plan:length_reward"}]}, "max_prompt_tokens": 64}
PPO = {
    "max_prompt_tokens": 64,
    "max_new_tokens": 48,
    "batch_size": 8,
    "total_episodes": 16,
    "num_ppo_epochs": 1,
    "learning_rate": 1e-4,
}
CASES = {
    "tiny-sft-full": Case("sft", "tiny", 32, {"peft": None}, words="short"),
    "tiny-sft-lora-bf16": Case("sft", "tiny", 16, {"peft": LORA}, {"bf16": True}),
    "tiny-dpo-lora": Case("dpo", "tiny", 16, {"peft": LORA}),
    "tiny-orpo-lora": Case("orpo", "tiny", 8, {"peft": LORA}),
    "tiny-kto-full": Case("kto", "tiny", 8, {"peft": None}),
    "tiny-grpo-lora": Case(
        "grpo", "tiny", 16, SCORED | {"peft": LORA}, {"max_completion_length": 48, "beta": 0.04}
    ),
    "tiny-ppo-full": Case(
        "ppo", "tiny", settings=PPO | {"batch_size": 32, "total_episodes": 64}, reward_model=True
    ),
    "100m-sft-full": Case("sft", "100m", 2, {"peft": None}, {"gradient_accumulation_steps": 2}),
    "100m-sft-full-bf16-weights": Case("sft", "100m", 4, {"peft": None, "dtype": "bfloat16"}),
    "100m-sft-lora-bf16": Case("sft", "100m", 4, {"peft": LORA}, {"bf16": True}),
    "100m-sft-lora-checkpointing": Case("sft", "100m", 8, {"peft": LORA}, {"activation_checkpointing": True}),
    "100m-sft-lora-eager": Case("sft", "100m", 2, {"peft": LORA, "attn_implementation": "eager"}),
    "100m-dpo-lora": Case("dpo", "100m", 2, {"peft": LORA}),
    "100m-dpo-full": Case("dpo", "100m", 2, {"peft": None}, words="short"),
    "100m-reward-lora": Case("reward", "100m", 4, {"peft": LORA}),
    "100m-grpo-lora": Case(
        "grpo", "100m", 4, SCORED | {"peft": LORA}, {"max_completion_length": 32, "num_generations": 4}
    ),
    "100m-ppo-shared-bf16": Case(
        "ppo",
        "100m",
        settings=SCORED | PPO | {"peft": LORA, "bf16": True, "max_new_tokens": 32},
    ),
}
KINDS = {"sft": "conversation", "grpo": "prompt", "ppo": "prompt"}


def length_reward(completion_ids: list[list[int]]) -> list[float]:
    """Something to optimise."""
    return [float(len(ids)) for ids in completion_ids]


def make(case: Case, folder: Path) -> None:
    """model/ and data/, and reward/ where the case has a reward model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from data_prep.dataset import write_split
    from train.tokenizer import build_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(5)) for _ in range(300)]
    tokenizer = build_tokenizer([" ".join(words)] * 20, 1200, 1024)
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[case.model],
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if case.reward_model:
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
    (folder / "data").mkdir()
    kind: Any = KINDS.get(case.stage, "preference")
    for split, count in (("train", 96), ("eval", 4)):
        rows = [make_row(kind, f"{split}-{index}", rng, words, case.words) for index in range(count)]
        write_split(folder / "data" / f"{split}.parquet", kind, rows)


def make_row(kind: str, name: str, rng: random.Random, words: list[str], length: str) -> dict[str, Any]:
    """One generated row of a data set."""

    def turn(role: str, count: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choice(words) for _ in range(count))}]

    question = turn("user", rng.randint(4, 12))
    answers = [turn("assistant", rng.randint(*WORDS[length])) for _ in range(2)]
    row: dict[str, Any] = {"id": name, "source": "bench", "group": name, "meta": "{}"}
    if kind == "conversation":
        return row | {"messages": question + answers[0]}
    if kind == "prompt":
        return row | {"prompt": question}
    return row | {"prompt": question, "chosen": answers[0], "rejected": answers[1]}


def stage_file(case: Case, folder: Path, steps: int) -> Path:
    """The stage's YAML (JSON is YAML), as a user would write it."""
    settings: dict[str, Any] = {
        "stage": case.stage,
        "run_dir": str(folder / "run"),
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        **case.settings,
    }
    if case.reward_model:
        settings["reward"] = str(folder / "reward")
    if case.stage != "ppo":
        trainer = {"max_steps": steps, "per_device_train_batch_size": case.rows, "learning_rate": 1e-3}
        settings["trainer"] = trainer | {"save_strategy": "no", "logging_steps": 1} | case.trainer
    path = folder / "stage.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def measure(path: Path) -> dict[str, float]:
    """Bytes: the allocator's peak over the stage, and the growth of the resident set."""
    from posttrain.registry import load, stage_spec
    from posttrain.stage import execute_stage
    from posttrain.stage_file import load_stage_file
    from posttrain.yaml_source import load_yaml

    kind = str(load_yaml(path)["stage"])
    block = load_stage_file(kind, path)
    load(stage_spec(kind).run)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    peak = allocated(lambda: execute_stage(kind, block.config, block.run_dir, preflight=False))
    return {"allocated": peak, "resident": float(resident("VmHWM") - before)}


def allocated(run: Callable[[], object]) -> float:
    """Bytes that torch's allocator had given out at the worst moment of `run`, beyond those before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return allocated_peak([(event.start_ns(), event.nbytes()) for event in events])


def allocated_peak(events: list[tuple[int, int]]) -> float:
    """The largest sum of (time, bytes given out or taken back) up to any moment."""
    now = peak = 0
    for _, count in sorted(events, key=lambda event: event[0]):
        now += count
        peak = max(peak, now)
    return float(peak)


def resident(name: str) -> int:
    """Bytes: a field of Linux's /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def run_case(name: str, steps: int, output: Path) -> None:
    """One case in this process: prediction, then measurement."""
    from train.plan.command import plan

    case = CASES[name]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        subprocess.run([sys.executable, __file__, "--make", name, "--folder", str(folder)], check=True)
        path = stage_file(case, folder, steps)
        started = time.perf_counter()
        measured = measure(path)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        [stage] = plan(path, strategy="single", gpus=1).as_json()["stages"]
        row = {
            "case": name,
            "predicted": stage["total"],
            **measured,
            "ratio": stage["total"] / measured["allocated"],
            "breakdown": stage["memory"],
            "batch": stage["batch"],
            "parameters": stage["parameters"],
            "settings": settings_of(path),
            "seconds": {"stage": seconds, "prediction": time.perf_counter() - started},
        }
    output.write_text(json.dumps(row), encoding="utf-8")


def settings_of(path: Path) -> dict[str, Any]:
    """What a stage file says, its temporary folders apart."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: value for name, value in settings.items() if name not in ("run_dir", "model", "data", "reward")
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers
    import trl

    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CASES, help="cases to run; all without it")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each case")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    for name in ("--case", "--make"):
        parser.add_argument(name, choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        make(CASES[asked.make], asked.folder)
        return
    if asked.case:
        run_case(asked.case, asked.steps, asked.output)
        return
    rows = measured_before(asked.output)
    print(
        "| Case | predicted, MB | allocated, MB | ratio | resident, MB |\n|---|---:|---:|---:|---:|",
        flush=True,
    )
    for name in asked.only or CASES:
        row = rows[name] = run_apart(name, asked.steps)
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("predicted", "allocated")]
        print(
            f"| {name} | {' | '.join(sizes)} | {row['ratio']:.3f} | {row['resident'] / 1e6:,.0f} |",
            flush=True,
        )
        if asked.output:
            cases = [rows[name] for name in CASES if name in rows]
            asked.output.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


def measured_before(output: Path | None) -> dict[str, Any]:
    """Cases that the output file holds already, by name; those measured now replace them."""
    if output is None or not output.is_file():
        return {}
    return {row["case"]: row for row in json.loads(output.read_text(encoding="utf-8"))["cases"]}


def run_apart(name: str, steps: int) -> dict[str, Any]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        arguments = ["--case", name, "--steps", str(steps), "--output", str(result)]
        subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"HF_DEACTIVATE_ASYNC_LOAD": "1"},
        )
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return row


if __name__ == "__main__":
    main()
