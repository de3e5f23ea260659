"""What may befall a curation over chunk files: scripts, signals, other code, lost clusters, odd texts."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_prep import curate
from data_prep.config import CurateConfig
from data_prep.sharded.code import code_hash
from data_prep.sharded.store import NAME, replacing
from posttrain.errors import ConfigError, RequeueError, UserError
from posttrain.stage import execute_stage
from tests.integration.test_curate import config, save
from tests.integration.test_curate_sharded import PINNED, curated, in_a_child, pinned

REPOSITORY = Path(__file__).parents[2]
UNGUARDED = """
from pathlib import Path
from data_prep.config import CurateConfig
from posttrain.stage import execute_stage

print("begun")
setting = CurateConfig.model_validate({"kind": "text", "sources": [{"path": "a.jsonl"}], "workers": 2})
print(execute_stage("curate", setting, Path("run")).status)
"""


def stopped(golden: Path, out: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that SIGTERM ended at its second chunk of the passes after reading."""
    with monkeypatch.context() as patch:
        patch.setenv("POSTTRAIN_TEST_CALLS", str(calls))
        patch.setenv("POSTTRAIN_TEST_SIGNAL", f"{int(signal.SIGTERM)} 2")
        with pytest.raises(RequeueError):
            curated(golden, out, 40)


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [{"text": f"text number {number}"} for number in range(60)])
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["begun", "completed"]


def test_sigterm_of_a_worker_is_for_the_driver(golden: Path, tmp_path: Path) -> None:
    """`timeout`, and some schedulers, send it to all processes of the group."""
    stop = f"{int(signal.SIGTERM)} 4"
    code, said = in_a_child(golden, tmp_path / "out", tmp_path / "calls", stop, workers=2)
    assert code == 0, said
    assert pinned(tmp_path / "out") == PINNED["all"]


def test_changed_code_begins_anew(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(golden, tmp_path / "out", tmp_path / "calls", monkeypatch)
    monkeypatch.setattr(curate, "code_hash", lambda config: "other")
    assert "resuming" not in curated(golden, tmp_path / "out", 40)
    assert pinned(tmp_path / "out") == PINNED["all"]


def test_a_scorer_is_part_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    operation = {"op": "toxicity", "scorer": "scorer_of_a_test:score"}
    setting = config("text", str(tmp_path / "a"), operations=[operation])
    hashes = set()
    for factor in (1, 2):
        (tmp_path / "scorer_of_a_test.py").write_text(
            f"def score(texts):\n    return [{factor}] * len(texts)"
        )
        hashes |= {code_hash(setting), code_hash(setting)}
    assert len(hashes) == 2


def test_a_cluster_that_is_away_costs_nothing_that_was_done(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    out = tmp_path / "out"
    stopped(golden, out, tmp_path / "calls", monkeypatch)
    with pytest.raises(ConfigError, match="no cluster can be reached"):
        curated(golden, out, 40, engine="ray", ray_address="127.0.0.1:1")
    assert "resuming: 2 of" in curated(golden, out, 40)
    assert pinned(out) == PINNED["all"]
    assert not (out / NAME).exists()


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    """A process that was given up for lost may go on writing."""
    file = tmp_path / "file"
    with replacing(file) as lost, replacing(file) as new:
        assert lost != new
        lost.write_text("half")
        new.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UnicodeEncodeError), replacing(file) as beside:
        beside.write_text("half \ud800", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


GOOD = [{"text": f"text number {number}", "key": f"k{number}"} for number in range(40)]
ODD = "odd \ud800 end"


@pytest.mark.parametrize(
    ("row", "source", "reason"),
    [
        ({"text": ODD, "key": "a"}, {}, "invalid_unicode"),
        ({"text": "fine", "key": ODD}, {"id_column": "key"}, "invalid_unicode"),
        ({"text": "fine", "key": ODD}, {"group_column": "key"}, "invalid_unicode"),
        ({"text": "fine", "key": {ODD: 1}}, {"meta_columns": ["key"]}, "invalid_unicode"),
        ({ODD: "fine", "key": "a"}, {}, "missing_field"),
    ],
)
def test_a_lone_surrogate_anywhere_in_a_row_costs_that_row(
    tmp_path: Path, row: dict[str, Any], source: dict[str, Any], reason: str
) -> None:
    path = save(tmp_path / "a.jsonl", [*GOOD, row])
    setting = CurateConfig.model_validate(
        {
            "kind": "text",
            "sources": [{"path": path, **source}],
            "max_reject_fraction": 0.1,
            "split": {"eval_fraction": 0.5},
        }
    )
    execute_stage("curate", setting, tmp_path / "run", console=Console(file=io.StringIO()))
    (reject,) = map(json.loads, (tmp_path / "run" / "rejects.jsonl").read_text(encoding="utf-8").splitlines())
    assert (reject["line"], reject["reason"]) == (41, reason)


def test_a_file_name_that_is_no_utf8_is_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"odd\xff.jsonl")
    try:
        save(tmp_path / name, GOOD)
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    setting = config("text", str(tmp_path / "*.jsonl"))
    execute_stage("curate", setting, tmp_path / "run", console=Console(file=io.StringIO()))
    info = json.loads((tmp_path / "run" / "dataset.json").read_text(encoding="utf-8"))
    assert info["sources"][0]["name"] == "odd\\udcff.jsonl"


def test_an_error_of_the_engine_is_for_the_user() -> None:
    from data_prep.sharded.plan import EngineError

    assert EngineError("").exit_code == UserError("").exit_code == 2
