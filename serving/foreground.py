"""`posttrain serve RUN`: an export in the embedded server, in the foreground until Ctrl-C or SIGTERM.

The `serve` stage is something else: it starts the server, checks parity and stops it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from posttrain.errors import PosttrainError, UserError
from posttrain.rundir import read_manifest
from serving.embedded import EmbeddedServer, find_environment
from serving.ports import check_free, free_ports
from serving.repository import EMBEDDED_TARGETS, MANIFEST, REPOSITORY, read_export

POLL_SECONDS = 0.5
RunGateway = Callable[[Path, Sequence[str]], None]
"""serving.gateway.server.run: serves what a YAML file says until a signal comes."""


@dataclass(frozen=True)
class Ports:
    """Of 127.0.0.1; 0 chooses a free one. gateway: None for no gateway."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    gateway: int | None = None


def serve_forever(
    run: Path,
    *,
    console: Console,
    ports: Ports,
    triton_env: str = ".venv-triton",
    log_file: Path | None = None,
    start_timeout_s: float = 300.0,
    run_gateway: RunGateway | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP (returns), or until the server failed too often.

    Args:
        run: run directory of an `export` stage, or directory of a pipeline with one.
        triton_env: environment with tritonserver; POSTTRAIN_TRITON_ENV overrides it.
        log_file: tritonserver's log, replaced; None: a temporary file, kept where a PosttrainError names it.
        run_gateway: serves the API on `ports.gateway`, where that is not None.

    Raises:
        UserError: not an export of a target that is served here, no Triton environment, a port that is taken.
        PosttrainError: the server did not start, or it was given up.
    """
    export_dir = find_export(run)
    manifest = read_export(export_dir)
    check_target(export_dir, manifest)
    environment = find_environment(triton_env)
    chosen = choose_ports(ports)
    scratch, log_is_needed = Path(tempfile.mkdtemp(prefix="posttrain-serve-")), False
    try:
        with _ended_by_signals():
            server = EmbeddedServer(
                export_dir / REPOSITORY,
                manifest["name"],
                environment,
                _writable(log_file or scratch / "triton.log"),
                http_port=chosen.http,
                grpc_port=chosen.grpc,
                metrics_port=chosen.metrics,
                start_timeout_s=start_timeout_s,
            )
            _start(server, console)
            try:
                _print(console, instructions(server, export_dir, manifest, chosen))
                if run_gateway is None or chosen.gateway is None:
                    _wait(server)
                else:
                    # JSON is YAML.
                    file = scratch / "gateway.yaml"
                    file.write_text(json.dumps(gateway_config(server, export_dir, chosen.gateway)))
                    _serve_api(server, run_gateway, file)
            finally:
                server.stop()
    except KeyboardInterrupt:
        pass
    except PosttrainError as error:
        log_is_needed = log_file is None and not isinstance(error, UserError)
        raise
    finally:
        if not log_is_needed:
            shutil.rmtree(scratch)
    _print(console, "stopped")


def find_export(run: Path) -> Path:
    """The run directory of the export in `run`: itself, or one of a pipeline's stages.

    Raises UserError when there is none, or more than one.
    """
    record = run / "pipeline.json"
    if (run / MANIFEST).is_file() or not record.is_file():
        stage = (read_manifest(run) or {}).get("stage")
        if stage not in (None, "export"):
            raise UserError(
                f"{run}: is a run of the stage {stage}, not an export\n"
                "    make one of a model with `posttrain export model=RUN --output EXPORT`, and serve that"
            )
        return run
    details = json.loads(record.read_text(encoding="utf-8"))["details"]
    found = [name for name, detail in details.items() if detail["stage"] == "export"]
    complete = [name for name in found if (run / name / MANIFEST).is_file()]
    if len(complete) == 1:
        return run / complete[0]
    if complete:
        which = ", ".join(str(run / name) for name in complete)
        raise UserError(f"{run}: this pipeline has several exports\n    name one of them: {which}")
    what = f"its export ({found[0]}) is not complete" if found else "it has no stage `export`"
    raise UserError(
        f"{run}: there is no export in this pipeline: {what}\n"
        "    run the pipeline, or `posttrain export` on one of its models"
    )


def check_target(export_dir: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError when the embedded server has no backend for the export's target."""
    target = manifest["target"]
    if target not in EMBEDDED_TARGETS:
        raise UserError(
            f"{export_dir}: was exported for the target {target}, which the embedded server does not serve\n"
            f"    start it as {export_dir / 'deploy'} says, or export again with "
            "target=triton-vllm or target=triton-python"
        )


def choose_ports(ports: Ports) -> Ports:
    """The same with free ports in the place of 0. Raises UserError when one is taken or given twice."""
    chosen, given = asdict(ports), []
    for name, port in chosen.items():
        if port:
            remedy = f"name another with --{name}-port, or let free ones be chosen with --free-ports"
            if port in given:
                raise UserError(f"127.0.0.1:{port}: was given for two services\n    {remedy}")
            check_free(f"127.0.0.1:{port}", remedy)
            given.append(port)
    wanted = [name for name, port in chosen.items() if port == 0]
    return Ports(**chosen | dict(zip(wanted, free_ports(len(wanted)), strict=True)))


def gateway_config(server: EmbeddedServer, export_dir: Path, port: int) -> dict[str, Any]:
    """The gateway's configuration: this model alone, for everyone on this machine."""
    version = {"export": str(export_dir.absolute()), "triton": server.grpc_url}
    return {
        "port": port,
        "authentication": "none",
        "models": {server.model_name: {"versions": {"current": version}}},
    }


def instructions(server: EmbeddedServer, export_dir: Path, manifest: dict[str, Any], ports: Ports) -> str:
    """What is where and how to ask it."""
    name = server.model_name
    sampling = json.dumps({"temperature": 0, "max_tokens": 64})
    body = {"text_input": "Hello", "sampling_parameters": sampling, "exclude_input_in_output": True}
    prefix = f"models.{name}.versions.current"
    gateway = (
        f"posttrain gateway authentication=none {shlex.quote(f'{prefix}.export={export_dir}')} "
        f"{prefix}.triton={server.grpc_url}"
    )
    url = f"http://127.0.0.1:{ports.gateway or 8080}/v1"
    lines = [
        f"serving {name}, version {manifest['version']}, from {export_dir}",
        f"    HTTP     http://{server.http_url}",
        f"    gRPC     {server.grpc_url}",
        f"    metrics  http://{server.metrics_url}/metrics",
        f"    ask      curl -s http://{server.http_url}/v2/models/{name}/generate -d '{json.dumps(body)}'",
        f"    OpenAI   {url if ports.gateway else gateway}",
        f"    chat     posttrain chat --url {url}",
        f"    log      {server.log_file} (starts, failures and restarts; no requests)",
        "    Ctrl-C or SIGTERM ends it",
    ]
    return "\n".join(lines)


def _start(server: EmbeddedServer, console: Console) -> None:
    """Start it, with a line that counts the seconds on a terminal."""
    began = time.monotonic()
    with console.status("starting Triton") as line:
        server.on_wait = lambda seconds: line.update(f"starting Triton: {seconds:.0f} s")
        server.start()
    _print(console, f"Triton is ready after {time.monotonic() - began:.1f} s")


def _wait(server: EmbeddedServer) -> None:
    while server.running():
        time.sleep(POLL_SECONDS)
    raise _given_up(server)


def _serve_api(server: EmbeddedServer, run_gateway: RunGateway, file: Path) -> None:
    """The gateway catches the signals, drains and returns; the end of the server is one for it too."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            if not server.running():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch)
    try:
        watcher.start()
        run_gateway(file, ())
    except KeyboardInterrupt:
        # Before the gateway catches signals; the watcher's too.
        if server.running():
            raise
    finally:
        finished.set()
        if watcher.is_alive():
            watcher.join()
    if not server.running():
        raise _given_up(server)


def _given_up(server: EmbeddedServer) -> PosttrainError:
    return PosttrainError(f"tritonserver ended and was given up\n{server.log_tail()}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does. A hangup that is ignored (nohup) stays so."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _writable(log_file: Path) -> Path:
    try:
        log_file.write_bytes(b"")
    except OSError as error:
        raise UserError(
            f"{log_file}: the log cannot be written ({error.strerror})\n    name another --log-file"
        ) from error
    return log_file


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
