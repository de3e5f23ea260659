"""YAML to configuration models: overrides, interpolation, and mistakes that name file, line and remedy."""

from __future__ import annotations

from pathlib import Path

import core_toy_stages
import pytest
from core_toy_stages import ToyConfig

from posttrain.config import find_references, load_yaml
from posttrain.errors import ConfigError, UserError
from posttrain.pipeline import load_pipeline
from posttrain.stage_file import load_stage_file

PIPELINE = """\
name: demo
output_dir: out
vars: {words: hello}
stages:
  second:
    stage: toy
    text: b
    upstream: ${stage:first}
  first:
    stage: toy
    text: ${vars.words}
    trainer:
      learning_rate: 1e-3
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    core_toy_stages.install(monkeypatch)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def test_interpolation_overrides_and_number_forms(tmp_path: Path) -> None:
    data = load_yaml(
        write(tmp_path, PIPELINE), ["output_dir=/x", "stages.second.steps=7", "vars.words=[1, two]"]
    )
    assert data["stages"]["second"]["upstream"] == "/x/demo/first"
    assert data["stages"]["first"]["trainer"]["learning_rate"] == 0.001
    assert data["stages"]["second"]["steps"] == 7
    assert data["stages"]["first"]["text"] == [1, "two"]


def test_overrides_merge_blocks_index_lists_and_may_interpolate(tmp_path: Path) -> None:
    path = write(tmp_path, "a: {x: 1, y: 2}\nl: [{k: 1}, {k: 2}]\n")
    data = load_yaml(path, ["a.x=5", "l.1.k=9", "z=${a.x}", "empty=", "none=null"])
    assert data == {"a": {"x": 5, "y": 2}, "l": [{"k": 1}, {"k": 9}], "z": 5, "empty": "", "none": None}


def test_pipeline_is_ordered_by_inputs_and_seeded(tmp_path: Path) -> None:
    pipeline = load_pipeline(write(tmp_path, PIPELINE), ["seed=5", "stages.first.seed=9"])
    assert list(pipeline.stages) == ["first", "second"]
    assert pipeline.depends == {"second": ["first"], "first": []}
    assert [block.config.seed for block in pipeline.stages.values()] == [9, 5]
    assert pipeline.stages["first"].config.trainer.betas == (0.9, 0.99)


def test_unknown_key_names_file_line_path_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE.replace("learning_rate", "learning_rat"))
    assert problems(path) == [
        f"{path}:13: stages.first.trainer.learning_rat: unknown key 'learning_rat'\n"
        "    did you mean 'learning_rate'?"
    ]


def test_misspelt_required_key_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE.replace("    text: b", "    txt: b"))
    assert problems(path) == [f"{path}:7: stages.second.txt: unknown key 'txt'\n    did you mean 'text'?"]


def test_missing_key_points_at_its_block(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE.replace("    text: b\n", ""))
    assert problems(path) == [
        f"{path}:5: stages.second.text: required key is missing\n    text: What to write."
    ]


def test_all_mistakes_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: demo\nsed: 1\nstages:\n"
        "  a: {stage: toy, text: 3, upstream: '${stage:bb}', shape: {kind: large, width: 2}}\n"
        "  b: {stage: toyy, text: x}\n"
        "  c: {text: x}\n"
        "  d: {stage: toy, text: x, trainer: {learning_rate: 5.0}, others: [{betas: [1.0]}]}\n"
        "  e: {stage: toy, text: x, trainer: {learning_rate: 5.0}}\n",
    )
    found = problems(path)
    expected = [
        "2: sed: unknown key 'sed'\n    did you mean 'seed'?",
        "4: stages.a.text: must be a valid string (got 3)",
        "4: stages.a.shape.width: unknown key 'width'\n    valid here: height, kind",
        "5: stages.b.stage: unknown stage 'toyy'; did you mean 'toy'?",
        "6: stages.c: no `stage` key",
        "7: stages.d.others.0.betas.1: required key is missing",
        "4: stages.a.upstream: there is no stage 'bb'\n    did you mean 'b'?",
        "8: stages.e.trainer.learning_rate: is above 1\n    lower it",
    ]
    assert len(found) == len(expected), "\n".join(found)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(f"{path}:{start}"), (text, start)


def test_hooks_run_on_demand_only(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE)
    load_pipeline(path, ["stages.first.trainer.learning_rate=5.0"])
    with pytest.raises(ConfigError, match=r"override stages.first.trainer.learning_rate=5.0: .* is above 1"):
        load_pipeline(path, ["stages.first.trainer.learning_rate=5.0"], run_checks=True)


@pytest.mark.parametrize("value", ["'3'", "true", "3.5"])
def test_types_are_strict(tmp_path: Path, value: str) -> None:
    assert "must be a valid integer" in problems(write(tmp_path, PIPELINE), f"stages.first.steps={value}")[0]


def test_cycle_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE)
    found = problems(path, "stages.first.upstream=${stage:second}")
    assert [text for text in found if "need each other" in text and "second -> first -> second" in text]


@pytest.mark.parametrize("override", ["nonsense", "=3", "a b=3", "a..b=3", "stages.first.steps=[1"])
def test_bad_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        load_yaml(write(tmp_path, PIPELINE), [override])
    assert override in str(caught.value)


def test_yaml_that_cannot_be_parsed_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: demo\nstages:\n  a: {stage: toy\n  b: 1\n")
    with pytest.raises(ConfigError, match=r"pipe.yaml:4: is not valid YAML"):
        load_yaml(path)


def test_duplicate_keys_are_an_error_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "name: demo\nstages:\n  a: {stage: toy}\n  a: {stage: toy}\n")
    with pytest.raises(ConfigError, match=r"pipe.yaml:4: stages.a: key 'a' is already set on line 3"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n", "must hold `key: value`"),
        ("a: ${nothing.here}\n", "pipe.yaml:1: a: "),
    ],
)
def test_other_unusable_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path, text))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, PIPELINE)
    with pytest.raises(UserError, match=r"pip.yaml: no such file\n    did you mean .*/pipe.yaml"):
        load_yaml(path.with_name("pip.yaml"))


def test_stage_interpolation_outside_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only works in a pipeline"):
        load_yaml(write(tmp_path, "upstream: ${stage:a}\n"))


def test_stage_file(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("stage: toy\nrun_dir: here\nvars: {w: 3}\nsteps: ${vars.w}\ntext: x\n")
    block = load_stage_file("toy", path, ["text=y"])
    assert isinstance(block.config, ToyConfig)
    assert (block.config.text, block.config.steps, block.run_dir) == ("y", 3, Path("here"))
    assert load_stage_file("toy", path, [], tmp_path / "o").run_dir == tmp_path / "o"
    assert load_stage_file("toy", None, ["text=y"]).run_dir == Path("runs/toy")
    with pytest.raises(ConfigError, match=r"one.yaml:1: stage: this file is for 'toy'"):
        load_stage_file("sft", path)
    with pytest.raises(ConfigError, match="is a pipeline, not a toy configuration"):
        load_stage_file("toy", write(tmp_path, PIPELINE))


def test_references_are_found_wherever_they_stand() -> None:
    config = ToyConfig(text="x", file="f", upstream=["r1", "r2"], models={"sft": "m"})
    found = [(reference.field, reference.kind, reference.value) for reference in find_references(config)]
    assert found == [
        ("file", "file", "f"),
        ("upstream.0", "run", "r1"),
        ("upstream.1", "run", "r2"),
        ("models.sft", "model", "m"),
    ]
    assert find_references(ToyConfig(text="runs/x")) == []
