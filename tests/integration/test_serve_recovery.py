"""A real tritonserver whose processes are killed or stopped under load: it comes back by itself.

Skipped where the Triton environment is not installed (`make triton-env`).
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Semaphore

import pytest

from posttrain.errors import PosttrainError
from posttrain.stage import execute_stage
from serving.client import RequestFailedError, TritonClient, collect, import_grpc
from serving.config import ExportConfig
from serving.embedded import EmbeddedServer, Recovery
from tests.integration.conftest import processes_of, triton_environment

STUB, SERVER = "triton_python_backend_stub", "bin/tritonserver"
SLOW = pytest.mark.slow
NAME = "desk"
CLIENTS = 8
ANSWERED_WITHIN_SECONDS = 5
HUNG_SECONDS = 5
START_SECONDS = 60
GREEDY = {"temperature": 0.0, "max_tokens": 24, "logprobs": 0}
LONG = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True, "logprobs": 0}
PROMPT = "<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\n"

ENVIRONMENT = triton_environment()
pytestmark = pytest.mark.skipif(
    ENVIRONMENT is None, reason="no Triton environment; make one with `make triton-env`"
)


def _export(directory: Path, *models: Path) -> Path:
    """The model repository of an export of all of them, as versions 1, 2, ..."""
    for model in models:
        config = ExportConfig(
            model=str(model), name=NAME, num_versions=len(models), max_output_tokens=200, golden_prompts=2
        )
        execute_stage("export", config, directory)
    return directory / "model_repository"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, ending_model_dir: Path) -> Path:
    return _export(tmp_path_factory.mktemp("runs") / "export", ending_model_dir)


Start = Callable[..., EmbeddedServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(repository, **recovery) -> a running server; in the end nothing of it may be left."""
    servers = []

    def run(repository: Path, **recovery: float) -> EmbeddedServer:
        assert ENVIRONMENT is not None
        server = EmbeddedServer(
            repository, NAME, ENVIRONMENT, tmp_path / "triton.log", recovery=Recovery(**recovery)
        )
        servers.append(server)
        server.start()
        return server

    yield run
    for server in servers:
        server.stop()
        assert processes_of(server.shm_prefix) == {}
        assert list(Path("/dev/shm").glob(f"{server.shm_prefix}*")) == []


def _client(server: EmbeddedServer, version: str = "") -> TritonClient:
    return TritonClient(server.http_url, server.grpc_url, NAME, timeout_s=START_SECONDS, version=version)


def _signal(server: EmbeddedServer, program: str, number: signal.Signals, part: str = "") -> None:
    """Send a signal to the one process of this program with `part` in its arguments."""
    [pid] = [
        pid
        for pid, arguments in processes_of(server.shm_prefix).items()
        if arguments[0].endswith(program) and part in " ".join(arguments)
    ]
    os.kill(pid, number)


def _hit_under_load(
    client: TritonClient, hit: Callable[[], None], within: float = ANSWERED_WITHIN_SECONDS
) -> None:
    """Eight clients ask for one stream after another when it hits: each is told in time that it failed."""
    begun, over = Semaphore(0), Event()

    def ask() -> None:
        while not over.is_set():
            stream = client.stream(PROMPT, LONG)
            next(stream)
            begun.release()
            collect(stream, NAME)

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            for _ in asked:
                assert begun.acquire(timeout=START_SECONDS)
            hit()
            done, waiting = wait(asked, timeout=within)
        finally:
            over.set()
        assert waiting == set()
    assert {type(request.exception()) for request in done} == {RequestFailedError}


def _log(server: EmbeddedServer) -> list[str]:
    """What the supervisor wrote, without its name and the time."""
    lines = server.log_file.read_text(errors="replace").splitlines()
    return [line.partition(f"{NAME}: ")[2] for line in lines if line.startswith("supervisor: ")]


@pytest.mark.parametrize(
    ("program", "number", "why"),
    [
        # Without its stub tritonserver sometimes aborts before it can be killed.
        pytest.param(STUB, signal.SIGKILL, "the process of version 1 of .* ended|.* status -6", id="stub"),
        pytest.param(SERVER, signal.SIGKILL, ".* ended with status -9", id="server", marks=SLOW),
        pytest.param(STUB, signal.SIGSTOP, "no answer to a probe", id="hung-stub", marks=SLOW),
        pytest.param(SERVER, signal.SIGSTOP, "no answer to a probe", id="hung-server", marks=SLOW),
    ],
)
def test_it_comes_back_by_itself(
    start: Start, repository: Path, program: str, number: signal.Signals, why: str
) -> None:
    noticed_after = HUNG_SECONDS if number == signal.SIGSTOP else 0
    server = start(repository, probe_timeout_s=noticed_after or 30.0)
    client = _client(server)
    [before] = client.generate([PROMPT], GREEDY)
    within = noticed_after + ANSWERED_WITHIN_SECONDS
    _hit_under_load(client, lambda: _signal(server, program, number), within)
    server.wait_until_ready()
    [after] = client.generate([PROMPT], GREEDY)
    assert (after.text, after.token_ids) == (before.text, before.token_ids)
    said = [line for line in _log(server) if not line.startswith("ready again")]
    assert len(said) == 1, said
    assert re.fullmatch(rf"({why}).*; restarting tritonserver \(1 of 5\)", said[0])


@pytest.mark.slow
def test_every_version_comes_back(
    start: Start, tmp_path: Path, ending_model_dir: Path, tiny_model_dir: Path
) -> None:
    """The stub of the older version is killed, while the newer one is asked."""
    server = start(_export(tmp_path / "export", ending_model_dir, tiny_model_dir))
    clients = [_client(server, version) for version in ("1", "2", "")]
    before = [client.generate([PROMPT], GREEDY)[0].token_ids for client in clients]
    assert before[0] != before[1] == before[2]
    _hit_under_load(clients[1], lambda: _signal(server, STUB, signal.SIGKILL, f"{NAME}/1/"))
    server.wait_until_ready()
    assert [client.generate([PROMPT], GREEDY)[0].token_ids for client in clients] == before


@pytest.mark.slow
def test_a_model_that_is_unloaded_is_not_missed(start: Start, repository: Path) -> None:
    """Loaded again, it is watched as before."""
    server = start(repository, probe_timeout_s=3.0)
    [before] = _client(server).generate([PROMPT], GREEDY)
    with import_grpc().InferenceServerClient(server.grpc_url) as control:
        control.unload_model(NAME)
        assert not server.ready()
        control.load_model(NAME)
    [after] = _client(server).generate([PROMPT], GREEDY)
    assert after.token_ids == before.token_ids
    assert _log(server) == []
    _hit_under_load(_client(server), lambda: _signal(server, STUB, signal.SIGKILL))
    server.wait_until_ready()


@pytest.mark.slow
def test_it_is_given_up_after_too_many_failures(start: Start, repository: Path) -> None:
    server = start(repository, max_restarts=1)
    _signal(server, STUB, signal.SIGKILL)
    while not any(line.startswith("ready again") for line in _log(server)):
        assert server.running()
        server.wait_until_ready()
    _signal(server, STUB, signal.SIGKILL)
    while server.running():
        server.ready()
    with pytest.raises(PosttrainError, match="giving up after 1 restarts in 300 s"):
        server.wait_until_ready()
