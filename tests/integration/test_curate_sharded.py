"""Curation over chunk files: the same bytes by any cut, number of processes and interruption; shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_prep.browse import browse
from data_prep.config import CurateConfig
from data_prep.curate import check, run
from data_prep.dataset import read_split, split_files
from data_prep.diff import diff
from data_prep.files import expand
from data_prep.operations.eval_sets import read_eval_set
from data_prep.records import TextRecord
from data_prep.sharded.ids import unique_id
from data_prep.sharded.plan import Sizes
from data_prep.sharded.store import NAME
from posttrain.context import StageContext
from posttrain.errors import DataError, PosttrainError, RequeueError
from posttrain.inputs import resolve
from posttrain.stage import execute_stage
from tests.integration import curate_golden
from tests.integration.test_curate import config, digests, pairs, save
from tests.unit import chunked

PINNED = {
    "all": {
        "rejects.jsonl": "194ea9bde671e7b9",
        "review.jsonl": "4d2a3cddfddb90a1",
        "dataset.json": "8dac75bdd25173f9",
    },
    "plain": {"rejects.jsonl": "3bd033b7b2278e31", "dataset.json": "aa0b200c8292447b"},
    "nodedup": {"rejects.jsonl": "e85cea247861828f", "dataset.json": "be1528a3558b9d6b"},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "all": {},
    "plain": {
        "operations": [],
        "split": {"by": "record"},
        "filters": {"min_chars": 60, "max_chars": 300},
    },
    "nodedup": {"operations": [], "dedup": False, "split": {"by": "group"}},
}


def curated(folder: Path, out: Path, rows: int, **block: Any) -> str:
    """Curate the golden data in chunks of so many rows, as the command would; what was said."""
    setting = CurateConfig.model_validate(curate_golden.block(folder, **block))
    inputs = {
        f"operations.{index}.against.0": resolve(operation.against[0], "dataset")
        for index, operation in enumerate(setting.operations)
        if operation.op == "decontaminate"
    }
    out.mkdir(exist_ok=True)
    console = Console(file=io.StringIO(), width=400)
    context = StageContext(run_dir=out, config=setting, inputs=inputs, console=console, resumed=True)
    run(setting, context, Sizes(rows=rows))
    return console.file.getvalue()


def pinned(out: Path) -> dict[str, str]:
    """Hashes of what was written of the rows: their contents and the ledger, rejects, the review list."""
    info = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    ledger = [
        [at["op"], at["rows_in"], at["repeated"], at["rows_out"], at["drops"], at["notes"], at["examples"]]
        for at in info.get("operations", ())
    ]
    said = [info[name] for name in ("content_hash", "rows_in", "rows_out", "drops", "split", "lengths")]
    texts = {"dataset.json": json.dumps([said, info.get("mixture"), ledger]).encode()}
    for name in ("rejects.jsonl", "review.jsonl"):
        if (out / name).is_file():
            texts[name] = (out / name).read_bytes()
    return {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}


@pytest.mark.parametrize("case", BLOCKS)
def test_bytes_do_not_depend_on_where_chunks_begin(golden: Path, tmp_path: Path, case: str) -> None:
    """Pinned: what the stage wrote when it held all rows; dataset.json has the hash of all contents."""
    found = []
    for rows in (5_000, 13):
        curated(golden, tmp_path / str(rows), rows, **BLOCKS[case])
        assert pinned(tmp_path / str(rows)) == PINNED[case]
        assert not (tmp_path / str(rows) / NAME).exists()
        found.append(digests(tmp_path / str(rows)))
    assert found[0] == found[1]


def test_bytes_do_not_depend_on_processes(golden: Path, tmp_path: Path) -> None:
    curated(golden, tmp_path / "two", 50, workers=2)
    assert pinned(tmp_path / "two") == PINNED["all"]


CHILD = """
from pathlib import Path
import sys
from tests.integration.test_curate_sharded import curated
if __name__ == "__main__":
    print(curated(Path(sys.argv[1]), Path(sys.argv[2]), 20, workers=int(sys.argv[3])))
