"""PPO against TRL 1.12.0, the last release that had it: speed, memory, reward, and what the time goes into.

    python scripts/bench_ppo.py                                  # CPU, all weights trained on both sides
    python scripts/bench_ppo.py --layout shared                  # LoRA: one backbone against the peer's PEFT
    python scripts/bench_ppo.py --quick                          # seconds: does it run
    python scripts/bench_ppo.py --preset learn --repeats 5       # a small model for 80 updates: do both learn
    python scripts/bench_ppo.py --sides ours --profile           # our side alone, and its operators
    python scripts/bench_ppo.py --device cuda --preset qwen-0.5b # bf16 on a GPU; also --preset llama-1b

Both sides load the same random models and prompts, sample at temperature 1 up to the same cap (responses
average about half of it: see bench_ppo_models.py), and take K = 4 passes with the same losses, micro-batches
and optimizer. Runs alternate, each in a process of its own. The first update of a run is warm-up and is
reported by itself; episodes/s is of the others, loading excluded. The peer is installed with pip into a
folder of its own (--peer-path) and read from there by its process alone.

Prints a Markdown report and writes everything measured to --output as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mean, median, variance
from typing import Any

from bench_ppo_common import PRESETS, Settings, machine

SCRIPTS = Path(__file__).resolve().parent
PEER = "trl==1.12.0"
SIDES = ("ours", "peer")
PHASES = ("rollout", "reference", "scoring", "update", "sync")
FLAGS = [f.name for f in fields(Settings) if f.name not in ("layout", "device", "family", "clock")]


def install_peer(path: Path) -> None:
    """Install the peer into `path`, without what it depends on, unless it is there."""
    if (path / "trl" / "experimental" / "ppo").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(path), PEER]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"could not install {PEER}. Put it there yourself, for instance with "
            f"`uv pip install --no-deps --target {path} {PEER}`, or give --sides ours."
        )


def run(command: list[str], log: Path, settings: Settings) -> None:
    """Run one of the other scripts; its output goes to `log`. Raises SystemExit with the end of it."""
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])
        raise SystemExit(f"{' '.join(command)} exited with {code}; the end of {log}:\n{tail}")


def prepare(settings: Settings, folder: Path) -> dict[str, Any]:
    """Make the models in `folder` unless those of these settings are there; returns what is known of them."""
    file, done = folder / "settings.json", folder / "models.json"
    if not (done.is_file() and Settings.read(file) == settings):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        settings.write(file)
        run([str(SCRIPTS / "bench_ppo_models.py"), str(folder)], folder / "models.log", settings)
    return json.loads(done.read_text(encoding="utf-8"))


def run_side(side: str, repeat: int, settings: Settings, folder: Path, options: Any) -> dict[str, Any]:
    """One run in its own process, and the machine's load before it."""
    result = folder / f"{side}-{repeat}.json"
    result.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    command = [str(SCRIPTS / f"bench_ppo_{side}.py"), str(folder), str(settings.seed + repeat), str(result)]
    if side == "peer":
        command += ["--path", str(options.peer_path)]
    elif options.profile and repeat == 0:
        command.append("--profile")
    run(command, result.with_suffix(".log"), settings)
    return json.loads(result.read_text(encoding="utf-8")) | {"side": side, "load_before": load}


