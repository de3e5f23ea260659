"""`posttrain serve RUN`: what it refuses, and one server from its first line to its clean end.

The tests with a server are skipped where the Triton environment is not installed (`make triton-env`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import serving.foreground
from posttrain.stage import execute_stage
from serving.client import post_json
from serving.config import ExportConfig
from serving.embedded import ENV_VARIABLE
from tests.integration.conftest import command, processes_of, triton_environment

ROOT = Path(__file__).parents[2]
NAME = "desk"
TIMEOUT = 120
ENVIRONMENT = triton_environment()
needs_triton = pytest.mark.skipif(
    ENVIRONMENT is None, reason="no Triton environment; make one with `make triton-env`"
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, ending_model_dir: Path) -> Path:
    """A pipeline's directory whose stage `publish` is an export."""
    directory = tmp_path_factory.mktemp("runs") / "pipe"
    config = ExportConfig(model=str(ending_model_dir), name=NAME, golden_prompts=2)
    execute_stage("export", config, directory / "publish")
    _write_record(directory, {"demos": "curate", "publish": "export"})
    return directory


def _write_record(directory: Path, stages: dict[str, str]) -> None:
    directory.mkdir(exist_ok=True)
    details = {name: {"stage": kind} for name, kind in stages.items()}
    (directory / "pipeline.json").write_text(json.dumps({"details": details}))


def _refused(*arguments: str | Path, says: tuple[str, ...]) -> None:
    done = command("serve", *arguments)
    assert done.exit_code == 2, done.output
    for text in says:
        assert text in done.stderr, done.stderr


def test_what_is_no_export_is_refused(tmp_path: Path, sft_run: Path) -> None:
    _refused(tmp_path, says=(f"{tmp_path}: is not an export", "make one with `posttrain export`"))
    _refused(
        sft_run, says=(f"{sft_run}: is a run of the stage sft", "make one of a model with `posttrain export")
    )
    _refused(tmp_path / "absent", says=("there is no such run directory", "name the run directory"))


def test_a_pipeline_must_have_one_complete_export(tmp_path: Path, pipeline: Path) -> None:
    _write_record(tmp_path / "none", {"demos": "curate"})
    _refused(tmp_path / "none", says=("it has no stage `export`", "posttrain export"))
    _write_record(tmp_path / "early", {"publish": "export"})
    _refused(tmp_path / "early", says=("its export (publish) is not complete", "run the pipeline"))
    _write_record(tmp_path / "two", {"first": "export", "second": "export"})
    for name in ("first", "second"):
        (tmp_path / "two" / name).symlink_to(pipeline / "publish")
    where = tmp_path / "two"
    _refused(where, says=("has several exports", f"name one of them: {where / 'first'}, {where / 'second'}"))


def test_an_export_for_another_server_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = ExportConfig(model=str(tiny_model_dir), target="vllm", golden_prompts=0)
    execute_stage("export", config, tmp_path / "export")
    _refused(
        tmp_path / "export",
        "--free-ports",
        says=("target vllm, which the embedded server does not serve", "deploy says", "target=triton-vllm"),
    )


def test_a_missing_environment_is_refused(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENV_VARIABLE, raising=False)
    _refused(
        pipeline,
        "--triton-env",
        tmp_path / "no",
        says=("the Triton environment does not exist", "make triton-env"),
    )


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@needs_triton
@pytest.mark.parametrize("service", ["http", "grpc", "metrics", "gateway"])
def test_a_port_that_is_taken_is_refused(pipeline: Path, taken: int, service: str) -> None:
    option = f"--{service}-port"
    _refused(
        pipeline,
        "--free-ports",
        "--gateway",
        option,
        str(taken),
        says=(f"127.0.0.1:{taken}: the port cannot be used", f"name another with {option}", "--free-ports"),
    )


@needs_triton
def test_other_mistakes_are_refused(tmp_path: Path, pipeline: Path, taken: int) -> None:
    twice = ("--http-port", "18765", "--grpc-port", "18765")
    _refused(pipeline, *twice, says=("127.0.0.1:18765: was given for two services",))
    log = tmp_path / "absent" / "log"
    _refused(pipeline, "--free-ports", "--log-file", log, says=(f"{log}: the log cannot be written",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}", "--json"], "--json: is of the stage"),
        (["{run}", "num_prompts=3"], "num_prompts=3: a run to serve takes no settings"),
        (["{run}", "--gateway-port", "9"], "--gateway-port: there is no gateway"),
        (["export={run}", "--http-port", "9"], "--http-port: is of `posttrain serve RUN`"),
        (["absent.yaml"], "absent.yaml"),
    ],
)
def test_the_two_forms_do_not_mix(pipeline: Path, arguments: list[str], says: str) -> None:
    _refused(*(argument.format(run=pipeline) for argument in arguments), says=(says,))


