"""The commands around the gateway: `posttrain gateway`, `posttrain gateway-key` and `posttrain chat`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import UserError

SERVE = "serving.gateway.server:run"
NEW_KEY = "serving.gateway.keys:describe_new_key"
CHAT = "serving.chat:run"


def load_gateway() -> Any:
    """The function that runs a gateway. Raises UserError where its packages are not installed."""
    from posttrain.registry import load

    try:
        return load(SERVE)
    except ModuleNotFoundError as error:
        raise UserError(f"the gateway needs {error.name}\n    pip install 'posttrain[gateway]'") from error


def register(app: typer.Typer, reporting: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the commands to `app`; `reporting` turns what they raise into messages and exit codes."""

    @app.command(
        epilog="Example: posttrain gateway gateway.yaml port=9000\n\n"
        "Example: posttrain gateway authentication=none models.desk.versions.v1.export=runs/tiny/export "
        "models.desk.versions.v1.triton=127.0.0.1:8001\n\n"
        "SIGHUP reads models and keys again, SIGTERM drains and ends with exit code 0. docs/gateway.md has "
        "the file, the limits and the security notes."
    )
    def gateway(
        arguments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[GATEWAY.yaml] [a.b=c ...]", help="The YAML file and settings to replace."
            ),
        ] = None,
        check: Annotated[
            bool,
            typer.Option(
                "--check",
                help="Read configuration, keys and exports, look at the database, and serve nothing.",
            ),
        ] = False,
    ) -> None:
        """Serve an OpenAI-compatible API in front of Triton: keys, limits, canaries, metrics."""
        with reporting():
            given = arguments or []
            if not given:
                raise UserError(
                    "nothing to serve: name a YAML file\n    posttrain gateway --help shows an example"
                )
            path = None if "=" in given[0] else Path(given[0])
            load_gateway()(path, given[1:] if path else given, check=check)
            if check:
                print(f"{path or 'command line'}: valid", file=sys.stderr)

    @app.command("gateway-key", epilog="Example: posttrain gateway-key alice")
    def gateway_key(
        name: Annotated[str, typer.Argument(help="Who will use the key.")],
    ) -> None:
        """Make an API key: shown once on stdout, with the line for the gateway's keys file on stderr."""
        with reporting():
            from posttrain.registry import load

            key, line = load(NEW_KEY)(name)
            print(line, file=sys.stderr)
            print(key)

    @app.command(
        epilog="Example: posttrain chat --url http://localhost:8080/v1 --model desk --temperature 0\n\n"
        "The API key comes from POSTTRAIN_API_KEY, else OPENAI_API_KEY."
    )
    def chat(
        url: Annotated[str, typer.Option(help="Base URL of the API, with /v1.")] = "http://localhost:8080/v1",
        model: Annotated[
            str | None, typer.Option(help="Model to ask. Default: the first one served.")
        ] = None,
        system: Annotated[str | None, typer.Option(help="System message.")] = None,
        temperature: Annotated[float | None, typer.Option(help="0: greedy. Default: the server's.")] = None,
        top_p: Annotated[float | None, typer.Option(help="Nucleus sampling. Default: the server's.")] = None,
        max_tokens: Annotated[int | None, typer.Option(help="Longest answer. Default: the server's.")] = None,
        seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    ) -> None:
        """Talk to a served model in the terminal; answers appear as they are written."""
        with reporting():
            from posttrain.registry import load

            given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
            settings = {name: value for name, value in given.items() if value is not None}
            load(CHAT)(url, model, system, settings, os.environ)
