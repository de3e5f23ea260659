"""`posttrain data export`: a curated data set as one of TRL's dataset types."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

EXPORT = "data_prep.export:export"


def add_export(
    data: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> None:
    """Put the command on `posttrain data`."""

    @data.command(
        epilog="Example: posttrain data export runs/demos --to prompt-completion --output demos.jsonl\n\n"
        "Example: posttrain data export runs/pairs --to preference --style standard --tokenizer runs/sft "
        "--split both --output pairs.parquet\n\n"
        "Types: language-modeling, prompt-only, prompt-completion, preference, preference-implicit, "
        "unpaired-preference. docs/data.md says which kind of rows gives which."
    )
    def export(
        data: Annotated[Path, typer.Argument(metavar="DATASET", help="A curated data set or its run.")],
        to: Annotated[str, typer.Option(metavar="TYPE", help="The dataset type of TRL, as listed below.")],
        output: Annotated[Path, typer.Option(help="File to write: .jsonl or .parquet.")],
        style: Annotated[
            str, typer.Option(help="conversational: turns; standard: text by the chat template.")
        ] = "conversational",
        split: Annotated[str, typer.Option(help="train, eval or both.")] = "train",
        tokenizer: Annotated[
            str | None, typer.Option(help="A model or tokenizer whose chat template style standard uses.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Write a data set as one of TRL's dataset types."""
        with reporting():
            from posttrain.registry import load

            done = load(EXPORT)(data, to, output, style=style, split=split, tokenizer=tokenizer, force=force)
            if as_json:
                print_json(done.as_json())
            else:
                print(
                    f"wrote {done.rows_out:,} rows, {done.type} ({done.style}), to {output}", file=sys.stderr
                )
