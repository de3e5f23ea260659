"""Curation at 10,000 to 1,000,000 records: seconds a row, memory, equal results of N processes and of Ray.

    python scripts/bench_curate.py ../shared/data --output docs/benchmarks/curate.json

Records are replicated with edits from dialogues, questions, instructions and web texts of the folder: nine of
ten have four in ten words replaced by words of others, one in ten is a near copy of a recent one, one in
fifty has an e-mail address planted. The pipeline has exact dedup, unicode, quality, pii and near_duplicates,
and splits by cluster. Each run is a process of its own; its memory and that of its workers are read from
/proc five times a second: VmHWM is the peak of what is resident, rss_anon_mb that without pages of files.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = (10_000, 100_000, 1_000_000)
PART_ROWS = 100_000
OPERATIONS: list[dict[str, Any]] = [
    {"op": "unicode"},
    {"op": "quality"},
    {"op": "pii", "action": "redact"},
    {"op": "near_duplicates", "keep": "all"},
]


def dialogues(folder: Path) -> Iterator[tuple[str, str]]:
    """(question, answer) pairs of the folder's data sets."""
    with gzip.open(folder / "hh_rlhf/harmless-base/test.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            _, ask, answer = json.loads(line)["chosen"].rsplit("\n\n", 2)
            yield ask.removeprefix("Human: "), answer.removeprefix("Assistant: ")
    with (folder / "gsm8k/grade_school_math/data/test.jsonl").open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            yield row["question"], row["answer"]
    demo = folder / "llamafactory_demo/data"
    for row in json.loads((demo / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        yield f"{row['instruction']} {row.get('input', '')}".strip(), row["output"]
    with (demo / "c4_demo.jsonl").open(encoding="utf-8") as stream:
        for text in (json.loads(line)["text"] for line in stream):
            yield f"Go on: {text[:200]}", text[200:2000]


def records(folder: Path, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` records; those of a smaller count are the first of a larger one."""
    rng = random.Random(seed)
    bases = [pair for pair in dialogues(folder) if all(map(str.strip, pair))]
    words = [word for pair in bases for text in pair for word in text.split()]
    recent: list[tuple[str, str]] = []
    for _ in range(count):
        near = bool(recent) and rng.random() < 0.1
        ask, answer = rng.choice(recent if near else bases)
        pair = (
            edited(ask, rng, words, 0.03 if near else 0.4),
            edited(answer, rng, words, 0.03 if near else 0.4),
        )
        if len(recent) < 1000:
            recent.append(pair)
        else:
            recent[rng.randrange(1000)] = pair
        mail = f" Write to {rng.choice(words).lower()}@mail.example." if rng.random() < 0.02 else ""
        yield {
            "messages": [
                {"role": "user", "content": pair[0]},
                {"role": "assistant", "content": pair[1] + mail},
            ]
        }


def edited(text: str, rng: random.Random, words: list[str], share: float) -> str:
    """The text with this share of its words replaced, white space as it was."""
    parts = re.split(r"(\s+)", text)
    for at in range(0, len(parts), 2):
        if parts[at] and rng.random() < share:
            parts[at] = rng.choice(words)
    return "".join(parts)


def write_parts(folder: Path, source: Path, count: int) -> None:
    """The records in files of PART_ROWS."""
    found = records(source, count)
    for part in range(-(-count // PART_ROWS)):
        with (folder / f"part-{part:03}.jsonl").open("w", encoding="utf-8") as stream:
            for _ in range(min(PART_ROWS, count - part * PART_ROWS)):
                stream.write(json.dumps(next(found), ensure_ascii=False) + "\n")


def curate(folder: Path, out: Path, engine: str, workers: int) -> dict[str, Any]:
    """Run the stage in this process: its metrics and timings."""
    from data_prep.config import CurateConfig
    from posttrain.stage import execute_stage

    config = CurateConfig.model_validate(
        {
            "kind": "conversation",
            "sources": [{"path": str(folder / "part-*.jsonl")}],
            "filters": {"min_chars": 10},
            "operations": OPERATIONS,
            "split": {"by": "cluster"},
            "max_reject_fraction": 0.05,
            "engine": engine,
            "workers": workers,
        }
    )
    started = time.perf_counter()
    manifest = execute_stage("curate", config, out).manifest
    seconds = time.perf_counter() - started
    times = os.times()
    return {
        "seconds": seconds,
        "cpu_seconds": times.user + times.system + times.children_user + times.children_system,
        "phases": manifest["timings"],
        "rows_out": manifest["metrics"]["rows_out"],
        "drops": manifest["metrics"]["drops"],
        "content_hash": manifest["metrics"]["content_hash"],
    }


def status(pid: int) -> dict[str, float]:
    """Memory of a process in MB (10^6 bytes), nothing of one that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", text))
    return {name: int(value) * 1024 / 1e6 for name, value in found.items()}


def family(pid: int) -> Iterator[int]:
    """The process and those it started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def in_own_process(folder: Path, engine: str, workers: int) -> dict[str, Any]:
    """`curate` in a new Python, and the peaks of its memory."""
    root = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [sys.executable, __file__, str(folder), "--measure", str(Path(out) / "run")]
        command += ["--engine", engine, "--workers", str(workers)]
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        peaks: dict[int, dict[str, float]] = {}
        while child.poll() is None:
            for pid in family(child.pid):
                for name, value in status(pid).items():
                    held = peaks.setdefault(pid, {})
                    held[name] = max(held.get(name, 0.0), value)
            time.sleep(0.2)
        assert child.stdout is not None
        if child.returncode:
            raise SystemExit(f"the run with engine {engine} and {workers} workers failed")
        driver = peaks.pop(child.pid)
        report = json.loads(child.stdout.read().splitlines()[-1])
    report |= {"engine": engine, "workers": workers}
    report |= {"peak_rss_mb": driver["VmHWM"], "rss_anon_mb": driver["RssAnon"]}
    if workers > 1:
        report["largest_worker_rss_mb"] = max(at["VmHWM"] for at in peaks.values())
    return report


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every size with one process, the sizes up to `--compare` also with two and on Ray."""
    runs: list[dict[str, Any]] = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as name:
            folder = Path(name) / "parts"
            folder.mkdir()
            write_parts(folder, args.folder, size)
            size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            several = (("local", 2), ("ray", 2)) if size <= args.compare else ()
            for engine, workers in (("local", 1), *several):
                run = {"rows": size, "input_mb": size_mb, **in_own_process(folder, engine, workers)}
                run["rows_per_second"] = size / run["seconds"]
                run["microseconds_per_row"] = run["seconds"] / size * 1e6
                runs.append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "command": "python scripts/bench_curate.py ../shared/data",
        "operations": OPERATIONS,
        "runs": runs,
        **comparisons(runs),
    }


def comparisons(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Time a row and memory against the 100,000 of one process; whether two and Ray gave the same."""
    single = {run["rows"]: run for run in runs if run["workers"] == 1}
    several = [run for run in runs if run["workers"] > 1]
    found: dict[str, Any] = {
        "same_content_hash": all(
            run["content_hash"] == single[run["rows"]]["content_hash"] for run in several
        )
    }
    base = single.get(100_000)
    if base is not None:
        found["time_per_row_against_100k"] = {
            str(rows): run["microseconds_per_row"] / base["microseconds_per_row"]
            for rows, run in single.items()
        }
        found["cpu_per_row_against_100k"] = {
            str(rows): run["cpu_seconds"] / rows / (base["cpu_seconds"] / 100_000)
            for rows, run in single.items()
        }
        found["rss_anon_against_100k"] = {
            str(rows): run["rss_anon_mb"] / base["rss_anon_mb"] for rows, run in single.items()
        }
    return found


def main() -> None:
    """Command line; `--measure` is what the processes of their own are started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the data sets to make records from")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--compare", type=int, default=100_000, help="largest size also run by two and on Ray"
    )
    parser.add_argument("--scratch", help="folder for the records and runs")
    parser.add_argument("--output", type=Path, help="write the report to this JSON file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="local", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(curate(args.folder, args.measure, args.engine, args.workers)))
        return
    text = json.dumps(benchmark(args), indent=2)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
