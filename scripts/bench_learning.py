"""Is the learning real? The tiny pipeline over several seeds, everything trained anew for each.

    python scripts/bench_learning.py --seeds 0 1 2 3 4
    python scripts/bench_learning.py --seeds 0 1 2 3 4 --jobs 2   # two at a time, on half of the cores each

Writes runs/seeds.html (the report over all seeds) and prints a Markdown table of the bars: reward-model
accuracy against the noiseless gold, gold scores with 95 % intervals, gold win rates against SFT, PPO's KL
and its target. Exits 1 when a seed misses a bar. Finished stages are skipped, so an interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path


def run_seed(seed: int, config: str, output_dir: str, jobs: int) -> Path:
    """Run the pipeline up to its evaluation and return its directory. Raises CalledProcessError.

    With several jobs its output goes to NAME.log beside the directory, and it gets its share of the cores.
    """
    directory = Path(output_dir) / f"tiny-seed{seed}"
    command = [sys.executable, "-m", "posttrain", "run", config, "--until", "eval"]
    command += [f"name={directory.name}", f"seed={seed}", f"output_dir={output_dir}"]
    if jobs == 1:
        subprocess.run(command, check=True)
        return directory
    threads = max(1, (os.cpu_count() or 1) // jobs)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.log", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return directory


def row(seed: int, directory: Path) -> tuple[str, bool]:
    """One line of the table, and whether every bar was met."""
    report = json.loads((directory / "eval" / "eval.json").read_text())
    cells = [str(seed)]
    passed = all(verdict["passed"] for verdict in report["verdicts"])
    cells.append(_interval(report["reward_model"]["gold"]["accuracy"]))
    for name in ("sft", "dpo", "ppo"):
        cells.append(_interval(report["models"][name]["gold"]))
    for name in ("dpo", "ppo"):
        cells.append(_interval(report["models"][name]["gold_win_rate"]))
    cells.append(f"{report['models']['ppo']['kl_k1']['value']:.1f}")
    cells.append("yes" if passed else "NO")
    return "| " + " | ".join(cells) + " |", passed


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--config", default="configs/tiny/pipeline.yaml")
    parser.add_argument("--output-dir", default="runs")
    arguments = parser.parse_args()
    run = partial(run_seed, config=arguments.config, output_dir=arguments.output_dir, jobs=arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        directories = list(pool.map(run, arguments.seeds))
    page = str(Path(arguments.output_dir) / "seeds.html")
    report = [sys.executable, "-m", "posttrain", "report", *map(str, directories), "--output", page]
    subprocess.run(report, check=True)
    rows = [row(seed, directory) for seed, directory in zip(arguments.seeds, directories, strict=True)]
    columns = "seed|RM accuracy (gold)|SFT gold|DPO gold|PPO gold|DPO wins|PPO wins|PPO KL|bars met".split(
        "|"
    )
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    print("\n".join(line for line, _ in rows))
    print(f"\nreport: {page}")
    return 0 if all(passed for _, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