def summarise(runs: list[dict[str, Any]], settings: Settings) -> dict[str, float]:
    """Medians over the runs of one side; seconds are per update, memory in GiB."""

    def of(measure: Any) -> float:
        return median(measure(run) for run in runs)

    def typical(name: str) -> float:
        return of(lambda run: average(run["updates"][settings.warmup :], name))

    seconds = typical("seconds")
    phases = {name: typical(name) for name in runs[0]["updates"][-1] if name.startswith("seconds_")}
    parts = sum(phases.get(f"seconds_{name}", 0) for name in PHASES)
    parts += sum(value for name, value in phases.items() if name.startswith("seconds_scoring/"))
    summary = phases | {
        "seconds": seconds,
        "seconds_other": seconds - parts,
        "seconds_first": of(lambda run: run["updates"][0]["seconds"]),
        "episodes_per_second": settings.batch_size / seconds,
        "response_tokens_per_second": settings.batch_size * typical("response_length") / seconds,
        "memory": of(lambda run: run["memory"]["peak"]),
        "memory_absolute": of(lambda run: run["memory"]["absolute"]),
        "response_length": typical("response_length"),
        "rlhf_reward_first": of(lambda run: run["updates"][0]["rlhf_reward"]),
        "rlhf_reward_last": of(lambda run: average(closing(run), "rlhf_reward")),
        "kl_last": of(lambda run: average(closing(run), "kl")),
    }
    if "seconds_scoring" not in summary:
        summary["seconds_scoring"] = sum(v for n, v in phases.items() if n.startswith("seconds_scoring/"))
    if "floor" in runs[0]:
        floor = of(lambda run: run["floor"]["seconds"])
        achieved = of(lambda run: run["floor"]["flops"]) / summary["seconds_update"]
        summary |= {
            "floor_seconds": floor,
            "update_over_floor": summary["seconds_update"] / floor,
            "mfu": achieved / of(lambda run: run["floor"]["matmul_flops_per_second"]),
        }
    return summary


