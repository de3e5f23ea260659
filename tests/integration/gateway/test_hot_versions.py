"""A second version goes into the repository of a running server, takes a tenth of the traffic, then all."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.client import import_grpc
from serving.embedded import EmbeddedServer
from tests.integration.conftest import triton_environment
from tests.integration.gateway.test_routes import ASKED, admin, hang_up, rewrite

LOAD_REQUESTS = 300


def export(run_dir: Path, model: Path) -> None:
    from posttrain.stage import execute_stage
    from serving.config import ExportConfig

    config = ExportConfig(model=str(model), name="hot", num_versions=2, golden_prompts=0)
    execute_stage("export", config, run_dir)


@pytest.fixture
def other_model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The tiny model with every token of its head renamed: the same lengths, other words."""
    import torch

    from posttrain.models import load_causal_lm, load_tokenizer

    model = load_causal_lm(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(7, dims=0))
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def greedy(gateway: Any, model: str, **fields: Any) -> tuple[str, str]:
    """Version and text of one answer."""
    answer = gateway.client().chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0, **fields
    )
    return answer.system_fingerprint, answer.choices[0].message.content


@pytest.mark.slow
def test_a_version_is_loaded_under_load_without_a_failure(
    tmp_path: Path, start_gateway: Any, tiny_model_dir: Path, other_model: Path
) -> None:
    """Eight clients all the while: export, load, canary at 10 %, rollback, and the new version alone."""
    run_dir = tmp_path / "export"
    export(run_dir, tiny_model_dir)
    environment = triton_environment()
    assert environment is not None
    with EmbeddedServer(run_dir / "model_repository", "hot", environment, tmp_path / "triton.log") as server:
        version = {"export": str(run_dir), "triton": server.grpc_url}
        stable = {"stable": version | {"model_version": 1, "weight": 90}}
        gateway = start_gateway({"port": 0, "models": {"long": {"versions": stable}}})
        first = greedy(gateway, "long")
        answers: list[tuple[str, str]] = []
        progress, ending = threading.Condition(), threading.Event()

        def work() -> None:
            while not ending.is_set():
                answer = greedy(gateway, "long")
                with progress:
                    answers.append(answer)
                    progress.notify_all()

        def after(count: int) -> None:
            with progress:
                assert progress.wait_for(lambda: len(answers) >= count, timeout=120)

        with ThreadPoolExecutor(8) as pool:
            workers = [pool.submit(work) for _ in range(8)]
            after(40)
            export(run_dir, other_model)
            control = import_grpc().InferenceServerClient(server.grpc_url)
            control.load_model("hot")
            control.close()
            canary = version | {"model_version": 2, "weight": 10}
            rewrite(gateway, lambda file: file["models"]["long"]["versions"].update(canary=canary))
            assert hang_up(gateway, "reloaded")["routes"]["long"] == {"stable": 0.9, "canary": 0.1}
            split = len(answers)
            after(split + 100)
            shared = Counter(name for name, _ in answers[split:])
            assert admin(gateway, "POST", "/admin/rollback")["routes"]["long"] == {"stable": 1.0}
            admin(gateway, "POST", "/admin/rollback")
            whole = {"model": "long", "weights": {"canary": 1}}
            assert admin(gateway, "POST", "/admin/weights", whole)["routes"]["long"]["canary"] == 1
            after(max(LOAD_REQUESTS, len(answers) + 40))
            ending.set()
            for worker in workers:
                worker.result()
        second = greedy(gateway, "long@canary")
    assert len(answers) >= LOAD_REQUESTS
    assert first[0] == "stable"
    assert second[0] == "canary"
    assert first[1] != second[1]
    assert set(answers) == {first, second}, "every answer is that of the version that it names"
    assert 1 <= shared["canary"] <= 30, "10 of 100 expected"
    requests = gateway.metric("posttrain_gateway_requests_total", model="long")
    assert gateway.metric("posttrain_gateway_requests_total", model="long", status="200") == requests
