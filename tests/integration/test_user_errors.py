"""What a newcomer gets wrong, through the real command: exit code, message, and nothing half written.

Exit 2: something to correct. Exit 1: the machine (a full disk).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = [
    {"role": "user", "content": "Where is order K104?"},
    {"role": "assistant", "content": "It ships today."},
]


def posttrain(
    *arguments: str | Path, cwd: Path, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command from `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-m", "posttrain", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def error_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """stderr of a command that must have failed with `code`, without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    return done.stderr


def assert_nothing_half_written(run_dir: Path, statuses: tuple[str, ...] = ("failed",)) -> None:
    """Either there is no run, or its manifest says that it is not complete, and it holds no outputs."""
    if not run_dir.exists():
        return
    outputs = {"train.parquet", "eval.parquet", "dataset.json", "model"}
    left = {item.name for item in run_dir.rglob("*")}
    assert not left & outputs, left
    assert not [name for name in left if name.startswith(".staging")], left
    if (run_dir / "manifest.json").exists():
        assert json.loads((run_dir / "manifest.json").read_text())["status"] in statuses


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def curate_yaml(directory: Path, source: str, **extra: object) -> Path:
    path = directory / "curate.yaml"
    settings = {"stage": "curate", "kind": "conversation", "sources": [{"path": source}], **extra}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


PIPELINE = """\
name: demo
stages:
  demos:
    stage: curate
    kind: conversation
    sources: [{generator: support_desk, rows: 40}]
  sft:
    model: /models/base
    data: ${stage:demos}
    trainer:
      max_steps: 5
"""


def test_misspelt_key(tmp_path: Path) -> None:
    (tmp_path / "pipe.yaml").write_text(PIPELINE.replace("rows: 40", "rowz: 40"))
    error = error_of(posttrain("run", "pipe.yaml", cwd=tmp_path), 2)
    assert "pipe.yaml:6: stages.demos.sources.0.rowz: unknown key 'rowz'" in error
    assert "did you mean 'rows'?" in error
    assert not (tmp_path / "runs").exists()


def test_misspelt_trainer_argument(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = PIPELINE.replace("max_steps", "max_stepz").replace("/models/base", str(tiny_model_dir))
    (tmp_path / "pipe.yaml").write_text(text)
    error = error_of(posttrain("run", "pipe.yaml", cwd=tmp_path), 2)
    assert "pipe.yaml:11: stages.sft.trainer.max_stepz" in error
    assert "max_steps" in error.split("max_stepz")[-1]
    assert not (tmp_path / "runs").exists()


def test_several_mistakes_together(tmp_path: Path) -> None:
    text = PIPELINE.replace("rows: 40", "rows: many").replace("stage:demos", "stage:demo")
    (tmp_path / "pipe.yaml").write_text(f"{text}sead: 3\n")
    error = error_of(posttrain("run", "pipe.yaml", "stages.sft.seed=-1", cwd=tmp_path), 2)
    assert "4 mistakes in the configuration" in error
    assert "pipe.yaml:6: stages.demos.sources.0.rows: must be a valid integer (got 'many')" in error
    assert "pipe.yaml:9: stages.sft.data: there is no stage 'demo'\n    did you mean 'demos'?" in error
    assert "pipe.yaml:12: sead: unknown key 'sead'\n    did you mean 'seed'?" in error
    assert (
        "override stages.sft.seed=-1: stages.sft.seed: must be greater than or equal to 0 (got -1)" in error
    )
    assert not (tmp_path / "runs").exists()


def test_missing_configuration(tmp_path: Path) -> None:
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    error = error_of(posttrain("run", "pipes.yaml", cwd=tmp_path), 2)
    assert "pipes.yaml: no such file\n    did you mean pipe.yaml?" in error


def test_missing_data_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "dialogues.jsonl", [{"messages": GOOD}])
    config = curate_yaml(tmp_path, "dialogs.jsonl")
    error = error_of(posttrain("curate", config, "--output", "out", cwd=tmp_path), 2)
    assert "sources.0.path: dialogs.jsonl: no such file" in error
    assert "did you mean" in error
    assert "dialogues.jsonl" in error
    assert not (tmp_path / "out").exists()