def closing(run: dict[str, Any]) -> list[dict[str, float]]:
    """The last quarter of a run's updates."""
    return run["updates"][-max(1, len(run["updates"]) // 4) :]


def average(rows: list[dict[str, float]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def table(summaries: dict[str, dict[str, float]]) -> str:
    """Rows: what was measured; columns: the sides and the ratio in our favour (above 1: we are better)."""
    rows: list[tuple[str, str, str, bool]] = [
        ("episodes/s", "episodes_per_second", ".3f", True),
        ("response tokens/s", "response_tokens_per_second", ".1f", True),
        ("seconds per update", "seconds", ".2f", False),
        *((f"- {name}", f"seconds_{name}", ".2f", False) for name in (*PHASES, "other")),
        ("seconds of the first update", "seconds_first", ".2f", False),
        ("peak memory above start, GiB", "memory", ".2f", False),
        ("peak memory, GiB", "memory_absolute", ".2f", False),
        ("mean response, tokens", "response_length", ".1f", False),
        ("RLHF reward, first update", "rlhf_reward_first", ".3f", False),
        ("RLHF reward, last quarter of the updates", "rlhf_reward_last", ".3f", False),
        ("KL, last quarter of the updates", "kl_last", ".4f", False),
    ]
    plain = {"response_length", "rlhf_reward_first", "rlhf_reward_last", "kl_last"}
    lines = [f"| | {' | '.join(summaries)} | ratio |", "|---|" + "---:|" * (len(summaries) + 1)]
    for title, name, spec, higher in rows:
        values = [summary.get(name, 0.0) for summary in summaries.values()]
        if not any(values):
            continue
        cells = [format(value, spec) if value else "-" for value in values]
        ratio = "-"
        if len(values) == 2 and all(values) and name not in plain:
            ours, peer = values
            ratio = f"{ours / peer if higher else peer / ours:.2f}x"
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def rewards(runs: list[dict[str, Any]], sides: Sequence[str]) -> str:
    """The reward that each side ends with, run by run; and whether they differ by more than chance."""
    ends = {
        side: [average(closing(run), "rlhf_reward") for run in runs if run["side"] == side] for side in sides
    }
    lines = [
        f"{side}, RLHF reward over the last quarter: mean {mean(values):.3f} of "
        + ", ".join(f"{value:.3f}" for value in values)
        for side, values in ends.items()
    ]
    if len(sides) == 2 and min(map(len, ends.values())) > 1:
        ours, peer = ends.values()
        error = math.sqrt(sum(variance(values) / len(values) for values in (ours, peer)))
        lines.append(f"difference {mean(ours) - mean(peer):+.3f}, standard error {error:.3f}")
    return "\n".join(lines)


def details(summaries: dict[str, dict[str, float]]) -> str:
    """Parts of phases, the memory bar's own ratio, and our update against its floor."""
    lines = []
    for side, summary in summaries.items():
        parts = {name: value for name, value in summary.items() if "/" in name}
        if parts:
            listed = [f"{name.removeprefix('seconds_')} {value:.2f}" for name, value in parts.items()]
            lines.append(f"{side}, parts of phases in seconds: {', '.join(listed)}")
    if len(summaries) == 2:
        share = summaries["ours"]["memory"] / summaries["peer"]["memory"]
        lines.append(f"peak memory above start, ours / peer: {share:.2f}")
    if "ours" in summaries:
        ours = summaries["ours"]
        lines.append(
            f"our update {ours['seconds_update']:.2f} s over the floor of its matrix products "
            f"{ours['floor_seconds']:.2f} s: {ours['update_over_floor']:.2f}; "
            f"{100 * ours['mfu']:.0f} % of one large product's FLOP/s"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=("full", "shared"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes; default cpu, or qwen-0.5b on cuda")
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick --repeats 1")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, alternating")
    parser.add_argument("--peer-path", type=Path, default=Path("build/trl-1.12.0"))
    parser.add_argument("--work", type=Path, help="models and logs; default build/bench_ppo/PRESET-LAYOUT")
    parser.add_argument("--output", type=Path, default=Path("build/bench_ppo.json"))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a machine that others use at the same time; give --threads 1 with it",
    )
    parser.add_argument("--profile", action="store_true", help="print our operators by their own time")
    for name in FLAGS:
        kind = type(asdict(Settings())[name])
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: the preset's")
    options = parser.parse_args(arguments)
    if options.quick:
        options.preset, options.repeats = "quick", 1
    options.preset = options.preset or {"cpu": "cpu", "cuda": "qwen-0.5b"}[options.device]
    given = {name: value for name in FLAGS if (value := vars(options)[name]) is not None}
    if options.device == "cuda":
        given = {"dtype": "bfloat16"} | given
    chosen = {"layout": options.layout, "device": options.device, "clock": options.clock}
    settings = replace(PRESETS[options.preset], **chosen, **given)
    if settings.batch_size % settings.micro_batch_size:
        parser.error(
            f"--batch-size {settings.batch_size} is not a multiple of --micro-batch-size "
            f"{settings.micro_batch_size}"
        )
    options.work = options.work or Path("build/bench_ppo") / f"{options.preset}-{options.layout}"
    return options, settings


def main() -> int:
    options, settings = parse()
    if "peer" in options.sides:
        install_peer(options.peer_path)
    models = prepare(settings, options.work)
    environment = machine(settings.device, settings.threads)
    runs = []
    for repeat in range(options.repeats):
        for side in options.sides:
            runs.append(run_side(side, repeat, settings, options.work, options))
            rate = settings.batch_size / average(runs[-1]["updates"][settings.warmup :], "seconds")
            print(f"{side} {repeat + 1}/{options.repeats}: {rate:.3f} episodes/s", file=sys.stderr)
    summaries = {
        side: summarise([run for run in runs if run["side"] == side], settings) for side in options.sides
    }
    versions = {run["side"]: run["version"] for run in runs}
    loads = ", ".join(f"{run['load_before']:.1f}" for run in runs)
    print(
        f"PPO, layout {settings.layout}, {models['parameters'] / 1e6:.1f} M parameters, {settings.dtype} on "
        f"{environment['gpu'] or environment['processor']} ({settings.threads} threads, "
        f"{settings.clock} clock), {environment['date']}\n"
        f"load before each run: {loads}; versions: {versions}\n"
    )
    print(table(summaries), details(summaries), rewards(runs, options.sides), sep="\n\n")
    for run in runs:
        if "profile" in run:
            print(run["profile"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": environment, "versions": versions, "settings": asdict(settings)} | models
    report |= {"summary": summaries, "runs": runs}
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\nall numbers: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
