"""The command `posttrain parity`: is the model behind a URL the one that was trained?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

CHECK = "serving.live_parity:check_parity"


def register(app: typer.Typer, reporting: Callable[[], AbstractContextManager[Any]]) -> None:
    """Add the command to `app`; `reporting` turns its errors into messages and exit codes."""

    @app.command(
        epilog="Example: posttrain parity runs/tiny/export --url http://127.0.0.1:8000\n\n"
        "Exit code 0: the server answers as the trained model; 1: it does not, and the report says where; 2: "
        "no such export, or no server there."
    )
    def parity(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of an export.")],
        url: Annotated[str, typer.Option(help="The server's HTTP address.")] = "http://127.0.0.1:8000",
        grpc: Annotated[
            str | None, typer.Option(help="HOST:PORT to stream over gRPC. Default: over HTTP.")
        ] = None,
        model: Annotated[
            str | None, typer.Option(help="Name on the server. Default: the exported one.")
        ] = None,
        version: Annotated[str | None, typer.Option(help="Version. Default: the newest exported.")] = None,
        prompts: Annotated[
            int | None, typer.Option(min=1, help="Only the first so many golden prompts.")
        ] = None,
        max_logprob_delta: Annotated[
            float | None, typer.Option(min=0, help="Nats. Default: 1e-3 in float32, 0.1 in half precision.")
        ] = None,
        tie: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="Nats by which the trained model may prefer its own token where another is served. "
                "Default: 0 in float32, 0.1 in half precision.",
            ),
        ] = None,
        concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests in flight.")] = 4,
        timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one response.")] = 120.0,
        as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
    ) -> None:
        """Prove that a live server answers as the trained model, by the golden set stored in an export."""
        with reporting():
            from posttrain.registry import load

            result = load(CHECK)(
                run,
                url,
                grpc,
                model=model,
                version=version,
                num_prompts=prompts,
                max_logprob_delta=max_logprob_delta,
                tie=tie,
                concurrency=concurrency,
                timeout_s=timeout,
                say=lambda text: print(text, file=sys.stderr),
            )
            if as_json:
                print(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
            else:
                print("\n".join(result.lines()))
            if not result.passed:
                raise SystemExit(1)
