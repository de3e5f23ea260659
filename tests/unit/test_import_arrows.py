"""Who imports whom: posttrain <- data_prep <- {train, eval, serving}; the core imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "posttrain": {"posttrain"},
    "data_prep": {"data_prep", "posttrain"},
    "train": {"train", "data_prep", "posttrain"},
    "eval": {"eval", "data_prep", "posttrain"},
    "serving": {"serving", "data_prep", "posttrain"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in `source`, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def at_import(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, module) of the imports that run when the module itself is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(ast.unparse(ast.Module([node], [])))
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.ClassDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import(
                    [item for item in vars(node).get(field, []) if isinstance(item, ast.stmt)]
                )
            for handler in vars(node).get("handlers", []):
                yield from at_import(handler.body)


def wrong_arrows(package: str, source: str) -> list[str]:
    """The imports in a file of `package` that break the layering, as "line: module"."""
    wrong = []
    for line, module in imported(source):
        top = module.split(".")[0]
        relative = module.startswith(".")
        if relative or top in {*ALLOWED, "tests"} and top not in ALLOWED[package]:
            wrong.append(f"{line}: {module}")
    return wrong


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no Python files"
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{arrow}"
        for file in files(package)
        for arrow in wrong_arrows(package, file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_core_imports_nothing_heavy_at_module_level() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in files("posttrain")
        for line, module in at_import(ast.parse(file.read_text(encoding="utf-8")).body)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_arrow_is_found_wherever_it_hides() -> None:
    source = (
        "import os\n"
        "from posttrain.errors import UserError\n"
        "import train.sft\n"
        "def later():\n"
        "    from eval import statistics\n"
        "    from data_prep.dataset import read_split\n"
        "class A:\n"
        "    import evaluate\n"
        "from . import sibling\n"
    )
    assert sorted(wrong_arrows("serving", source)) == ["3: train.sft", "5: eval", "9: ."]
    assert sorted(wrong_arrows("posttrain", source)) == [
        "3: train.sft",
        "5: eval",
        "6: data_prep.dataset",
        "9: .",
    ]


def test_module_level_means_what_runs_at_import() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    import torch\n"
        "else:\n"
        "    import trl\n"
        "try:\n"
        "    import peft\n"
        "except ImportError:\n"
        "    import datasets\n"
        "def later():\n"
        "    import transformers\n"
        "class A:\n"
        "    import accelerate.utils\n"
    )
    found = {module for _, module in at_import(ast.parse(source).body)}
    assert found == {"typing", "trl", "peft", "datasets", "accelerate.utils"}
