"""The curate stage on Ray Data, in a local Ray of two processors: bytes, errors, a lost process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import CurateConfig
from data_prep.sharded import ray_engine
from data_prep.sharded.plan import Setup, Sizes, Task
from posttrain.errors import UserError
from posttrain.stage import execute_stage
from tests.integration.test_curate import config, pairs, save

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for all tests here; the engine goes into it instead of starting its own."""
    import ray

    ray_engine.start_here(workers=2)
    yield
    ray.shutdown()


OPERATIONS: list[dict[str, Any]] = [
    {"op": "unicode"},
    {"op": "pii"},
    {"op": "near_duplicates", "keep": "all"},
    {"op": "preference_checks"},
    {"op": "quality", "action": "tag"},
    {"op": "mix", "weights": {"a.jsonl": 1, "b.jsonl": 2}, "max_epochs": 2},
]


def settings(folder: Path, **fields: Any) -> CurateConfig:
    """Two sources with duplicates, near-duplicates, contradictions, personal data and half a row."""
    folder.mkdir(exist_ok=True)
    rows = pairs(120)
    near = [{**row, "prompt": f"{row['prompt']} please and thank you, then"} for row in rows[:20]]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[20:25]]
    told = [
        {**row, "prompt": f"{row['prompt']} write to jo{n}@example.org"} for n, row in enumerate(rows[:9])
    ]
    first = save(folder / "a.jsonl", [*rows[:80], *near, *rows[:5], {"prompt": "half a row"}])
    second = save(folder / "b.jsonl", [*rows[80:], *turned, *told])
    return config(
        "preference",
        *(first, second),
        operations=OPERATIONS,
        split={"by": "cluster", "eval_fraction": 0.2},
        max_reject_fraction=0.1,
        **fields,
    )


def digests(directory: Path) -> dict[str, str]:
    """Of all files but the manifest and the configuration, which say how it was done."""
    how = {"manifest.json", "config.yaml", "metrics.jsonl"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in how and not path.name.startswith(".")
    }


def test_ray_writes_the_bytes_of_one_process(tmp_path: Path) -> None:
    execute_stage("curate", settings(tmp_path / "in"), tmp_path / "local")
    execute_stage("curate", settings(tmp_path / "in", engine="ray"), tmp_path / "ray")
    found = digests(tmp_path / "ray")
    assert found == digests(tmp_path / "local")
    assert {"train.parquet", "eval.parquet", "rejects.jsonl", "dataset.json"} <= set(found)
    info = json.loads((tmp_path / "ray" / "dataset.json").read_text())
    assert {"contradictory_pairs", "duplicate", "missing_field"} <= set(info["drops"])


def test_many_windows_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep import curate

    execute_stage("curate", settings(tmp_path / "in"), tmp_path / "local")
    monkeypatch.setattr(ray_engine, "WINDOW_BYTES", 1)
    monkeypatch.setattr(curate, "Sizes", lambda: Sizes(rows=60))
    execute_stage("curate", settings(tmp_path / "in", engine="ray", workers=1), tmp_path / "ray")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_a_machine_that_does_not_see_the_run_directory_is_named(tmp_path: Path) -> None:
    setup = Setup(settings(tmp_path / "in", engine="ray"), tmp_path / "elsewhere", {})
    with pytest.raises(UserError, match=r"machine \S+ of the cluster does not see \S+/elsewhere\n"):
        list(ray_engine.RayEngine(setup, None, None).run([Task(0, 0)]))


def test_a_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    died = tmp_path / "died"
    rows = [*pairs(60), {**pairs(1)[0], "chosen": f"once at {died} and never again"}]
    scored = {"op": "toxicity", "scorer": "tests.integration.dying_scorer:score"}
    source = save(tmp_path / "a.jsonl", rows)
    execute_stage("curate", config("preference", source, operations=[scored], engine="ray"), tmp_path / "ray")
    assert died.exists()
    execute_stage("curate", config("preference", source, operations=[scored]), tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_an_address_without_the_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine: ray"):
        settings(tmp_path / "in", ray_address="auto")


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The last test here: it leaves the Ray of the others."""
    import ray

    ray.shutdown()
    wrong = settings(tmp_path / "in", engine="ray", ray_address="127.0.0.1:1")
    with pytest.raises(UserError, match=r"no cluster can be reached at 127\.0\.0\.1:1 "):
        execute_stage("curate", wrong, tmp_path / "out")


@pytest.mark.parametrize("failures", [2, 3])
def test_ray_that_does_not_start_is_started_again(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """On a busy machine its parts do not always find each other in the time that Ray gives them."""
    import ray

    ray.shutdown()
    tried: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        tried.append(settings)
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    if failures == 3:
        with pytest.raises(RuntimeError, match="timed out during startup"):
            ray_engine.start_here(2)
    else:
        ray_engine.start_here(2)
    assert len(tried) == 3
    assert {settings["num_cpus"] for settings in tried} == {2}
