"""`posttrain plan`: what training will need, predicted without loading a weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

PLAN = "train.plan.command:plan"
EPILOG = (
    "Examples: posttrain plan configs/tiny/pipeline.yaml\n\n"
    "posttrain plan my-sft.yaml trainer.max_length=4096 --gpu A100-80GB\n\n"
    "posttrain plan my-sft.yaml --gpu RTX4090 --method qlora --json\n\n"
    "posttrain plan my-sft.yaml --gpu H100 --gpus 8 --strategy zero3\n\n"
    "docs/plan.md has the formulas, their sources, and predictions beside measurements."
)


def add_plan(
    app: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> None:
    """Put the command on the app. reporting: turns errors into messages and exit codes."""

    @app.command(epilog=EPILOG)
    def plan(
        config: Annotated[
            Path, typer.Argument(metavar="CONFIG.yaml", help="A pipeline, or one stage with `stage: KIND`.")
        ],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[a.b=c ...]", help="Settings that replace those in the file."),
        ] = None,
        gpu: Annotated[
            str, typer.Option(help="Device to plan for: A10G, L4, A100-80GB, H100, ...; this: this machine.")
        ] = "this",
        gpus: Annotated[
            int | None, typer.Option(min=1, help="Number of them. Default: the fewest of 1, 2, 4, 8 that do.")
        ] = None,
        strategy: Annotated[
            str | None,
            typer.Option(
                help="single, ddp, zero1, zero2, zero3, zero2-offload, zero3-offload or fsdp2. Default: the "
                "cheapest that fits."
            ),
        ] = None,
        method: Annotated[
            str | None, typer.Option(help="full, lora or qlora (4-bit nf4). Default: what each stage says.")
        ] = None,
        mfu: Annotated[
            float | None,
            typer.Option(min=0.01, max=1.0, help="Share of the device's rate that training reaches."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Predict memory, steps, tokens, FLOPs, hours and disk of each training stage, running nothing.

        Suggests the cheapest layout that fits: fewest devices, then least slow-down.
        """
        with reporting():
            from posttrain.registry import load

            report = load(PLAN)(
                config, overrides or [], gpu=gpu, gpus=gpus, strategy=strategy, method=method, mfu=mfu
            )
            if as_json:
                print_json(report.as_json())
                return
            from rich.console import Console

            console = Console()
            report.print(console if console.is_terminal else Console(width=120))
