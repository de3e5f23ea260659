"""Load test of the serving stack: the embedded Triton and `posttrain gateway`, with peers, in one run.

    python scripts/bench_serve.py                                      # a random 24 M model, every side
    python scripts/bench_serve.py --quick                              # a minute: does it run
    python scripts/bench_serve.py --sides generate engine gateway --concurrency 1 16 --repeats 3
    python scripts/bench_serve.py --sides gateway --concurrency 16 --soak 2000       # is memory flat
    python scripts/bench_serve.py --export runs/tiny/export            # a model of your own

Every side gets the same prompts in the same order, with the same lengths of prompts and answers, greedily and
in float32, as a closed loop: `--concurrency` requests are in flight until none is left. All sides are up
during the whole run and take turns at each concurrency, so that a machine that changes its speed changes it
for all. Every process has the same OMP_NUM_THREADS (--threads); the client runs on the same cores, and its
processor time is in the report beside that of each server process.

Rates are over the time from the first request's sending to the last one's end. TTFT is the time to the first
event with text; inter-token latency (ITL) the time between two events of one answer. The dynamic batcher
streams nothing: its TTFT is the latency. The random model never ends an answer, so lengths are those asked
for; with --export answers end where the model ends them.

Needs the Triton environment (`make triton-env`). Prints Markdown and writes everything to --output as JSON.
Exit code: 0 measured (whether or not the bars were met), 1 something failed, 2 a wrong argument, 3 with
--enforce where a bar was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import bench_serve_checks as checks
from bench_ppo_common import machine
from bench_serve_client import HttpLoad
from bench_serve_common import (
    PRESETS,
    Request,
    Sample,
    Settings,
    count_for,
    read_requests,
    statistics,
)
from bench_serve_report import show, summarise
from bench_serve_sides import STARTS, Side, SideSkippedError, World, environment_for

SCRIPTS = Path(__file__).resolve().parent


def prepare(settings: Settings, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Model, export and requests in `folder`, made anew by another process; returns what is known of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings.write(folder / "settings.json")
    command = [sys.executable, str(SCRIPTS / "bench_serve_world.py"), str(folder)]
    for name in ("export", "tokenizer"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    log = folder / "world.log"
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} exited with {code}; the end of {log}:\n{tail}")
    return json.loads((folder / "world.json").read_text(encoding="utf-8"))


def start_sides(world: World, names: list[str]) -> tuple[list[Side], dict[str, str]]:
    """The sides that were asked for, up, and why a peer that cannot run here is left out."""
    sides, skipped = [], {}
    for name in names:
        print(f"starting {name}", file=sys.stderr)
        try:
            sides.append(STARTS[name](world))
        except SideSkippedError as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
            skipped[name] = str(reason)
    return sides, skipped


def used(side: Side) -> dict[str, float]:
    """Processor seconds of each process of a side so far; the client is this process."""
    seconds = {"client": time.process_time()}
    for name, process in side.processes().items():
        times = process.cpu_times()
        seconds[name] = times.user + times.system
    return seconds


def measure(
    side: Side, requests: list[Request], concurrency: int
) -> tuple[dict[str, Any], dict[int, Sample]]:
    """One measurement: statistics with processor seconds, and the samples by request."""
    load, before = os.getloadavg()[0], used(side)
    samples = side.ask(requests, concurrency)
    after = used(side)
    found = statistics(samples, side.streamed)
    found["cpu_seconds"] = {name: after[name] - before[name] for name in before if name in after}
    tokens = max(found["tokens"], 1)
    found["cpu_ms_per_token"] = {name: 1000 * s / tokens for name, s in found["cpu_seconds"].items()}
    found["load_before"] = load
    return found, {sample.index: sample for sample in samples if sample.error is None}


def measure_all(
    sides: list[Side], requests: list[Request], settings: Settings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every side at every concurrency, in turns. `same_text`: answers equal to generate()'s, or else to the
    first side's, of those that both gave."""
    runs: list[dict[str, Any]] = []
    reference: dict[int, str] = {}
    for concurrency in options.concurrency:
        asked = list(islice(cycle(requests), count_for(settings, concurrency)))
        for repeat in range(options.repeats):
            for side in sides:
                if side.levels is not None and concurrency not in side.levels:
                    continue
                found, samples = measure(side, asked, concurrency)
                both = [index for index in samples if index in reference]
                same = sum(samples[index].text == reference[index] for index in both)
                found["same_text"] = [same, len(both)]
                reference |= {i: s.text for i, s in samples.items() if i not in reference}
                runs.append({"side": side.key, "concurrency": concurrency, "repeat": repeat, **found})
                print(
                    f"{side.key} at {concurrency}, {repeat + 1}/{options.repeats}: "
                    f"{found['tokens_per_second']:,.0f} tokens/s, {found['errors']} errors",
                    file=sys.stderr,
                )
    return runs


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, metavar="RUN", help="run directory of an export to serve")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of the random model; default: trained")
    parser.add_argument("--triton-env", default=".venv-triton", help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each, taking turns")
    parser.add_argument(
        "--soak", type=int, metavar="N", help="requests of the memory test, through the gateway"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, concurrency 1 and 4, 400 to soak")
    parser.add_argument("--enforce", action="store_true", help="exit code 3 where a bar is missed")
    parser.add_argument("--work", type=Path, default=Path("build/bench_serve"), help="model and logs")
    parser.add_argument("--output", type=Path, default=Path("build/bench_serve.json"))
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="default: the preset's")
    options = parser.parse_args(arguments)
    if options.quick:
        options.preset, options.concurrency, options.soak = "quick", [1, 4], options.soak or 400
    chosen = {f.name: getattr(options, f.name) for f in fields(Settings)}
    settings = replace(PRESETS[options.preset], **{n: v for n, v in chosen.items() if v is not None})
    if min(options.concurrency) < 1 or options.repeats < 1 or settings.threads < 1:
        parser.error("--concurrency, --repeats and --threads are at least 1")
    if options.soak is not None and (options.soak < 400 or "gateway" not in options.sides):
        parser.error("--soak takes at least 400 requests, and the side `gateway`")
    for low, high in (("prompt_min", "prompt_max"), ("answer_min", "answer_max")):
        if not 1 <= getattr(settings, low) <= getattr(settings, high):
            parser.error(f"--{low.replace('_', '-')} is from 1 to --{high.replace('_', '-')}")
    if options.export is not None and options.tokenizer is not None:
        parser.error("--tokenizer is the random model's: an export has its own")
    for name in ("export", "tokenizer"):
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            parser.error(f"--{name} {path}: no such directory")
    return options, settings


def run_all(options: argparse.Namespace, settings: Settings, world: World) -> dict[str, Any]:
    """Start, measure and stop; everything that the report holds."""
    requests = read_requests(world.folder / "requests.json")
    sides, skipped = start_sides(world, options.sides)
    for side in sides:
        side.ask(requests[:2], 1)
        if side.levels is None:
            side.ask(requests[: max(options.concurrency)], max(options.concurrency))
    runs = measure_all(sides, requests, settings, options)
    short: list[dict[str, Any]] = []
    soaked, tools = None, {}
    gateway = next((side for side in sides if side.key == "gateway"), None)
    if gateway is not None:
        load = HttpLoad(gateway.facts["port"], world.facts["name"], usage=True)
        short = asyncio.run(checks.short_behind_long(load, requests, settings.short_trials))
        tools = checks.other_tools(world, world.triton.grpc_url, load.port, requests, 16)
        if options.soak is not None:
            soaked = checks.soak(gateway, requests, options.soak, settings.soak_answer)
    summary = summarise(runs)
    return {
        "facts": {side.key: side.facts for side in sides},
        "skipped": skipped,
        "summary": summary,
        "verdicts": [asdict(verdict) for verdict in checks.verdicts(summary, short, soaked)],
        "short_behind_long": short,
        "soak": soaked,
        "tools": tools,
        "peak_resident_bytes": checks.peaks(sides),
        "runs": runs,
    }


def main(arguments: list[str] | None = None) -> int:
    options, settings = parse(arguments)
    # As for Ctrl-C: what was started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update(environment_for(settings))
    sys.path.insert(0, str(SCRIPTS.parent))
    from posttrain.errors import PosttrainError
    from serving.embedded import find_environment

    folder = options.work.resolve() / options.preset
    try:
        environment = find_environment(options.triton_env)
        facts = prepare(settings, options, folder)
        with ExitStack() as stack:
            report = run_all(options, settings, World(settings, facts, folder, environment, stack))
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    facts |= {name: Path(facts[name]).name for name in ("export", "weights")}
    report = {
        "machine": machine("cpu", settings.threads),
        "settings": asdict(settings),
        "world": facts,
    } | report
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    show(report, settings)
    print(f"\nall numbers: {options.output}")
    failed = [verdict for verdict in report["verdicts"] if verdict["passed"] is False]
    if any(level["errors"] for levels in report["summary"].values() for level in levels.values()):
        return 1
    return 3 if options.enforce and failed else 0


if __name__ == "__main__":
    sys.exit(main())