"""


def in_a_child(folder: Path, out: Path, calls: Path, stop: str, workers: int = 1) -> tuple[int, str]:
    """(exit code, what was said) of a process that curates in chunks of 20 rows. stop: see curate_golden."""
    script = out.parent / "child.py"
    script.write_text(CHILD)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "POSTTRAIN_TEST_CALLS": str(calls),
        "POSTTRAIN_TEST_SIGNAL": stop,
    }
    command = [sys.executable, str(script), str(folder), str(out), str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def done_chunks(out: Path) -> dict[str, int]:
    """When each finished chunk was written."""
    root = out / NAME
    return {
        file.relative_to(root).as_posix(): file.stat().st_mtime_ns
        for file in root.glob("[0-9][0-9]/[0-9]*.json")
    }


def test_what_was_done_before_a_kill_is_not_done_again(golden: Path, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    code, _ = in_a_child(golden, out, calls, "9 4")
    assert code == -signal.SIGKILL
    assert stat.S_IMODE((out / NAME).stat().st_mode) == 0o700
    assert {file.name for file in out.iterdir()} == {NAME}
    before = done_chunks(out)
    assert len([name for name in before if name.startswith("03/")]) == 3
    code, _ = in_a_child(golden, out, calls, "9 8")
    assert code == -signal.SIGKILL
    assert before.items() <= done_chunks(out).items()
    code, said = in_a_child(golden, out, calls, "0 0", workers=2)
    assert code == 0, said
    chunks = 12
    assert f"resuming: 6 of {chunks} chunks are done (near_duplicates, pii, quality, toxicity)" in said
    # Every chunk once, and the two that were interrupted once more.
    assert len(calls.read_text().splitlines()) == chunks + 2
    assert pinned(out) == PINNED["all"]
    assert not (out / NAME).exists()


def test_a_dead_worker_is_an_error_that_can_be_resumed(golden: Path, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    code, said = in_a_child(golden, out, calls, "9 4", workers=2)
    assert code == 1
    assert "PosttrainError: a worker process died (of 2)" in said
    assert "goes on from the last finished chunk" in said
    assert PosttrainError("").exit_code == 1
    curated(golden, out, 20)
    assert pinned(out) == PINNED["all"]


def test_sigterm_leaves_a_run_to_resume(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("POSTTRAIN_TEST_SIGNAL", f"{int(signal.SIGTERM)} 2")
    with pytest.raises(RequeueError, match="chunk 2"):
        curated(golden, tmp_path / "out", 40)
    assert (tmp_path / "out" / NAME).is_dir()
    assert "resuming: 2 of" in curated(golden, tmp_path / "out", 40)
    assert pinned(tmp_path / "out") == PINNED["all"]


def test_a_changed_source_begins_anew(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curate_golden.write(tmp_path)
    monkeypatch.setenv("POSTTRAIN_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("POSTTRAIN_TEST_SIGNAL", f"{int(signal.SIGTERM)} 1")
    sink = Console(file=io.StringIO(), width=300)
    setting = CurateConfig.model_validate(curate_golden.block(tmp_path))
    with pytest.raises(RequeueError):
        execute_stage("curate", setting, tmp_path / "out", console=sink)
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "new", "chosen": "yes", "rejected": "no", "who": "x"}) + "\n")
    result = execute_stage("curate", setting, tmp_path / "out", console=sink)
    assert result.plan.action == "rerun"
    assert "resuming" not in sink.file.getvalue()
    assert result.manifest["metrics"]["rows_in"] == 229


def test_another_number_of_processes_is_the_same_stage(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", pairs(60))
    sink = Console(file=io.StringIO())
    execute_stage("curate", config("preference", source), tmp_path / "run", console=sink)
    again = execute_stage("curate", config("preference", source, workers=4), tmp_path / "run", console=sink)
    assert again.status == "skipped"


def test_sides_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", pairs(60))
    sink = Console(file=io.StringIO())
    execute_stage("curate", config("preference", source), tmp_path / "whole", console=sink)
    setting = config("preference", source, shard_rows=25)
    execute_stage("curate", setting, tmp_path / "cut", console=sink)
    assert execute_stage("curate", setting, tmp_path / "cut", console=sink).status == "skipped"
    names = [file.name for file in split_files(tmp_path / "cut", "train")]
    assert names == [f"train-{number:05}-of-00003.parquet" for number in range(3)]
    for split in ("train", "eval"):
        whole, cut = (read_split(tmp_path / run, split, "preference") for run in ("whole", "cut"))
        assert cut.to_list() == whole.to_list()
    assert diff(tmp_path / "whole", tmp_path / "cut").same_content
    assert len(expand(str(tmp_path / "cut"))) == 4
    shown = browse(str(tmp_path / "cut"), rows=1, start=26)
    assert shown[0].place.startswith("train-00001-of-00003.parquet:1")
    items = [read_eval_set(tmp_path / run, ["prompt"]).items for run in ("whole", "cut")]
    assert items[0] == items[1]
    again = config("preference", str(tmp_path / "cut"))
    assert (
        execute_stage("curate", again, tmp_path / "again", console=sink).manifest["metrics"]["rows_in"] == 60
    )
    (tmp_path / "cut" / names[1]).unlink()
    with pytest.raises(DataError, match=r"train\.parquet: no such file"):
        read_split(tmp_path / "cut", "train")


def test_an_error_shows_no_secret_and_leaves_no_rows(tmp_path: Path) -> None:
    """The message names fields of a row that fits no format; where rows are redacted, it is redacted too."""
    source = save(tmp_path / "a.jsonl", [{"ann@shop.example": "x"}])
    (tmp_path / "out").mkdir()
    for operations, shown in (([], True), ([{"op": "pii"}], False)):
        setting = config("text", source, operations=operations)
        context = StageContext(tmp_path / "out", setting, {}, Console(file=io.StringIO()))
        with pytest.raises(DataError, match="cannot tell the format from the fields") as caught:
            run(setting, context)
        assert ("ann@shop.example" in str(caught.value)) == shown
        assert not list((tmp_path / "out").iterdir())


def test_ray_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = config("preference", save(tmp_path / "a.jsonl", pairs(9)), engine="ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check(setting, "curate")
    assert problem.where == "curate.engine"
    assert "needs the package ray, which is not installed" in problem.message


NAMES = st.sampled_from(["a", "b", "a-2", "a-3", "a-2-2", "b-2", "c", "c-02"])


@settings(max_examples=25, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=25), size=st.integers(3, 30))
def test_ids_are_those_that_a_count_of_all_rows_gives(names: list[str], size: int) -> None:
    """Against one counter over all rows, ids of repetitions included."""
    mix = {"op": "mix", "max_epochs": 2.0, "rows": 2 * len(names)}
    setting = CurateConfig.model_validate(
        {"kind": "text", "sources": [{"path": "x"}], "dedup": False, "operations": [mix]}
    )
    records = [TextRecord(f"text {number}", id=name) for number, name in enumerate(names)]
    done = chunked.curate(setting, records, chunk=size)
    ids: Counter[str] = Counter()
    own = [unique_id(ids, name) for name in names]
    again = [unique_id(ids, name) for name in own]
    found: dict[str, list[str]] = {}
    for row in done.every:
        found.setdefault(row["source"], []).append(row["id"])
    for line, expected in enumerate(zip(own, again, strict=True), start=1):
        assert found[f"f:{line}"] in (list(expected), list(expected[:1]))
    assert sum(map(len, found.values())) == len(done.rows["train"]) + len(done.rows["eval"])
    assert len(done.rows["train"]) == 2 * sum(len(at) == 2 for at in found.values())
