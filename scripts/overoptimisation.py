"""Reward over-optimisation on the tiny world: gold and proxy reward against sqrt(KL), as in Gao et al. 2022.

    python scripts/overoptimisation.py

Runs configs/tiny/pipeline.yaml up to its reward model, then configs/tiny/over-optimisation.yaml: proxies that
learned from few labelled pairs, PPO against each without a KL penalty, and against the weakest with one.
Writes into runs/tiny-over-optimisation/: over-optimisation.html (one page, no script, no network), .svg (its
figure) and .md (its tables, printed too). Finished stages are skipped, so an interrupted experiment goes on
where it was; --no-run only reads what is there. About a quarter of an hour on two idle CPU cores.

Departures from the paper: the gold reward is a program instead of a large reward model, proxies differ in
pairs and not in parameters, and answers are scored on training prompts, as they are sampled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from overoptimisation_page import Result, figure_svg, fit_table, parts_table, render, run_table

from eval.over_optimisation import fit_gao, markdown_table, summarise, trajectory
from posttrain.pipeline import load_pipeline
from posttrain.rundir import atomic_write_text, metric_rows

WORLD = "configs/tiny/pipeline.yaml"
EXPERIMENT = "configs/tiny/over-optimisation.yaml"


def main() -> int:
    """Exit status: 0, or that of the `posttrain run` that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of every stage, the tiny pipeline's included")
    parser.add_argument("--output-dir", default="runs")
    parser.add_argument("--no-run", action="store_true", help="draw what earlier runs left")
    parser.add_argument("--figure", type=Path, help="also write the figure here, e.g. docs/images/x.svg")
    arguments = parser.parse_args()

    suffix = f"-seed{arguments.seed}" if arguments.seed else ""
    world = [f"name=tiny{suffix}", f"seed={arguments.seed}", f"output_dir={arguments.output_dir}"]
    experiment = [f"name=tiny-over-optimisation{suffix}", f"vars.world={arguments.output_dir}/tiny{suffix}"]
    experiment += world[1:]
    if not arguments.no_run:
        command = [sys.executable, "-m", "posttrain", "run"]
        for steps in ([WORLD, "--until", "reward", *world], [EXPERIMENT, *experiment]):
            status = subprocess.run([*command, *steps], check=False).returncode
            if status:
                return status

    results = read_results(EXPERIMENT, experiment)
    directory = Path(arguments.output_dir) / f"tiny-over-optimisation{suffix}"
    write(results, directory, arguments.figure)
    return 0


def read_results(config: str, overrides: list[str]) -> list[Result]:
    """The PPO runs of the experiment, in the order of its file.

    Raises FileNotFoundError or KeyError when one of them, its reward model or its evaluation has not run.
    """
    pipeline = load_pipeline(Path(config), overrides)
    judged = {}
    for name, block in pipeline.stages.items():
        if block.kind == "eval":
            report = json.loads((pipeline.directory / name / "eval.json").read_text(encoding="utf-8"))
            for label, path in block.config.model_dump()["models"].items():
                judged[Path(path).name] = (report, label)
    results = []
    for name, block in pipeline.stages.items():
        if block.kind != "ppo":
            continue
        config_of = block.config.model_dump()
        report, label = judged[name]
        reward = json.loads((Path(config_of["reward"]) / "manifest.json").read_text(encoding="utf-8"))
        run = trajectory(metric_rows(pipeline.directory / name))
        results.append(
            Result(
                name=name,
                pairs=reward["metrics"]["train_pairs"],
                accuracy=report["reward_model"]["gold"]["accuracy"],
                penalty=config_of["kl_coef"] > 0,
                run=run,
                summary=summarise(run),
                fit=fit_gao(run.distance, run.gold),
                warnings=_rows(pipeline.directory / name / "warnings.jsonl"),
                samples=_rows(pipeline.directory / name / "samples.jsonl"),
                baseline=report["models"][report["baseline"]],
                final=report["models"][label],
            )
        )
    return results


def write(results: list[Result], directory: Path, figure: Path | None) -> None:
    """The page, the figure and the tables; the tables are printed as well."""
    tables = "\n\n".join(markdown_table(*table(results)) for table in (run_table, fit_table, parts_table))
    atomic_write_text(directory / "over-optimisation.html", render(results))
    atomic_write_text(directory / "over-optimisation.md", tables + "\n")
    for path in (directory / "over-optimisation.svg", *([figure] if figure else [])):
        atomic_write_text(path, figure_svg(results, standalone=True) + "\n")
    print(f"{tables}\n\npage: {directory / 'over-optimisation.html'}")


def _rows(path: Path) -> list[dict]:
    """JSON lines; none when there is no file."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


if __name__ == "__main__":
    sys.exit(main())
