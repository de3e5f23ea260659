"""SFT against `trl sft`, and what each of our settings is worth: a ladder measured in one call.

    python scripts/bench_sft.py --data gsm8k/train.jsonl                        # every rung once
    python scripts/bench_sft.py --data gsm8k/train.jsonl --rungs trl defaults --repeats 3
    python scripts/bench_sft.py --smoke                                         # seconds: does it run
    python scripts/bench_sft.py --data gsm8k/train.jsonl --device cuda          # bf16 on a GPU, a 1 B model

All rungs start from the same random model, train on the same rows for as many optimizer steps with as many
dialogues per step, and are timed at the same places of the same trainer, each in its own process; with
--repeats the rungs take turns. The first rung of the ladder is TRL's own script with its own defaults. Tokens
are those that are not padding. The steps before --warmup are not timed (torch.compile needs them), nor are
loading, checkpoints and evaluation; the tenth of the steps that took longest for their size is left out, on
every rung (tokens_per_second_all in the JSON has them all). Memory is the peak of the training steps above
what the process held once everything was imported: resident on a CPU, what torch allocated on a GPU.

Prints a Markdown table and writes everything measured to --output as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench_ppo_common import machine
from bench_sft_common import PRESETS, RUNGS, Settings

SCRIPTS = Path(__file__).resolve().parent
NOT_FLAGS = ("device", "data")
MEASURED = (
    "tokens_per_second",
    "tokens_per_second_all",
    "padding",
    "seconds_warmup",
    "tokens",
    "supervised_tokens",
    "flops_per_second",
)


def run(script: str, arguments: list[str], log: Path, settings: Settings) -> None:
    """Run one of the other scripts; its output goes to `log`. Raises SystemExit with the end of it."""
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(log.parent / "cache")}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])
        raise SystemExit(f"{' '.join(command)} exited with {code}; the end of {log}:\n{tail}")


def prepare(settings: Settings, folder: Path, tokens: int | None) -> tuple[Settings, dict[str, Any]]:
    """Data, tokenizer and model in `folder`, made anew; returns the settings with the steps that `tokens`
    non-padding tokens take, and what is known of the data and the model."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings.write(folder / "settings.json")
    run("bench_sft_world.py", [str(folder)], folder / "world.log", settings)
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    if tokens is not None:
        per_step = settings.batch_size * world["tokens"] / world["rows"]
        settings = replace(settings, steps=max(settings.warmup + 1, round(tokens / per_step)))
        settings.write(folder / "settings.json")
    return settings, world


