"""What is installed is what is meant to be: the wheel's top-level names and its data files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {"posttrain", "configs", "data_prep", "train", "eval", "serving"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked and new files, with folders planted that must not slip in."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for stray in ("runs", "train_runs", "evaluation"):
        (source / stray).mkdir()
        (source / stray / "__init__.py").touch()
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_top_level_names_are_exactly_the_packages(wheel):
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == TOP_LEVEL


def test_data_files_ship(wheel):
    names = set(wheel.namelist())
    for folder, pattern in (
        ("configs", "*.yaml"),
        ("configs", "*.json"),
        ("configs", "*.jinja"),
        ("posttrain/architectures", "*"),
        ("eval/templates", "*"),
        ("eval/annotate/templates", "*"),
        ("eval/annotate/static", "*"),
        ("serving/backends", "*.py"),
    ):
        expected = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern) if p.is_file()}
        expected = {name for name in expected if "__pycache__" not in name}
        assert expected
        assert expected <= names


def test_every_module_ships(wheel):
    tracked = {
        str(path.relative_to(ROOT)) for package in TOP_LEVEL for path in (ROOT / package).rglob("*.py")
    }
    assert tracked <= set(wheel.namelist())
