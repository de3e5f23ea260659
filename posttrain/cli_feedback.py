"""The command `posttrain feedback`: what users said about answers, as a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

EXPORT = "serving.monitor.feedback:export"


def register(app: typer.Typer, reporting: Callable[[], AbstractContextManager[Any]]) -> None:
    """Add the command to `app`; `reporting` turns its errors into messages and exit codes."""

    @app.command(
        epilog="Example: posttrain feedback monitoring.db --output prefs.jsonl\n\n"
        "Example: posttrain feedback monitoring.db --flagged --output labelled.jsonl\n\n"
        "Then: posttrain curate kind=preference 'sources=[{path: prefs.jsonl}]'\n\n"
        "Exit code 2: no such database, or nothing in it that makes a row. docs/monitoring.md has the rules."
    )
    def feedback(
        database: Annotated[
            Path, typer.Argument(metavar="DATABASE", help="The gateway's `monitoring.database`.")
        ],
        output: Annotated[Path, typer.Option(help="The .jsonl file to write; its lineage goes beside it.")],
        flagged: Annotated[
            bool, typer.Option("--flagged", help="Flagged samples as labelled answers, instead of votes.")
        ] = False,
        min_votes: Annotated[
            int, typer.Option(min=1, help="Leave out pairs of answers with fewer votes.")
        ] = 1,
        as_json: Annotated[bool, typer.Option("--json", help="Write the lineage to stdout as JSON.")] = False,
    ) -> None:
        """Make preferences of the votes, or labelled answers of the flagged samples, that a gateway kept."""
        with reporting():
            from posttrain.registry import load

            lineage = load(EXPORT)(database, output, flagged=flagged, min_votes=min_votes)
            if as_json:
                print(json.dumps(lineage, indent=2, ensure_ascii=False))
                return
            left_out = ", ".join(f"{reason} {count}" for reason, count in lineage["left_out"].items())
            read, made = lineage["source"]["rows"], lineage["output"]["rows"]
            print(f"{output}: {made} rows of {read} ({left_out or 'nothing left out'})", file=sys.stderr)
