"""The command line, in processes of its own: help without torch, plans, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import __version__
from posttrain.cli import app
from posttrain.registry import STAGES
from posttrain.stage_file import load_stage_file

ROOT = Path(__file__).resolve().parents[2]
CURATE = """\
stage: curate
kind: conversation
sources: [{generator: support_desk, rows: 40}]
"""


def posttrain(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "posttrain", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.yaml"
    block = "".join(f"    {line}\n" for line in CURATE.splitlines())
    path.write_text(f"name: demo\nreport: false\nstages:\n  demos:\n{block}")
    return path


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "pyarrow", "omegaconf", "yaml")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["run", "--help"],
        ["sft", "--help"],
        ["serve", "--help"],
        ["conformance", "--help"],
        ["gateway", "--help"],
        ["--version"],
    ],
)
def test_importing_and_help_stay_light(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, posttrain.cli\n"
        f"sys.argv = ['posttrain', *{arguments!r}]\n"
        f"try:\n    {'posttrain.cli.main()' if arguments else 'pass'}\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_core_module_imports_torch(tmp_path: Path) -> None:
    modules = [
        f"posttrain.{file.stem}"
        for file in (ROOT / "posttrain").glob("*.py")
        if not file.stem.startswith("__")
    ]
    configs = {spec.config.partition(":")[0] for spec in STAGES.values()}
    code = f"import sys, {', '.join([*modules, *configs])}\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_help_with_an_example() -> None:
    for name in ("run", "check", "show", "schema", "report", *STAGES):
        done = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
        assert done.exit_code == 0, name
        assert f"Example: posttrain {name} " in done.stdout, name


@pytest.mark.parametrize("kind", STAGES)
def test_the_example_of_a_stage_is_a_valid_configuration(kind: str, tmp_path: Path) -> None:
    """Typed as the help shows it; where it names a file of one's own, that file holds the required fields."""
    (tmp_path / "my-ppo.yaml").write_text("{stage: ppo, model: a, reward: b, data: c}")
    [epilog] = [command.epilog for command in app.registered_commands if command.name == kind]
    [example] = [part for part in str(epilog).split("\n\n") if " --output " in part]
    words = shlex.split(example)[3:]
    assert words[-2:] == ["--output", f"runs/my-{kind}"]
    file = tmp_path / words[0] if "=" not in words[0] else None
    block = load_stage_file(kind, file, words[1:-2] if file else words[:-2])
    assert block.check() == []


def test_version_and_no_arguments(tmp_path: Path) -> None:
    assert posttrain("--version", cwd=tmp_path).stdout == f"posttrain {__version__}\n"
    assert "Commands:" in posttrain(cwd=tmp_path).stderr
    assert posttrain("rn", cwd=tmp_path).returncode == 2


def test_run_dry_run_json_then_skip_without_torch(pipeline: Path) -> None:
    where = pipeline.parent
    planned = posttrain("run", "pipe.yaml", "--dry-run", "--json", cwd=where)
    assert [(row["name"], row["action"]) for row in json.loads(planned.stdout)] == [("demos", "run")]
    assert not (where / "runs").exists()
    done = posttrain("run", "pipe.yaml", "--json", cwd=where)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["stages"][0]["status"] == "completed"
    assert sum(result["stages"][0]["metrics"][f"{side}_rows"] for side in ("train", "eval")) > 0
    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "posttrain", "run", "pipe.yaml"],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demos: skipped (complete, same inputs)" in again.stderr
    imported = {
        line.rpartition("|")[2].strip()
        for line in again.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "omegaconf" in imported
    assert not imported & {"torch", "transformers", "trl", "pyarrow"}


def test_show_a_stage_and_a_pipeline(pipeline: Path) -> None:
    where = pipeline.parent
    assert posttrain("run", "pipe.yaml", cwd=where).returncode == 0
    stage = posttrain("show", "runs/demo/demos", cwd=where).stdout
    assert "curate (demos)" in stage
    assert "content_hash" in stage
    assert "demos (curate, complete)" in stage
    assert "demos" in posttrain("show", "runs/demo", cwd=where).stdout
    shown = json.loads(posttrain("show", "runs/demo/demos", "--json", cwd=where).stdout)
    assert shown["lineage"]["outputs_hash"] == shown["manifest"]["outputs_hash"]
    assert (
        json.loads(posttrain("show", "runs/demo", "--json", cwd=where).stdout)["stages"]["demos"]["stage"]
        == "curate"
    )
    wrong = posttrain("show", "runs", cwd=where)
    assert wrong.returncode == 2
    assert "holds neither manifest.json nor pipeline.json" in wrong.stderr


def test_one_stage_from_a_file_and_from_settings(tmp_path: Path) -> None:
    (tmp_path / "demos.yaml").write_text(CURATE)
    done = posttrain("curate", "demos.yaml", "sources.0.rows=30", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["rows_in"] == 30
    assert (tmp_path / "runs" / "demos" / "train.parquet").is_file()
    settings = ("kind=prompt", "sources=[{generator: support_desk, rows: 30}]")
    planned = posttrain("curate", *settings, "--output", "o", "--dry-run", cwd=tmp_path)
    assert planned.stdout.split()[:2] == ["curate", "run"]
    assert posttrain("curate", cwd=tmp_path).returncode == 2


def test_check_reports_and_exit_codes(pipeline: Path) -> None:
    where = pipeline.parent
    assert posttrain("check", "pipe.yaml", cwd=where).stdout == "pipe.yaml: valid\n"
    wrong = posttrain("check", "pipe.yaml", "stages.demos.kin=text", "--json", cwd=where)
    assert wrong.returncode == 2
    report = json.loads(wrong.stdout)
    assert report["valid"] is False
    assert report["problems"][0]["remedy"] == "did you mean 'kind'?"
    (where / "one.yaml").write_text(CURATE)
    assert posttrain("check", "one.yaml", cwd=where).returncode == 0
    assert posttrain("check", "one.yaml", "stage=curat", cwd=where).returncode == 2


def test_schema_covers_every_stage_and_its_references_resolve(pipeline: Path) -> None:
    done = posttrain("schema", "--output", "schema.json", cwd=pipeline.parent)
    assert done.returncode == 0, done.stderr
    schema = json.loads((pipeline.parent / "schema.json").read_text())
    assert schema["$defs"]["curate_block"]["properties"]["stage"] == {
        "const": "curate",
        "description": STAGES["curate"].help,
    }
    assert {f"{kind}_file" for kind in STAGES} <= set(schema["$defs"])
    references = [part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]]
    assert references
    assert set(references) <= set(schema["$defs"])


def test_unexpected_error_is_short_and_debug_shows_the_traceback(pipeline: Path) -> None:
    where = pipeline.parent
    (where / "runs" / "demo" / "pipeline.json").mkdir(parents=True)
    short = posttrain("run", "pipe.yaml", cwd=where)
    assert short.returncode == 1
    assert "Traceback" not in short.stderr
    assert "error: IsADirectoryError" in short.stderr
    long = posttrain("run", "pipe.yaml", "--debug", cwd=where)
    assert "Traceback" in long.stderr