def test_missing_model_is_found_before_the_first_stage_runs(tmp_path: Path) -> None:
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    error = error_of(posttrain("run", "pipe.yaml", cwd=tmp_path), 2)
    assert "sft: input model: /models/base: no such model" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_set(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    error = error_of(
        posttrain("curate", curate_yaml(tmp_path, "rows.jsonl"), "--output", "out", cwd=tmp_path), 2
    )
    assert "rows.jsonl" in error
    assert "empty" in error or "no row" in error or "no rows" in error
    assert_nothing_half_written(tmp_path / "out")


def test_unknown_role_names_file_and_line(tmp_path: Path) -> None:
    wrong = [{"role": "user", "content": "Hello"}, {"role": "asistant", "content": "Hi"}]
    write_rows(tmp_path / "rows.jsonl", [{"messages": GOOD}, {"messages": GOOD}, {"messages": wrong}])
    error = error_of(
        posttrain("curate", curate_yaml(tmp_path, "rows.jsonl"), "--output", "out", cwd=tmp_path), 2
    )
    assert "rows.jsonl:3" in error
    assert "'asistant'" in error
    assert "system, user, assistant, tool" in error or "did you mean" in error
    assert_nothing_half_written(tmp_path / "out")


def test_tokenizer_mismatch_between_stages(
    tmp_path: Path, tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    other = tmp_path / "other_reward"
    shutil.copytree(tiny_reward_dir, other)
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": f"K{i}?"}]} for i in range(80)]
    )
    config = curate_yaml(tmp_path, "rows.jsonl", kind="prompt", split={"by": "record"})
    data = posttrain("curate", config, "--output", "data", cwd=tmp_path)
    assert data.returncode == 0, data.stderr
    # PPO renders responses anew for such a reward model; an evaluation scores the same tokens with all.
    models = (f"models.sft={tiny_model_dir}", "baseline=sft", f"reward={other}")
    error = error_of(posttrain("eval", *models, "prompts=data", "--output", "out", cwd=tmp_path), 2)
    assert f"models.sft ({tiny_model_dir}) and reward ({other}) differ in chat template" in error
    assert "must share both" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=777", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(tmp_path: Path, small_disk: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": os.urandom(300).hex()}, GOOD[1]]} for _ in range(1500)]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = curate_yaml(tmp_path, "rows.jsonl")
    error = error_of(posttrain("curate", config, "--output", small_disk / "out", cwd=tmp_path), 1)
    assert f"{small_disk / 'out'}: no space left on the disk (" in error
    assert "bytes free)" in error
    assert "--output /path" in error
    assert "to resume" in error
    assert_nothing_half_written(small_disk / "out", ("failed", "running"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = posttrain("curate", config, "--output", small_disk / "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_disk_that_is_full_from_the_start(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(b"0" * 2**20)
    (tmp_path / "pipe.yaml").write_text(PIPELINE[: PIPELINE.index("  sft")])
    error = error_of(posttrain("run", "pipe.yaml", f"output_dir={small_disk}", cwd=tmp_path), 1)
    assert "no space left on the disk (0 bytes free)" in error
    assert "output_dir=/path" in error
    assert_nothing_half_written(small_disk / "demo" / "demos")


def test_read_only_file_system(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (tmp_path / "pipe.yaml").write_text(PIPELINE[: PIPELINE.index("  sft")])
    error = error_of(posttrain("run", "pipe.yaml", f"output_dir={small_disk}", cwd=tmp_path), 2)
    assert "cannot write to the run directory" in error
    assert "Read-only file system" in error
    assert "output_dir=/path" in error
    assert not list(small_disk.iterdir())


def test_run_directory_without_write_permission(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"messages": GOOD}])
    config = curate_yaml(tmp_path, "rows.jsonl")
    (tmp_path / "out").mkdir(mode=0o555)
    done = posttrain(
        "curate", config, "--output", tmp_path / "out", cwd=tmp_path, prefix=obeying_permissions()
    )
    error = error_of(done, 2)
    assert f"cannot write to the run directory {tmp_path / 'out'} (Permission denied)" in error
    assert "--output /path" in error
    assert not list((tmp_path / "out").iterdir())


def obeying_permissions() -> list[str]:
    """A command prefix under which root, too, is bound by file permissions."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("root ignores permissions, and setpriv cannot take that from it here")
    return prefix