class Served:
    """`posttrain serve` as a process of its own, and what it says."""

    def __init__(self, scratch: Path, *arguments: str | Path) -> None:
        scratch.mkdir()
        variables = {**os.environ, "PYTHONPATH": str(ROOT), ENV_VARIABLE: str(ENVIRONMENT)}
        if "--gateway" not in arguments:
            # Set by torch in this process; without it a server's torch makes a folder in TMPDIR.
            variables.pop("TORCHINDUCTOR_CACHE_DIR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "posttrain", "serve", *map(str, arguments)],
            env=variables | {"TMPDIR": str(scratch)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.scratch = scratch
        self.lines: list[str] = []
        self.prefix = f"posttrain-{self.process.pid}-"

    def read_until(self, pattern: str) -> re.Match[str]:
        """The next line that matches. A server that never says it is ended, which ends the output."""
        guard = threading.Timer(TIMEOUT, self.process.kill)
        guard.start()
        try:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        finally:
            guard.cancel()
        raise AssertionError(f"it never said {pattern!r}:\n{''.join(self.lines)}")

    def end(self, number: signal.Signals) -> None:
        """End it, and look for what it left."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, rest
        assert rest.endswith("stopped\n")
        assert list(self.scratch.iterdir()) == []
        assert list(Path("/dev/shm").glob(f"{self.prefix}*")) == []
        assert processes_of(self.prefix) == {}


def test_an_interrupt_while_the_gateway_is_about_to_start_sends_no_signal_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that watches the server ends too, instead of taking the stopped server for a failed one."""
    sent: list[tuple[int, int]] = []
    watchers: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            watchers.append(self)
            raise KeyboardInterrupt

    class Server:
        up = True

        def running(self) -> bool:
            return self.up

    server = Server()
    monkeypatch.setattr(serving.foreground.os, "kill", lambda *call: sent.append(call))
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            serving.foreground._serve_api(server, lambda *_: None, tmp_path)
    server.up = False
    watchers[0].join(TIMEOUT)
    assert not watchers[0].is_alive()
    assert sent == []


@needs_triton
def test_it_serves_until_sigterm_and_leaves_nothing(tmp_path: Path, pipeline: Path) -> None:
    log = tmp_path / "triton.log"
    served = Served(tmp_path / "scratch", pipeline, "--free-ports", "--log-file", log)
    url = served.read_until(r"HTTP +http://(\S+)")[1]
    assert any(re.match(r"Triton is ready after \d+\.\d s", line) for line in served.lines)
    curl = served.read_until(r"ask +curl -s (\S+) -d '(.*)'$")
    assert curl[1] == f"http://{url}/v2/models/{NAME}/generate"
    status, text = post_json(curl[1], curl[2].encode(), TIMEOUT)
    assert (status, json.loads(text)["model_name"]) == (200, NAME), text
    assert json.loads(text)["text_output"]
    assert served.read_until(r"log +(\S+)")[1] == str(log)
    served.end(signal.SIGTERM)
    assert "Signal (15) received" in log.read_text()


@needs_triton
@pytest.mark.slow
def test_the_api_before_it_comes_back_with_it(tmp_path: Path, pipeline: Path) -> None:
    """With --gateway: an answer, the model's process is killed, the same answer. Ctrl-C ends both."""
    import openai

    served = Served(tmp_path / "scratch", pipeline / "publish", "--gateway", "--free-ports")
    url = served.read_until(r"OpenAI +(\S+)")[1]
    served.read_until('"event": "listening"')
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=60)

    def ask() -> str:
        asked = [{"role": "user", "content": "Where is my order?"}]
        answer = client.chat.completions.create(
            model=NAME, messages=asked, temperature=0, max_tokens=12, logprobs=True
        )
        return answer.choices[0].logprobs.content

    before = ask()
    assert before
    [stub] = [
        pid
        for pid, arguments in processes_of(served.prefix).items()
        if arguments[0].endswith("triton_python_backend_stub")
    ]
    os.kill(stub, signal.SIGKILL)
    served.read_until("supervisor: .* restarting tritonserver")
    assert ask() == before
    served.end(signal.SIGINT)


@needs_triton
def test_the_log_is_kept_where_the_server_does_not_start(tmp_path: Path, pipeline: Path) -> None:
    """A model that takes longer than --start-timeout."""
    served = Served(tmp_path / "scratch", pipeline, "--free-ports", "--start-timeout", "1")
    log = served.read_until(r"log: (\S+)")[1]
    assert served.process.wait(TIMEOUT) == 1
    assert Path(log).is_file()
    assert Path(log).parent.parent == tmp_path / "scratch"
