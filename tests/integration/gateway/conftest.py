"""A real tritonserver with two models, and `posttrain gateway` as a process in front of it, once per session.

`desk` ends its answers; `next` is another model, whose answers are as long as they may be.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.embedded import EmbeddedServer
from serving.gateway.keys import ADMIN_VARIABLE, hash_key
from tests.integration.conftest import triton_environment
from tests.integration.gateway.hostile import GOOD, post

ROOT = Path(__file__).parents[3]
KEYS = {"alice": "pt-alice", "bob": "pt-bob", "carol": "pt-carol", "dora": "pt-dora"}
ADMIN_KEY = "pt-admin"
START_SECONDS = 120
LIMITS = {
    "max_body_bytes": 4096,
    "max_messages": 8,
    "max_connections": 40,
    "max_in_flight": 16,
    "header_seconds": 1.5,
    "body_seconds": 1.0,
    "drain_seconds": 60,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here runs without a Triton environment."""
    if triton_environment() is None:
        mark = pytest.mark.skip(reason="no Triton environment; make one with `make triton-env`")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(mark)


def export(model: Path, name: str, run_dir: Path) -> Path:
    from posttrain.stage import execute_stage
    from serving.config import ExportConfig

    config = ExportConfig(model=str(model), name=name, max_prompt_characters=600, max_output_tokens=200)
    execute_stage("export", config, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def exports(
    tmp_path_factory: pytest.TempPathFactory, ending_model_dir: Path, tiny_model_dir: Path
) -> dict[str, Path]:
    """Export directories by model name."""
    root = tmp_path_factory.mktemp("exports")
    return {
        "desk": export(ending_model_dir, "desk", root / "desk"),
        "next": export(tiny_model_dir, "next", root / "next"),
    }


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory, exports: dict[str, Path]) -> Iterator[EmbeddedServer]:
    """The server, with both models loaded."""
    from serving.client import import_grpc

    root = tmp_path_factory.mktemp("repository")
    for name, directory in exports.items():
        shutil.copytree(directory / "model_repository" / name, root / name)
    environment = triton_environment()
    assert environment is not None
    with EmbeddedServer(root, "desk", environment, root.parent / "triton.log") as server:
        control = import_grpc().InferenceServerClient(server.grpc_url)
        control.load_model("next")
        yield server
        control.close()


@dataclass
class Gateway:
    """A running `posttrain gateway`. `events`: its log, as it comes."""

    process: subprocess.Popen[str]
    file: Path
    port: int = 0
    lines: list[str] = field(default_factory=list)
    events: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def read(self) -> None:
        """Runs in a thread until the process ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("{"):
                self.events.put(json.loads(line))
        self.events.put(None)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log line of this kind."""
        while True:
            found = self.events.get(timeout=START_SECONDS)
            assert found is not None, f"it ended without '{event}':\n{''.join(self.lines)}"
            if found["event"] == event:
                return found

    def client(self, key: str = "alice", **options: Any) -> Any:
        """The official client, which tries nothing twice."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key=KEYS[key], max_retries=0, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        import urllib.request

        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as response:
            families = list(text_string_to_metric_families(response.read().decode("utf-8")))
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The monitoring database of every gateway here."""
    return tmp_path_factory.mktemp("monitoring") / "monitoring.sqlite"


@pytest.fixture(scope="session")
def settings(exports: dict[str, Path], triton: EmbeddedServer, database: Path) -> dict[str, Any]:
    """The configuration the tests start from."""
    versions = {
        name: {"export": str(directory), "triton": triton.grpc_url} for name, directory in exports.items()
    }
    return {
        "port": 0,
        "limits": LIMITS,
        "monitoring": {"database": str(database)},
        "models": {
            "support": {"versions": {"stable": versions["desk"]}},
            "long": {"versions": {"only": versions["next"]}},
            "absent": {"versions": {"only": versions["desk"] | {"model": "absent"}}},
            "adapted": {"versions": {"only": versions["desk"] | {"adapter": "absent"}}},
            "down": {"versions": {"only": versions["desk"] | {"triton": "127.0.0.1:1"}}},
        },
    }


@pytest.fixture(scope="session")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alice: no limits; bob: 3 requests, carol: 100 tokens a minute; dora: one model, one at a time."""
    more: dict[str, dict[str, Any]] = {
        "bob": {"requests_per_minute": 3},
        "carol": {"tokens_per_minute": 100},
        "dora": {"models": ["long"], "max_concurrent": 1},
    }
    keys = [{"name": name, "sha256": hash_key(key), **more.get(name, {})} for name, key in KEYS.items()]
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path


@pytest.fixture(scope="session")
def start_gateway(keys_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """start_gateway(settings) -> Gateway; ended with the session."""
    started: list[Gateway] = []

    def start(settings: dict[str, Any]) -> Gateway:
        file = tmp_path_factory.mktemp("gateway") / "gateway.yaml"
        file.write_text(yaml.safe_dump({"keys_file": str(keys_file), **settings}))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), ADMIN_VARIABLE: hash_key(ADMIN_KEY)}
        command = [sys.executable, "-m", "posttrain", "gateway", str(file)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, cwd=file.parent
        )
        gateway = Gateway(process, file)
        started.append(gateway)
        threading.Thread(target=gateway.read, daemon=True).start()
        gateway.port = int(gateway.wait_for("listening")["url"].rpartition(":")[2])
        return gateway

    yield start
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.send_signal(signal.SIGKILL)
        gateway.process.wait()


@pytest.fixture(scope="session")
def gateway(start_gateway: Any, settings: dict[str, Any]) -> Gateway:
    """The gateway that most tests share. Its routes are not to be changed."""
    return start_gateway(settings)


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Any:
    """alice's client."""
    return gateway.client()


@pytest.fixture
def alive_afterwards(gateway: Any) -> Any:
    """After every one of these requests a good one is served."""
    yield
    status, _, body = post(gateway, GOOD)
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] > 0
    assert gateway.process.poll() is None