def run_rung(name: str, repeat: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """One run in its own process, and the machine's load before it."""
    result, load = folder / f"{name}-{repeat}.json", os.getloadavg()[0]
    arguments = [str(folder), name, str(settings.seed + repeat), str(result)]
    run("bench_sft_side.py", arguments, result.with_suffix(".log"), settings)
    if not (folder / "start").exists():  # LoRA's rungs start from a model that has learned something
        shutil.copytree(result.with_suffix("") / "model", folder / "start")
    return json.loads(result.read_text(encoding="utf-8")) | {"rung": name, "load_before": load}


def summarise(runs: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, float]:
    """Medians over the runs of one rung; of the held-out loss, over seeds, the mean.

    rates: FLOP/s of one large matrix product in the type that each rung computes in.
    """
    summary = {name: median(run[name] for run in runs) for name in MEASURED}
    summary["mfu"] = summary["flops_per_second"] / rates[runs[0]["matmul_dtype"]]
    for kind in ("peak", "absolute"):
        summary[f"memory_{kind}"] = median(run["memory"][kind] for run in runs)
    return summary | {"held_out_loss": mean(run["held_out"]["loss"] for run in runs)}


def baseline(name: str, names: list[str]) -> str | None:
    """The rung that `name` is compared with: TRL's, with LoRA where it has it, if it was run."""
    peer = "trl-lora" if RUNGS[name].lora else "trl"
    return peer if peer in names else None


def table(summaries: dict[str, dict[str, float]]) -> str:
    """One line a rung, with its speed and held-out loss relative to TRL's defaults."""
    lines = [
        "| | tokens/s | ratio | padding | memory, GiB | MFU | held-out loss | against TRL |",
        "|---|" + "---:|" * 7,
    ]
    for name, row in summaries.items():
        peer = baseline(name, list(summaries))
        ratio = loss = ""
        if peer is not None:
            ratio = f"{row['tokens_per_second'] / summaries[peer]['tokens_per_second']:.2f}x"
            loss = f"{row['held_out_loss'] / summaries[peer]['held_out_loss'] - 1:+.2%}"
        lines.append(
            f"| {RUNGS[name].title} | {row['tokens_per_second']:,.0f} | {ratio} | {row['padding']:.1%} | "
            f"{row['memory_peak']:.2f} | {row['mfu']:.0%} | {row['held_out_loss']:.4f} | {loss} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl; default: made-up sums")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes; default cpu, or llama-1b on cuda")
    parser.add_argument("--smoke", action="store_true", help="the same as --preset smoke")
    parser.add_argument("--rungs", nargs="+", choices=sorted(RUNGS), help="default: all of the device")
    parser.add_argument("--tokens", type=int, help="non-padding tokens to train on; sets --steps")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each rung, taking turns, other seeds")
    parser.add_argument("--work", type=Path, default=Path("build/bench_sft"), help="models and logs")
    parser.add_argument("--output", type=Path, default=Path("build/bench_sft.json"))
    for field in fields(Settings):
        if field.name not in NOT_FLAGS:
            kind = type(asdict(Settings())[field.name])
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help="default: the preset's")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.preset = "smoke"
    options.preset = options.preset or {"cpu": "cpu", "cuda": "llama-1b"}[options.device]
    chosen = {name: value for name, value in vars(options).items() if value is not None}
    given = {f.name: chosen[f.name] for f in fields(Settings) if f.name in chosen and f.name != "data"}
    if options.data is not None:
        if not options.data.is_file():
            parser.error(f"--data {options.data}: no such file")
        given["data"] = str(options.data.resolve())
    if options.rungs is None:
        options.rungs = [name for name, rung in RUNGS.items() if options.device in rung.devices]
    return options, replace(PRESETS[options.preset], **given)


def main() -> int:
    options, settings = parse()
    folder = options.work / options.preset
    settings, world = prepare(settings, folder, options.tokens)
    environment = machine(settings.device, settings.threads) | {"trl": importlib.metadata.version("trl")}
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for name in options.rungs:
            runs.append(run_rung(name, repeat, settings, folder))
            rate, loss = runs[-1]["tokens_per_second"], runs[-1]["held_out"]["loss"]
            print(f"{name} {repeat + 1}/{options.repeats}: {rate:,.0f} tokens/s, {loss:.4f}", file=sys.stderr)
    rates: dict[str, float] = {}  # the best of all processes: one that was disturbed says too little
    for one in runs:
        rates[one["matmul_dtype"]] = max(one["matmul_flops_per_second"], rates.get(one["matmul_dtype"], 0.0))
    summaries = {
        name: summarise([run for run in runs if run["rung"] == name], rates) for name in options.rungs
    }
    loads = ", ".join(f"{run['load_before']:.1f}" for run in runs)
    print(
        f"SFT of {world['parameters'] / 1e6:.1f} M parameters, "
        f"{settings.steps} steps of {settings.batch_size} dialogues on "
        f"{environment['gpu'] or environment['processor']} ({settings.threads} threads), "
        f"{environment['date']}\nload before each run: {loads}\n\n{table(summaries)}"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, data=Path(settings.data).name)
    report = {"machine": environment, "settings": asdict(settings), "world": world}
    report |= {"rungs": {name: asdict(RUNGS[name]) for name in options.rungs}}
    report |= {"summary": summaries, "runs": runs}
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\nall numbers: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
