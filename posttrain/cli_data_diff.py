"""`posttrain data diff`: what changed between two data sets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

DIFF = "data_prep.diff:diff"


def add_diff(
    data: typer.Typer,
    reporting: Callable[[], AbstractContextManager[None]],
    print_json: Callable[[Any], None],
) -> None:
    """Put the command on `posttrain data`."""

    @data.command(
        epilog="Example: posttrain data diff runs/v1/demos runs/v2/demos\n\n"
        "Exit code 0 whether or not they differ; --json has `same_content`."
    )
    def diff(
        old: Annotated[Path, typer.Argument(metavar="OLD", help="A curated data set or its run directory.")],
        new: Annotated[Path, typer.Argument(metavar="NEW", help="Another one of the same kind.")],
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Say what changed between two data sets: rows, sides, drops, settings, lengths."""
        with reporting():
            from rich.console import Console

            from posttrain.registry import load

            found = load(DIFF)(old, new)
            if as_json:
                print_json(found.as_json())
            else:
                console = Console()
                found.print(console if console.is_terminal else Console(width=140))
