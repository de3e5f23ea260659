"""The command `posttrain drift`: does traffic still look like the training data?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from posttrain.errors import UserError

COMMAND = "serving.drift.command"
BASELINE = "baseline"
DRIFTED = 3


def register(app: typer.Typer, reporting: Callable[[], AbstractContextManager[Any]]) -> None:
    """Add the command to `app`; `reporting` turns its errors into messages and exit codes."""

    @app.command(
        epilog="Example: posttrain drift baseline runs/tiny/demos --output baseline.json\n\n"
        "Example: posttrain drift monitor.sqlite --reference baseline.json --model desk --output drift/\n\n"
        "Exit code 0: no drift; 3: drift; 2: bad input or too few records; 1: internal failure. "
        "docs/drift.md has features, tests, floors, a cron line and what this cannot see."
    )
    def drift(
        arguments: Annotated[
            list[str],
            typer.Argument(
                metavar="SOURCE | baseline REFERENCE",
                help="The gateway's database or a jsonl file to look at; or `baseline` and a dataset "
                "directory, jsonl file or database to make a baseline of.",
            ),
        ],
        reference: Annotated[
            Path | None,
            typer.Option(help="Dataset directory, jsonl file, or saved baseline (.json) to compare with."),
        ] = None,
        output: Annotated[
            Path | None, typer.Option(help="Directory for report.html and drift.json; file of a baseline.")
        ] = None,
        day: Annotated[
            str | None, typer.Option(help="YYYY-MM-DD, UTC. Default: the newest in the database.")
        ] = None,
        since: Annotated[str | None, typer.Option(help="From this date or time on (UTC).")] = None,
        last: Annotated[str | None, typer.Option(help="The last 24h, 7d or 2w.")] = None,
        model: Annotated[str | None, typer.Option(help="Model, as the gateway names it.")] = None,
        version: Annotated[str | None, typer.Option(help="Version. Default: all.")] = None,
        alpha: Annotated[
            float, typer.Option(help="Probability of a false alarm, over all features together.")
        ] = 0.05,
        correction: Annotated[
            Literal["holm", "bh"], typer.Option(help="Holm, or Benjamini-Hochberg.")
        ] = "holm",
        tokenizer: Annotated[
            Path | None, typer.Option(help="Model or export directory to count tokens by. Default: words.")
        ] = None,
        embedding: Annotated[
            Path | None,
            typer.Option(help="Local sentence-transformers model. Default: TF-IDF and SVD."),
        ] = None,
        reward_model: Annotated[
            Path | None, typer.Option(help="Run directory of a reward stage: scores become a feature.")
        ] = None,
        tag: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME=module:function", help="A feature of your own. May be repeated."),
        ] = None,
        prometheus: Annotated[
            Path | None, typer.Option(help="FILE.prom for node_exporter's textfile collector.")
        ] = None,
        seed: Annotated[int, typer.Option(help="Of splits, samples and permutations.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Compare served traffic with the training data; alarm on what is both significant and large."""
        with reporting():
            from posttrain.registry import load

            things = load(f"{COMMAND}:Things")(tokenizer, embedding, reward_model, _tags(tag or []))
            selection = load(f"{COMMAND}:parse_selection")(day, since, last, model, version)
            if arguments[0] == BASELINE:
                _baseline(arguments[1:], output, things, selection, seed)
                return
            if len(arguments) != 1 or reference is None:
                raise UserError(
                    "name one database or jsonl file, and --reference\n    posttrain drift --help shows how"
                )
            outcome = load(f"{COMMAND}:run")(
                Path(arguments[0]),
                reference,
                selection,
                things=things,
                alpha=alpha,
                correction=correction,
                output=output,
                prometheus=prometheus,
                seed=seed,
                say=lambda text: print(text, file=sys.stderr),
            )
            if as_json:
                print(json.dumps(outcome.as_json(), indent=2, ensure_ascii=False))
            else:
                print("\n".join(load(f"{COMMAND}:lines")(outcome)))
            if outcome.drifted:
                raise SystemExit(DRIFTED)


def _tags(given: list[str]) -> dict[str, str]:
    for item in given:
        if not item.partition("=")[0].isidentifier() or ":" not in item:
            raise UserError(f"--tag {item}: is not NAME=module:function")
    return dict(item.split("=", 1) for item in given)


def _baseline(arguments: list[str], output: Path | None, things: Any, selection: Any, seed: int) -> None:
    from posttrain.registry import load

    if len(arguments) != 1 or output is None or output.suffix != ".json":
        raise UserError(
            "a baseline needs one dataset directory, jsonl file or database, and a file to write\n"
            "    posttrain drift baseline DATASET_DIR --output baseline.json"
        )
    made = load(f"{COMMAND}:make_baseline")(Path(arguments[0]), output, things, selection, seed)
    print(
        f"{output}: {made.rows} rows, {made.fitted} to fit and {made.held_out.size} to compare with",
        file=sys.stderr,
    )
