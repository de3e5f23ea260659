"""Canaries, sticky users, shadows, reload and rollback under load, and the end of a gateway."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from serving.embedded import EmbeddedServer
from tests.integration.conftest import processes_of

ROOT = Path(__file__).parents[3]
ADMIN_KEY = "pt-admin"
ASKED = [{"role": "user", "content": "Where is my order?"}]
LOAD_REQUESTS = 400


@pytest.fixture(scope="module")
def routed(settings: dict[str, Any]) -> dict[str, Any]:
    """Four models over the same two Triton models."""
    stable = settings["models"]["support"]["versions"]["stable"]
    canary = settings["models"]["long"]["versions"]["only"]
    split = {"stable": stable | {"weight": 90}, "canary": canary | {"weight": 10}}
    even = {"stable": stable, "canary": canary}
    return settings | {
        "models": {
            "long": settings["models"]["long"],
            "canaried": {"versions": split},
            "sticky": {"versions": even, "sticky": "user"},
            "mirrored": {
                "versions": {"stable": stable, "mirror": stable | {"weight": 0}},
                "shadow": {"version": "mirror"},
            },
            "shadowed": {
                "versions": {"stable": stable, "next": canary | {"weight": 0}},
                "shadow": {"version": "next"},
            },
        }
    }


@pytest.fixture(scope="module")
def running(start_gateway: Callable[[dict[str, Any]], Any], routed: dict[str, Any]) -> Any:
    """One gateway for most of these tests."""
    return start_gateway(routed)


@pytest.fixture
def own(running: Any) -> Any:
    """A gateway whose file and routes a test may change: both are put back."""
    content = running.file.read_text()
    yield running
    running.file.write_text(content)
    admin(running, "POST", "/admin/reload")


def admin(gateway: Any, method: str, path: str, body: Any = None) -> Any:
    """An administrator's request, through the openai client's plumbing."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}", api_key=ADMIN_KEY, max_retries=0)
    return (
        client.get(path, cast_to=object) if method == "GET" else client.post(path, cast_to=object, body=body)
    )


def version_of(gateway: Any, model: str, **fields: Any) -> str:
    """The version that answered one short request."""
    defaults = {"model": model, "messages": ASKED, "max_tokens": 2, "temperature": 0}
    answer = gateway.client().chat.completions.create(**defaults | fields)
    assert answer.usage.completion_tokens > 0
    return answer.system_fingerprint


