"""The commands `posttrain compare` and `posttrain gate`: is a run better, and is it good enough?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

COMPARE = "eval.compare.command"
GATE = "eval.gate.command"


def register(
    app: typer.Typer,
    reporting: Callable[[], AbstractContextManager[Any]],
    print_json: Callable[[Any], None],
) -> None:
    """Add the commands to `app`; `reporting` turns their errors into messages and exit codes."""

    @app.command(
        epilog="Example: posttrain compare runs/before/eval runs/after/eval\n\n"
        "Example: posttrain compare runs/tiny/eval runs/tiny/eval --model sft=ppo --html compare.html\n\n"
        "Exit code 0 whatever the difference is (`posttrain gate` judges it); 2: they cannot be compared.\n\n"
        "docs/judging.md has the tests and the slices."
    )
    def compare(
        run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run directory of an eval stage.")],
        run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one, on the same prompts.")],
        model: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME | NAME_A=NAME_B", help="Default: the models in both. May be repeated."
            ),
        ] = None,
        correction: Annotated[
            Literal["holm", "bh"], typer.Option(help="Holm, or Benjamini-Hochberg.")
        ] = "holm",
        confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Level of intervals.")] = 0.95,
        html: Annotated[Path | None, typer.Option(help="Page to write, with a browser of samples.")] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of resamples.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Compare two evaluations prompt by prompt: differences, their significance, slices, samples."""
        with reporting():
            from rich.console import Console

            from posttrain.registry import load

            settings = load(f"{COMPARE}:Settings")(tuple(model or ()), correction, confidence, seed=seed)
            compared = load(f"{COMPARE}:compare")(run_a, run_b, settings)
            if html is not None:
                load(f"{COMPARE}:write_page")(compared, html)
                print(html, file=sys.stderr)
            if as_json:
                print_json(compared.figures)
            else:
                load(f"{COMPARE}:show")(compared.figures, Console())

    @app.command(
        epilog="Example: posttrain gate gates.yaml\n\n"
        "Example: posttrain gate gates.yaml run=runs/candidate/eval --junit gates.xml\n\n"
        "Exit code 0: every gate passes; 1: one fails, with the reason; 2: the file is wrong or a figure is "
        "missing. docs/gates.md has the file."
    )
    def gate(
        gates: Annotated[Path, typer.Argument(metavar="GATES.yaml", help="The file of gates.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings that replace those in it.")
        ] = None,
        junit: Annotated[Path | None, typer.Option(help="JUnit XML to write, for a CI server.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Hold the figures of finished runs against bounds, and fail when one is not kept: for CI."""
        with reporting():
            from rich.console import Console

            from posttrain.registry import load

            outcomes = load(f"{GATE}:judge_gates")(gates, overrides or ())
            if junit is not None:
                load(f"{GATE}:write_junit")(outcomes, junit, gates.stem)
            if as_json:
                print_json(load(f"{GATE}:as_json")(outcomes))
            else:
                load(f"{GATE}:show")(outcomes, Console())
            code = load(f"{GATE}:exit_code")(outcomes)
            if code:
                raise SystemExit(code)
