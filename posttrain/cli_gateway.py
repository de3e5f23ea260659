"""The commands of the gateway: `posttrain gateway` and `posttrain gateway-key`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import UserError

SERVE = "serving.gateway.server:run"
NEW_KEY = "serving.gateway.keys:describe_new_key"


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
            bool, typer.Option("--check", help="Read configuration, keys and exports, and serve nothing.")
        ] = False,
    ) -> None:
        """Serve an OpenAI-compatible API in front of Triton: keys, limits, canaries, metrics."""
        with reporting():
            from posttrain.registry import load

            given = arguments or []
            if not given:
                raise UserError(
                    "nothing to serve: name a YAML file\n    posttrain gateway --help shows an example"
                )
            path = None if "=" in given[0] else Path(given[0])
            try:
                serve = load(SERVE)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"the gateway needs {error.name}\n    pip install 'posttrain[gateway]'"
                ) from error
            serve(path, given[1:] if path else given, check=check)
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