def rewrite(gateway: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the gateway's file."""
    content = yaml.safe_load(gateway.file.read_text())
    change(content)
    gateway.file.write_text(yaml.safe_dump(content))


def weigh(stable: float, canary: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        versions = content["models"]["canaried"]["versions"]
        versions["stable"]["weight"], versions["canary"]["weight"] = stable, canary

    return change


def hang_up(gateway: Any, event: str) -> dict[str, Any]:
    """Have the file read again: the line that the gateway logs about it."""
    before = datetime.now(UTC).isoformat(timespec="milliseconds")
    gateway.process.send_signal(signal.SIGHUP)
    while (line := gateway.wait_for(event))["time"] < before:
        pass
    return line


def test_a_canary_is_swapped_and_rolled_back_under_load_without_a_failure(own):
    """400 requests from eight clients while weights, file and rollback change what answers them."""
    counted = own.metric("posttrain_gateway_requests_total", model="canaried")
    fine = own.metric("posttrain_gateway_requests_total", model="canaried", status="200")
    served: list[str] = []
    progress = threading.Condition()
    numbers = itertools.count()
    client = own.client()

    def work() -> None:
        while next(numbers) < LOAD_REQUESTS:
            answer = client.chat.completions.create(
                model="canaried", messages=ASKED, max_tokens=2, temperature=0, stream=len(served) % 2 == 0
            )
            chunks = list(answer) if isinstance(answer, openai.Stream) else [answer]
            with progress:
                served.extend({chunk.system_fingerprint for chunk in chunks})
                progress.notify_all()

    def after(count: int) -> None:
        with progress:
            assert progress.wait_for(lambda: len(served) >= count, timeout=120)

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(work) for _ in range(8)]
        after(200)
        first = Counter(served[:200])
        weights = {"model": "canaried", "weights": {"canary": 1}}
        assert admin(own, "POST", "/admin/weights", weights)["routes"]["canaried"]["canary"] == 1
        after(250)
        assert admin(own, "POST", "/admin/rollback")["routes"]["canaried"]["canary"] == 0.1
        after(300)
        rewrite(own, weigh(1, 0))
        assert hang_up(own, "reloaded")["routes"]["canaried"] == {"stable": 1.0, "canary": 0.0}
        [worker.result() for worker in workers]
    assert len(served) == LOAD_REQUESTS
    assert 5 <= first["canary"] <= 45, "20 expected"
    assert version_of(own, "canaried") == "stable"
    assert version_of(own, "canaried@canary") == "canary"
    answered = own.metric("posttrain_gateway_requests_total", model="canaried")
    assert answered == counted + LOAD_REQUESTS + 2
    answered_well = own.metric("posttrain_gateway_requests_total", model="canaried", status="200")
    assert answered_well == fine + LOAD_REQUESTS + 2
    assert own.metric("posttrain_gateway_route_share", model="canaried", version="canary") == 0


def test_a_user_keeps_a_version_and_users_are_spread_over_both(own):
    versions = {f"user-{i}": version_of(own, "sticky", user=f"user-{i}") for i in range(24)}
    assert set(versions.values()) == {"stable", "canary"}
    for user, version in versions.items():
        assert version_of(own, "sticky", user=user) == version
    nobody = {version_of(own, "sticky") for _ in range(8)}
    assert len(nobody) == 1, "without a user it is the key that is kept"


def test_copies_go_to_the_shadow_and_never_into_an_answer(own):
    """Counted: the same text from the same model, another one from another model."""
    for max_tokens in (1, 2, 24):
        assert version_of(own, "mirrored", max_tokens=max_tokens) == "stable"
        assert version_of(own, "shadowed", max_tokens=24) == "stable"

    def outcomes(model: str) -> dict[str, float]:
        name = "posttrain_gateway_shadow_requests_total"
        found = {
            outcome: own.metric(name, model=model, outcome=outcome)
            for outcome in ("same", "different", "answered", "failed", "left_out")
        }
        return {outcome: count for outcome, count in found.items() if count}

    for _ in range(6):
        own.wait_for("shadow")
    assert outcomes("mirrored") == {"same": 3}
    assert outcomes("shadowed") == {"different": 3}


def test_a_file_with_a_mistake_leaves_the_old_routes_in_force(own):
    rewrite(own, lambda content: content["models"]["canaried"].update(versoins={}))
    failed = hang_up(own, "reload_failed")
    assert "unknown key 'versoins'" in failed["detail"]
    assert "did you mean 'versions'?" in failed["detail"]
    with pytest.raises(openai.ConflictError, match="the old routes stay in force"):
        admin(own, "POST", "/admin/reload")
    assert admin(own, "GET", "/admin/routes")["routes"]["canaried"] == {"stable": 0.9, "canary": 0.1}
    assert version_of(own, "canaried@stable") == "stable"


def test_an_export_that_is_gone_leaves_the_old_routes_in_force(own, tmp_path):
    rewrite(
        own,
        lambda content: content["models"]["canaried"]["versions"]["stable"].update(export=str(tmp_path)),
    )
    assert "export.json: cannot be read" in hang_up(own, "reload_failed")["detail"]
    assert version_of(own, "canaried@stable") == "stable"


def test_a_reload_takes_models_away_and_puts_models_in(own):
    def change(content: dict[str, Any]) -> None:
        content["models"]["fresh"] = content["models"].pop("sticky")

    rewrite(own, change)
    admin(own, "POST", "/admin/reload")
    assert version_of(own, "fresh") in ("stable", "canary")
    with pytest.raises(openai.NotFoundError):
        version_of(own, "sticky")
    admin(own, "POST", "/admin/rollback")
    assert version_of(own, "sticky") in ("stable", "canary")


def test_what_an_administrator_gets_wrong(own):
    for body in (
        {"model": "canaried", "weights": {"nope": 1}},
        {"model": "canaried", "weights": {"stable": 0}},
        {"model": "canaried", "weights": {"stable": -1}},
        {"model": "canaried", "weights": {}},
    ):
        with pytest.raises(openai.BadRequestError):
            admin(own, "POST", "/admin/weights", body)
    with pytest.raises(openai.NotFoundError):
        admin(own, "POST", "/admin/weights", {"model": "nope", "weights": {"stable": 1}})


@contextlib.contextmanager
def held(server: EmbeddedServer) -> Iterator[None]:
    """The server's models stand still meanwhile, so that no answer ends."""
    stubs = [
        pid
        for pid, arguments in processes_of(server.shm_prefix).items()
        if arguments[0].endswith("triton_python_backend_stub")
    ]
    assert len(stubs) == 2
    for pid in stubs:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stubs:
            os.kill(pid, signal.SIGCONT)


def test_sigterm_lets_the_answers_end_and_takes_no_new_ones(start_gateway, routed, triton):
    own = start_gateway(routed)
    with pytest.raises(openai.ConflictError, match="nothing to roll back to"):
        admin(own, "POST", "/admin/rollback")
    with ThreadPoolExecutor(1) as pool:
        with held(triton):
            asking = pool.submit(
                own.client().chat.completions.create,
                model="canaried@canary",
                messages=ASKED,
                temperature=0,
                max_tokens=200,
                stream=True,
            )
            while own.metric("posttrain_gateway_in_flight") == 0:
                pass
            own.process.send_signal(signal.SIGTERM)
            assert own.wait_for("draining")["in_flight"] == 1
        chunks = list(asking.result())
    assert chunks[-1].choices[0].finish_reason == "length"
    own.wait_for("stopped")
    assert own.process.wait(60) == 0
    with pytest.raises(openai.APIConnectionError):
        version_of(own, "canaried")


def test_after_sigterm_readiness_goes_first(start_gateway, routed):
    """With unready_seconds the load balancer is told before the door is closed."""
    gateway = start_gateway(routed | {"limits": routed["limits"] | {"unready_seconds": 600}})
    gateway.process.send_signal(signal.SIGTERM)
    gateway.wait_for("draining")
    with pytest.raises(openai.InternalServerError) as caught:
        admin(gateway, "GET", "/health/ready")
    assert caught.value.response.json() == {"status": "draining"}
    assert version_of(gateway, "canaried@stable") == "stable"
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(60) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain", "gateway", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_command_checks_a_file_and_refuses_a_port_that_is_taken(own):
    checked = run(str(own.file), "--check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr.endswith("gateway.yaml: valid\n")
    taken = run(str(own.file), f"port={own.port}")
    assert taken.returncode == 2
    assert f"127.0.0.1:{own.port}: cannot be listened on (Address already in use)" in taken.stderr
    wrong = run(str(own.file), "limits.max_bodi_bytes=5")
    assert wrong.returncode == 2
    assert "did you mean 'max_body_bytes'?" in wrong.stderr
