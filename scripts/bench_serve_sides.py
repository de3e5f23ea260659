"""The sides of `bench_serve.py`: what each starts, how it is asked, and what its processes used."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench_serve_client import BatcherLoad, HttpLoad, TritonLoad
from bench_serve_common import Request, Sample, Settings

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(ROOT))
START_SECONDS = 180.0
TITLES = {
    "generate": "`generate()`, one at a time",
    "engine": "the engine in one process",
    "triton": "Triton, gRPC streams",
    "gateway": "**Triton and the gateway, HTTP**",
    "batcher": "Triton's dynamic batcher, `generate()`",
    "transformers": "`transformers serve --continuous-batching`",
}
Ask = Callable[[Sequence[Request], int], list[Sample]]
Processes = Callable[[], dict[str, psutil.Process]]


class SideSkippedError(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass
class Side:
    """One way to serve. ask(requests, concurrency); streamed: whether tokens come one by one."""

    key: str
    ask: Ask
    processes: Processes
    levels: Sequence[int] | None = None
    streamed: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    """What all sides share: the settings, what `bench_serve_world.py` made, and where logs go."""

    settings: Settings
    facts: dict[str, Any]
    folder: Path
    environment: Path
    stack: ExitStack
    triton: Any = None

    @property
    def repository(self) -> Path:
        """Model repository of the export."""
        return Path(self.facts["export"]) / "model_repository"


def environment_for(settings: Settings) -> dict[str, str]:
    """Variables of every process, this one's included: the same number of threads for all."""
    threads = str(settings.threads)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}


def run_loop(load: HttpLoad | TritonLoad | BatcherLoad) -> Ask:
    """The load as a plain function, in an event loop of its own."""
    return lambda requests, concurrency: asyncio.run(load.run(requests, concurrency))


def worker(world: World, kind: str) -> Side:
    """Sides without a server: a process of the Triton environment that is asked over a pipe."""
    files = [str(world.folder / f"{name}.json") for name in ("settings", "world", "requests")]
    command = [str(world.environment / "bin/python3"), str(SCRIPTS / "bench_serve_engine.py"), kind, *files]
    log = world.stack.enter_context((world.folder / f"{kind}.log").open("w", encoding="utf-8"))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = world.stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables
        )
    )
    assert process.stdin is not None and process.stdout is not None
    world.stack.callback(process.stdin.close)
    stdin, stdout = process.stdin, process.stdout

    def read() -> Any:
        line = stdout.readline()
        if not line:
            raise SystemExit(f"the side '{kind}' ended; see {log.name}")
        return json.loads(line)

    def ask(requests: Sequence[Request], concurrency: int) -> list[Sample]:
        stdin.write(json.dumps({"concurrency": concurrency, "count": len(requests)}) + "\n")
        stdin.flush()
        return [Sample(**sample) for sample in read()]

    facts, levels = read(), [1] if kind == "generate" else None
    return Side(kind, ask, lambda: {kind: psutil.Process(process.pid)}, levels, facts=facts)


def processes_of(prefix: str) -> dict[str, psutil.Process]:
    """tritonserver and its stub, found by the prefix of their shared memory."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        if any(prefix in argument for argument in process.cmdline()):
            if process.name() == "tritonserver":
                found["tritonserver"] = process
            elif process.name().startswith("triton_python"):
                found["stub"] = process
    return found


def start_triton(world: World, repository: Path, name: str, log: str) -> Any:
    """A running EmbeddedServer."""
    from serving.embedded import EmbeddedServer

    return world.stack.enter_context(
        EmbeddedServer(repository, name, world.environment, world.folder / log, start_timeout_s=START_SECONDS)
    )


def exported(world: World) -> Any:
    """The server of the export, which two sides share."""
    if world.triton is None:
        world.triton = start_triton(world, world.repository, world.facts["name"], "triton.log")
    return world.triton


def triton(world: World) -> Side:
    """The export in Triton, asked over gRPC."""
    server = exported(world)
    load = TritonLoad(server.grpc_url, world.facts["name"])
    return Side("triton", run_loop(load), lambda: processes_of(server.shm_prefix))


def gateway(world: World) -> Side:
    """The same behind `posttrain gateway`, asked over HTTP."""
    server, name = exported(world), world.facts["name"]
    version = {"export": world.facts["export"], "triton": server.grpc_url}
    config = {"authentication": "none", "port": 0, "models": {name: {"versions": {"v1": version}}}}
    file, log = world.folder / "gateway.yaml", world.folder / "gateway.log"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "posttrain", "gateway", str(file)]
    process = start_process(world, command, log, environment)
    port = int(listening(process, log).rpartition(":")[2])

    def processes() -> dict[str, psutil.Process]:
        return processes_of(server.shm_prefix) | {"gateway": psutil.Process(process.pid)}

    return Side("gateway", run_loop(HttpLoad(port, name, usage=True)), processes, facts={"port": port})


def start_process(
    world: World, command: list[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """A server process, ended with the run."""
    file = world.stack.enter_context(log.open("wb"))
    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def end() -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    world.stack.callback(end)
    return process


def wait_for(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], Any]) -> Any:
    """The first true result of `ready`. Raises SystemExit when the process ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not (found := ready()):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, process.args))}\ndid not start:\n{tail}")  # type: ignore[arg-type]
        time.sleep(0.1)
    return found


def listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the gateway logs once it serves."""

    def ready() -> str | None:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if '"listening"' in line]
        return json.loads(lines[0])["url"] if lines else None

    return wait_for(process, log, ready)


def batcher(world: World) -> Side:
    """generate() behind Triton's dynamic batcher, in a Triton of its own."""
    settings, root = world.settings, world.folder / "batcher_repository"
    (root / "batcher" / "1").mkdir(parents=True)
    model = (SCRIPTS / "bench_serve_batcher.py").read_text(encoding="utf-8")
    (root / "batcher" / "1" / "model.py").write_text(model, encoding="utf-8")
    values = {"weights": world.facts["weights"], "threads": settings.threads, "dtype": world.facts["dtype"]}
    tensor = '{ name: "%s" data_type: TYPE_%s dims: [ 1 ] }'
    lines = [
        'name: "batcher"',
        'backend: "python"',
        f"max_batch_size: {settings.batcher_size}",
        f"dynamic_batching {{ max_queue_delay_microseconds: {settings.batcher_delay_us} }}",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        f"input [ {tensor % ('prompt', 'STRING')}, {tensor % ('max_tokens', 'INT32')} ]",
        f"output [ {tensor % ('text', 'STRING')}, {tensor % ('tokens', 'INT32')} ]",
        *(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in values.items()),
    ]
    (root / "batcher" / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    server = start_triton(world, root, "batcher", "batcher.log")
    facts = {"max_batch_size": settings.batcher_size, "max_queue_delay_us": settings.batcher_delay_us}
    load = BatcherLoad(server.grpc_url, "batcher")
    return Side(
        "batcher", run_loop(load), lambda: processes_of(server.shm_prefix), streamed=False, facts=facts
    )


def transformers(world: World) -> Side:
    """transformers' own server, its continuous batching bounded: its defaults take most of the memory."""
    from transformers.utils.import_utils import is_serve_available

    from serving.embedded import free_ports, http_ok

    program = Path(sys.executable).parent / "transformers"
    if not program.is_file():
        raise SideSkippedError(f"{program} is not there")
    if not is_serve_available():
        raise SideSkippedError("`transformers serve` wants pydantic, fastapi, uvicorn and openai")
    (port,), weights = free_ports(1), world.facts["weights"]
    options = "--cb-block-size 32 --cb-num-blocks 512 --cb-max-batch-tokens 256 --no-cb-use-cuda-graph"
    command = [str(program), "serve", weights, "--continuous-batching", *options.split()]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = world.folder / "transformers.log"
    process = start_process(world, command, log, dict(os.environ))
    wait_for(process, log, lambda: http_ok(f"http://127.0.0.1:{port}/health"))
    load = HttpLoad(port, weights, usage=False)

    def processes() -> dict[str, psutil.Process]:
        return {"transformers": psutil.Process(process.pid)}

    return Side("transformers", run_loop(load), processes, facts={"options": options})


STARTS: dict[str, Callable[[World], Side]] = {
    "generate": lambda world: worker(world, "generate"),
    "engine": lambda world: worker(world, "engine"),
    "triton": triton,
    "gateway": gateway,
    "batcher": batcher,
    "transformers": transformers,
}
