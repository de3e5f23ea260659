"""`posttrain gate`: what passes, what fails and why, what is missing, and what it says to a CI server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from eval_runs import finish_again, write_eval_run
from typer.testing import CliRunner

from posttrain.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs old, new (0.005 lower on every prompt) and noisy (equal on average, far off per prompt)."""
    directory = tmp_path_factory.mktemp("gates")
    gold = np.random.default_rng(1).uniform(0.4, 0.9, 60)
    noise = np.where(np.arange(60) % 2, 0.3, -0.3)
    write_eval_run(directory / "old", {"ppo": gold})
    write_eval_run(directory / "new", {"ppo": gold - 0.005})
    write_eval_run(directory / "noisy", {"ppo": gold + noise})
    return directory


def invoke(place: Path, gates: list[dict[str, Any]], *arguments: str, run: str = "new") -> Any:
    file = place / "gates.yaml"
    file.write_text(yaml.safe_dump({"run": str(place / run), "gates": gates}))
    return CliRunner().invoke(app, ["gate", str(file), *arguments])


def not_worse(place: Path, by: float, **more: Any) -> dict[str, Any]:
    return {"metric": "models.ppo.gold", "not_worse_than": {"run": str(place / "old"), "by": by}} | more


def test_every_gate_is_reported_and_one_that_fails_fails_all(place: Path) -> None:
    gates = [
        {"metric": "models.ppo.gold", "min": 0.5, "name": "good enough"},
        {"metric": "models.ppo.gold", "min": 0.99, "name": "excellent"},
        {"metric": "gold/ppo", "max": 0.1, "name": "by the manifest"},
    ]
    result = invoke(place, gates, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [gate["status"] for gate in report["gates"]] == ["passed", "failed", "failed"]
    assert "has to be at least 0.99" in report["gates"][1]["reason"]
    assert not report["passed"]
    assert invoke(place, gates[:1]).exit_code == 0


def test_the_end_of_an_interval_is_stricter_than_its_middle(place: Path) -> None:
    value = json.loads((place / "new" / "eval.json").read_text())["models"]["ppo"]["gold"]
    between = (value["low"] + value["value"]) / 2
    assert invoke(place, [{"metric": "models.ppo.gold", "min": between}]).exit_code == 0
    assert invoke(place, [{"metric": "models.ppo.gold", "min": between, "end": "low"}]).exit_code == 1


def test_not_worse_means_that_the_paired_interval_says_so(place: Path) -> None:
    """A constant loss of 0.005 is within 0.01 and not within 0.001; noise without a loss proves nothing."""
    assert invoke(place, [not_worse(place, 0.01)]).exit_code == 0
    assert invoke(place, [not_worse(place, 0.001)]).exit_code == 1
    assert invoke(place, [not_worse(place, 0.01)], run="noisy").exit_code == 1
    assert invoke(place, [not_worse(place, 0.001, lower_is_better=True)]).exit_code == 0


def test_a_missing_figure_is_neither_a_pass_nor_a_fail(place: Path) -> None:
    gates = [
        {"metric": "models.ppo.golt", "min": 0.1},
        {"metric": "models.ppo.gold", "min": 0.99},
        {"metric": "models.ppo.perplexity.text.perplexity", "max": 20, "end": "high"},
        {"metric": "models.ppo.perplexity", "not_worse_than": {"run": str(place / "old")}},
        {"metric": "models.ppo.gold", "min": 0.1, "run": str(place / "nowhere")},
    ]
    result = invoke(place, gates, "--json", "--junit", str(place / "gates.xml"))
    assert result.exit_code == 2
    outcomes = json.loads(result.stdout)["gates"]
    assert [gate["status"] for gate in outcomes] == ["missing", "failed", "missing", "missing", "missing"]
    assert "did you mean models.ppo.gold" in outcomes[0]["reason"]
    assert "has no interval" in outcomes[2]["reason"]
    suite = ElementTree.parse(place / "gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "1", "4")
    assert [child.tag for case in suite for child in case] == ["error", "failure", "error", "error", "error"]


def test_what_is_wrong_with_the_file_is_said_with_its_line(place: Path) -> None:
    gates = [
        {"metric": "models.ppo.gold", "minimum": 1},
        {"metric": "models.ppo.gold", "min": "high"},
    ]
    result = invoke(place, gates)
    assert result.exit_code == 2
    result = invoke(place, [{"metric": "models.ppo.gold"}, {"metric": "x", "min": 2, "max": 1}])
    assert result.exit_code == 2
    from eval.gate.config import load_gates
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        load_gates(place / "gates.yaml")
    assert "gates.yaml:2: gates.0: can never fail" in str(error.value)
    assert "gates.1.min: is over max (2 > 1)" in str(error.value)


def test_settings_can_be_replaced_on_the_command_line(place: Path) -> None:
    gates = [not_worse(place, 0.001)]
    assert invoke(place, gates).exit_code == 1
    assert invoke(place, gates, f"run={place / 'old'}").exit_code == 0


def test_bounds_that_nothing_can_break_are_mistakes(place: Path) -> None:
    infinite = float("inf")
    for gate in (
        {"metric": "models.ppo.gold", "max": infinite},
        {"metric": "models.ppo.gold", "min": -infinite},
        {"metric": "models.ppo.gold", "min": float("nan")},
        {"metric": "models.ppo.gold", "min": True},
        not_worse(place, infinite),
        not_worse(place, float("nan")),
    ):
        assert invoke(place, [gate]).exit_code == 2, gate


def test_a_figure_that_is_no_number_does_not_pass(place: Path) -> None:
    """NaN, infinite, null or a word: missing, for a bound on either side."""
    for value in (float("nan"), float("inf"), None, "good"):
        run = place / "odd"
        shutil.copytree(place / "new", run)
        results = json.loads((run / "eval.json").read_text())
        results["models"]["ppo"]["gold"] = value
        (run / "eval.json").write_text(json.dumps(results))
        finish_again(run)
        for bound in ({"min": -1e9}, {"max": 1e9}):
            result = invoke(place, [{"metric": "models.ppo.gold"} | bound], "--json", run="odd")
            assert result.exit_code == 2, value
            assert json.loads(result.stdout)["gates"][0]["status"] == "missing"
        shutil.rmtree(run)


def test_a_handful_of_prompts_proves_nothing(tmp_path: Path) -> None:
    """One prompt has an interval without width; a gate on it would pass whatever it says of others."""
    for count, code in ((1, 2), (9, 2), (10, 0)):
        directory = tmp_path / str(count)
        for name in ("old", "new"):
            write_eval_run(directory / name, {"ppo": [0.5] * count})
        assert invoke(directory, [not_worse(directory, 0.0)]).exit_code == code, count


def test_names_of_models_may_hold_dots(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_eval_run(tmp_path / name, {"llama-3.1": [0.5] * 20, "llama-3": [0.9] * 20})
    gate = {"metric": "models.llama-3.1.gold", "not_worse_than": {"run": str(tmp_path / "old")}}
    parts = {"metric": "models.llama-3.1.gold_parts.polite", "not_worse_than": {"run": str(tmp_path / "old")}}
    bound = {"metric": "models.llama-3.1.gold", "max": 0.6}
    assert invoke(tmp_path, [gate, parts, bound]).exit_code == 0


def test_junit_is_xml_whatever_the_names_hold(place: Path) -> None:
    gates = [{"metric": "models.ppo.gold", "min": 0.99, "name": "a\x1b[31m <b> & \x00 日本"}]
    assert invoke(place, gates, "--junit", str(place / "gates.xml")).exit_code == 1
    assert ElementTree.parse(place / "gates.xml").getroot()[0].get("name") == "a?[31m <b> & ? 日本"
