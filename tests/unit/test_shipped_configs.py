"""Every YAML that ships is valid by the product's own check."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.pipeline import load_pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.y*ml"))


def test_the_documented_configs_are_there():
    assert {str(path.relative_to(CONFIGS)) for path in FILES} >= {"tiny/pipeline.yaml", "hh_rlhf/tiny.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_is_valid(path):
    """All of it; that the Triton environment is installed is not the file's business."""
    problems = []
    try:
        assert load_pipeline(path, run_checks=True).stages
    except ConfigError as error:
        problems = [problem for problem in error.problems if not problem.where.endswith(".triton_env")]
    assert problems == []
