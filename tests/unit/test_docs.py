"""What the documents, docstrings and comments name exists: tests, files, configurations. And docs/ppo.md has
every setting and warning of PPO.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from data_prep.config import FormatName
from data_prep.formats import FORMATS
from data_prep.pii import TYPES
from serving.gateway.config import MonitoringConfig, TracingConfig
from serving.monitor import store
from train.ppo.config import PpoStageConfig
from train.ppo.symptoms import SYMPTOMS
from train.synthesis.config import SynthesizeConfig

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = ("posttrain", "configs", "data_prep", "train", "eval", "serving", "scripts")
FILE = re.compile(rf"\b(?:{'|'.join((*PACKAGES, 'tests'))})/[\w./-]*\w\.(?:py|yaml|sh)\b")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_test_and_file_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = [(file, name) for file, name in TEST.findall(text) if (ROOT / file).is_file()]
    gone = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    gone += [file for file in FILE.findall(text) if not (ROOT / file).is_file()]
    assert not gone


def test_every_configuration_that_the_code_names_exists() -> None:
    sources = [
        file
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.*")
        if file.is_file() and file.suffix != ".pyc"
    ]
    named = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in sources
        for name in re.findall(r"\bconfigs/[\w./-]+\.yaml\b", file.read_text(encoding="utf-8"))
    }
    assert named
    assert not {(file, name) for file, name in named if not (ROOT / name).is_file()}


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field of a configuration model and of the blocks in it, by dotted path, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        blocks = blocks_in(field.annotation)
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):
            found[path] = default
        for block in blocks:
            found |= fields_of(block, f"{path}.")
    return found


def blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks_in(part)]


def as_value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def test_the_ppo_page_has_every_field_with_its_default() -> None:
    """Of the stage and of the blocks inside it, and none that is not there."""
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Every setting\n")
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", section, re.MULTILINE)
    assert {name: as_value(cell) for name, cell in rows} == fields_of(PpoStageConfig)
    assert len(rows) == len(dict(rows))


def test_the_synthetic_page_has_every_field_with_its_default() -> None:
    """All of the stage but the blocks that it shares with ppo."""
    text = (ROOT / "docs" / "synthetic.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Every setting\n")
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", section, re.MULTILINE)
    shared = ("rewards.", "rollout.")
    own = {name: value for name, value in fields_of(SynthesizeConfig).items() if not name.startswith(shared)}
    assert {name: as_value(cell) for name, cell in rows} == {
        name: value for name, value in own.items() if name != "judge"
    }
    assert len(rows) == len(dict(rows))


def test_the_data_page_has_every_format_with_its_kind() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Formats\n")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert dict(rows) == {name: form.native for name, form in FORMATS.items()}
    assert {"auto", *FORMATS} == set(get_args(FormatName))


def test_the_ppo_page_has_every_warning() -> None:
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n### Warnings\n")
    section, _, _ = section.partition("\n## ")
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(SYMPTOMS)


@pytest.mark.parametrize(("block", "model"), [("monitoring", MonitoringConfig), ("tracing", TracingConfig)])
def test_the_gateway_page_has_every_field_of_a_block_with_its_default(
    block: str, model: type[BaseModel]
) -> None:
    text = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
    _, _, table = text.partition(f"\n| `{block}.` | Default | |\n")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table.partition("\n\n")[0], re.MULTILINE)
    documented = {name: as_value(cell.strip("`")) for name, cell in rows}
    assert documented == {
        name: "none" if value is None else value for name, value in fields_of(model).items()
    }


def test_the_monitoring_page_has_every_column_and_every_type_of_personal_data() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    section, _, personal = text.partition("\n## Personal data\n")
    for table in ("requests", "samples"):
        _, _, rows = section.partition(f"\n| `{table}` | |\n")
        cells = re.findall(r"^\| (`[^|]*`) \|", rows.partition("\n\n")[0], re.MULTILINE)
        (statement,) = [line for line in store.SCHEMA if f"EXISTS {table} (" in line]
        columns = re.findall(r"(\w+) (?:TEXT|REAL|INTEGER)", statement)
        assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(columns)
    cells = re.findall(r"^\| (`[^|]*`) \|", personal, re.MULTILINE)
    assert set(re.findall(r"`([A-Z_]+)`", " ".join(cells))) == set(TYPES)
