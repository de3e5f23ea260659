"""`posttrain data`: looking at data before and after it is curated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli_data_diff import add_diff
from posttrain.cli_data_export import add_export

DOCTOR = "data_prep.doctor.command:diagnose"
SHOW = "data_prep.browse:browse"

AsJson = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]


def register(
    app: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> typer.Typer:
    """Add `posttrain data` to `app` and return it, for more commands of its own.

    reporting: turns what a command raises into messages and exit codes.
    """
    data = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="Look at data: doctor, show, diff; export."
    )
    app.add_typer(data, name="data")
    _add_doctor(data, reporting, print_json)
    _add_show(data, reporting, print_json)
    add_diff(data, reporting, print_json)
    add_export(data, reporting, print_json)
    return data


def _add_doctor(
    data: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> None:
    @data.command(
        epilog="Example: posttrain data doctor downloads/ --output ingest.yaml\n\n"
        "Example: posttrain data doctor 'data/*.jsonl.gz' --json\n\n"
        "Exit code 0: there are rows, whatever is wrong with some; 2: nothing readable. docs/data.md has the "
        "formats and what is looked for."
    )
    def doctor(
        paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders or globs.")],
        output: Annotated[
            Path | None, typer.Option(help="File for the curate configuration. Default: printed.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Say what data files are, what is wrong with them, and which configuration ingests them."""
        with reporting():
            from rich.console import Console

            from posttrain.registry import load

            found = load(DOCTOR)(paths, output)
            if as_json:
                print_json(found.as_json())
            else:
                console = Console(stderr=True)
                found.print(console if console.is_terminal else Console(stderr=True, width=140))
                if found.config is not None and output is None:
                    print(found.config, end="")
            if found.config is None:
                print("no configuration: no file has rows that can be used", file=sys.stderr)
            elif output is not None:
                print(f"wrote {output}; try: posttrain check {output}", file=sys.stderr)
            if not found.readable:
                raise SystemExit(2)


def _add_show(
    data: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> None:
    @data.command(
        epilog="Example: posttrain data show runs/tiny/demos --grep refund --rows 3\n\n"
        "Example: posttrain data show data/train.jsonl --tokenizer runs/tiny/sft-merged"
    )
    def show(
        data: Annotated[
            str,
            typer.Argument(
                metavar="DATASET_OR_FILE", help="A curated data set or its run, or any data file."
            ),
        ],
        rows: Annotated[int, typer.Option(min=1, help="How many records to show.")] = 5,
        start: Annotated[int, typer.Option("--from", min=1, help="Number of the first record.")] = 1,
        grep: Annotated[
            str | None, typer.Option(help="Only records that hold this text, whatever the case.")
        ] = None,
        split: Annotated[str, typer.Option(help="Of a curated data set: train or eval.")] = "train",
        tokenizer: Annotated[
            str | None, typer.Option(help="A model or tokenizer: renders the chat template, counts tokens.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Browse records, with the chat template rendered and tokens counted when a tokenizer is given."""
        with reporting():
            from rich.console import Console

            from posttrain.registry import load

            found = load(SHOW)(data, rows=rows, start=start, grep=grep, split=split, tokenizer=tokenizer)
            if as_json:
                print_json([record.as_json() for record in found])
                return
            console = Console()
            for record in found:
                record.print(console)
