"""The report of a pipeline: one self-contained HTML page, no script and no network.

    write_report([Path("runs/tiny")], Path("runs/tiny/report.html"))

Given several pipeline directories (the same pipeline with other seeds), the first is shown in full, the
others as thin lines behind its curves, and every bar and headline number in a table over all of them.
Stages that have not run are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.pages import page_environment
from eval.report.curves import stage_curves
from eval.report.figures import frontier_figures, model_colours, reward_figures, score_figures, timing_figure
from eval.report.lineage import lineage_svg
from eval.report.load import Pipeline, load_pipeline
from eval.report.page import (
    collect_verdicts,
    duration,
    environment_rows,
    headline,
    results_of,
    sample_groups,
    scalar,
    seed_rows,
    stage_rows,
    total_seconds,
)
from posttrain.errors import UserError
from posttrain.rundir import atomic_write_text
from posttrain.svg import number

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the page for one or several pipeline directories, atomically, and return `output`.

    Raises:
        UserError: `runs` is empty.
        DataError: a directory holds no stage, or a file in it is not valid JSON.
    """
    if not runs:
        raise UserError("no run to report on: name at least one pipeline directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, render([load_pipeline(Path(run)) for run in runs]))
    return output


def render(pipelines: Sequence[Pipeline]) -> str:
    """The page as text. Everything from a run is escaped by the template; charts escape their own."""
    from markupsafe import Markup

    environment = page_environment()
    environment.filters["num"] = lambda value: number(float(value)) if value is not None else "-"
    environment.filters["svg"] = Markup
    return environment.get_template("report.html").render(**page(pipelines))


def page(pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    """What the template shows, by name."""
    main = pipelines[0]
    results = results_of(main)
    verdicts = collect_verdicts(pipelines)
    parity = main.with_file("parity")
    return {
        "title": main.name,
        "runs": [run_name(pipeline, pipelines) for pipeline in pipelines],
        "stages": stage_rows(main),
        "complete": sum(stage.status == "complete" for stage in main.stages),
        "duration": duration(sum(total_seconds(stage) for stage in main.stages)),
        "finished": max((str(stage.manifest.get("finished") or "") for stage in main.stages), default=""),
        "verdicts": verdicts,
        "met": sum(verdict.passed for verdict in verdicts),
        "headline": headline(results),
        "results": results,
        "scores": score_figures(results) if results else [],
        "frontier": frontier_figures(pipelines, results) if results else [],
        "reward": results["reward_model"] if results else None,
        "reward_figures": reward_figures(results["reward_model"])
        if results and results["reward_model"]
        else [],
        "curves": [(stage, panels) for stage in main.stages if (panels := stage_curves(pipelines, stage))],
        "colours": model_colours(results) if results else {},
        "samples": sample_groups(main.with_file("eval")),
        "seeds": seed_rows(pipelines) if len(pipelines) > 1 else [],
        "parity": [(k, scalar(v)) for k, v in parity.files["parity"].items() if scalar(v)] if parity else [],
        "lineage": lineage_svg(main),
        "timing": timing_figure(main.stages),
        "environment": environment_rows(main),
        "configs": [
            (stage.name, (stage.path / "config.yaml").read_text(encoding="utf-8"))
            for stage in main.stages
            if (stage.path / "config.yaml").exists()
        ],
    }


def run_name(pipeline: Pipeline, pipelines: Sequence[Pipeline]) -> str:
    """The pipeline's name, or its directory's where several runs carry the same name."""
    same = sum(other.name == pipeline.name for other in pipelines)
    return pipeline.name if same == 1 else pipeline.path.resolve().name
