"""The command `posttrain serve`: a run to serve in the foreground, or the settings of the stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli_gateway import load_gateway
from posttrain.errors import UserError

SERVE = "serving.foreground:serve_forever"
PORTS = "serving.foreground:Ports"
OF_STAGE = ("output", "force", "no_check", "dry_run", "as_json")
Port = Annotated[int, typer.Option(min=0, max=65535, help="RUN: 0 chooses a free one.")]
RunStage = Callable[[str, list[str], Path | None, bool, bool, bool, bool], None]

EPILOG = """Example: posttrain serve runs/tiny/export

Example: posttrain serve runs/tiny --gateway --free-ports

Example: posttrain serve export=runs/tiny/export prompts=runs/tiny/prompts --output runs/my-serve

The first argument decides. Without a `=`, and not a YAML file, it is the run to serve, on 127.0.0.1, until
Ctrl-C or SIGTERM (exit code 0); a failed server is restarted, and given up (exit code 1) when it fails too
often. A YAML file or settings are the stage, as in a pipeline. docs/serving.md has more."""


def register(
    app: typer.Typer, reporting: Callable[[], AbstractContextManager[Any]], run_stage: RunStage
) -> None:
    """Add the command to `app`; `reporting` turns its errors into exit codes, `run_stage` runs a stage."""

    @app.command("serve", epilog=EPILOG)
    def serve(
        context: typer.Context,
        arguments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="RUN | [CONFIG.yaml] [a.b=c ...]",
                help="Directory of an export, or of a pipeline with one; or the stage's file and settings.",
            ),
        ] = None,
        http_port: Port = 8000,
        grpc_port: Port = 8001,
        metrics_port: Port = 8002,
        free_ports: Annotated[
            bool, typer.Option("--free-ports", help="RUN: choose free ports where none is named.")
        ] = False,
        gateway: Annotated[
            bool, typer.Option("--gateway", help="RUN: with the OpenAI-compatible API, without keys.")
        ] = False,
        gateway_port: Port = 8080,
        triton_env: Annotated[
            str, typer.Option(help="RUN: environment with tritonserver; POSTTRAIN_TRITON_ENV overrides it.")
        ] = ".venv-triton",
        log_file: Annotated[
            Path | None, typer.Option(help="RUN: tritonserver's log, replaced. Default: a temporary file.")
        ] = None,
        start_timeout: Annotated[float, typer.Option(min=1, help="RUN: seconds to become ready.")] = 300.0,
        output: Annotated[
            Path | None,
            typer.Option(help="Stage: run directory. Default: run_dir in the file, else runs/FILE-NAME."),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Stage: run again what is complete.")] = False,
        no_check: Annotated[
            bool, typer.Option("--no-check", help="Stage: start without looking at its data and models.")
        ] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Stage: say what would be done and why, and write nothing.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Stage: the result as JSON to stdout.")] = False,
    ) -> None:
        """Serve an export here until Ctrl-C; or, as a stage, prove that it answers as the trained model."""
        with reporting():
            run = named_run(arguments or [])
            named = check_options(context, run)
            if run is None:
                run_stage("serve", arguments or [], output, force, no_check, dry_run, as_json)
                return
            ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
            if gateway:
                ports["gateway"] = gateway_port
            if free_ports:
                ports = {name: number if f"{name}_port" in named else 0 for name, number in ports.items()}
            serve_run(run, ports, triton_env, log_file, start_timeout)


def named_run(arguments: list[str]) -> Path | None:
    """The run to serve; None where the arguments are the stage's. Raises UserError when it is not there."""
    if not arguments or "=" in arguments[0]:
        return None
    path = Path(arguments[0])
    if not path.is_dir():
        if path.is_file() or path.suffix in (".yaml", ".yml"):
            return None
        raise UserError(
            f"{path}: there is no such run directory\n"
            "    name the run directory of an export (runs/PIPELINE/export), or of a pipeline with one"
        )
    if len(arguments) > 1:
        raise UserError(f"{arguments[1]}: a run to serve takes no settings\n    posttrain serve --help")
    return path


def check_options(context: typer.Context, run: Path | None) -> set[str]:
    """Names of the options that were given. Raises UserError for one of the other form."""
    named = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name != "arguments" and source is not None and source.name == "COMMANDLINE":
            named[name] = parameter.opts[0]
    for name, option in named.items():
        if (name in OF_STAGE) != (run is None):
            why = "is of the stage" if run else "is of `posttrain serve RUN`, and no run was named first"
            raise UserError(f"{option}: {why}\n    leave it out; posttrain serve --help has both forms")
    if "gateway_port" in named and "gateway" not in named:
        raise UserError("--gateway-port: there is no gateway\n    add --gateway")
    return set(named)


def serve_run(
    run: Path, ports: dict[str, int], triton_env: str, log_file: Path | None, start_timeout: float
) -> None:
    """Serve until a signal. Raises what serving.foreground.serve_forever does."""
    from rich.console import Console

    from posttrain.registry import load

    load(SERVE)(
        run,
        console=Console(stderr=True),
        ports=load(PORTS)(**ports),
        triton_env=triton_env,
        log_file=log_file,
        start_timeout_s=start_timeout,
        run_gateway=load_gateway() if "gateway" in ports else None,
    )
