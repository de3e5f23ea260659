"""Keep an export served in the foreground until Ctrl-C, for trying it by hand.

    serve_forever(Path("runs/tiny/export"), console=Console())

The `serve` stage is something else: it starts the server, checks parity and stops it.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from rich.console import Console

from posttrain.errors import PosttrainError
from serving.embedded import EmbeddedServer, find_environment
from serving.repository import REPOSITORY, check_servable, read_export

POLL_SECONDS = 0.5


def serve_forever(
    export_dir: Path,
    *,
    console: Console,
    triton_env: str = ".venv-triton",
    http_port: int | None = 8000,
    grpc_port: int | None = 8001,
    start_timeout_s: float = 300.0,
) -> None:
    """Serve until interrupted (returns) or until the server dies.

    Args:
        export_dir: run directory of an `export` stage.
        triton_env: environment with tritonserver; POSTTRAIN_TRITON_ENV overrides it.
        http_port, grpc_port: of 127.0.0.1; None chooses free ones.

    Raises:
        UserError: no Triton environment, or not an export.
        PosttrainError: the server did not start, for example because a port is taken, or it died.
    """
    environment = find_environment(triton_env)
    manifest = read_export(export_dir)
    check_servable(manifest)
    name = manifest["name"]
    with tempfile.TemporaryDirectory(prefix="posttrain-serve-") as scratch:
        server = EmbeddedServer(
            export_dir / REPOSITORY,
            name,
            environment,
            Path(scratch) / "triton.log",
            http_port=http_port,
            grpc_port=grpc_port,
            start_timeout_s=start_timeout_s,
        )
        with console.status("starting Triton"):
            server.start()
        try:
            console.print(_instructions(server), highlight=False, markup=False, soft_wrap=True)
            while server.running():
                time.sleep(POLL_SECONDS)
            raise PosttrainError(f"tritonserver ended by itself\n{server.log_tail()}")
        except KeyboardInterrupt:
            console.print("stopping", highlight=False)
        finally:
            server.stop()


def _instructions(server: EmbeddedServer) -> str:
    sampling = json.dumps({"temperature": 0, "max_tokens": 64})
    body = json.dumps(
        {"text_input": "Hello", "sampling_parameters": sampling, "exclude_input_in_output": True}
    )
    return (
        f"serving {server.model_name}: HTTP {server.http_url}, gRPC {server.grpc_url}, "
        f"metrics http://{server.metrics_url}/metrics\n"
        f"    curl -s {server.http_url}/v2/models/{server.model_name}/generate -d '{body}'\n"
        f"    log: {server.log_file}; stop with Ctrl-C"
    )
