"""The `rewards:` block: what it refuses, which inputs it names, and how it finds Python functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from posttrain.config import StageConfig, find_references
from posttrain.errors import ConfigError
from train.ppo.reward_config import RewardsConfig, check_functions, load_function

GOLD = "data_prep.tiny.rubric:reward"


class Stage(StageConfig):
    rewards: RewardsConfig = Field(RewardsConfig(), description="Rewards.")


def test_the_default_is_the_reward_model_and_nothing_else() -> None:
    config = RewardsConfig()
    assert (config.model_weight, config.functions, config.normalise) == (1.0, [], "none")
    assert (config.length_penalty, config.repetition_penalty, config.ensemble) == (None, None, None)


def test_a_function_is_called_by_its_own_name_unless_it_is_given_one() -> None:
    config = RewardsConfig(functions=[{"function": GOLD}, {"function": GOLD, "name": "gold", "weight": 0.0}])
    assert [item.label for item in config.functions] == ["reward", "gold"]


@pytest.mark.parametrize(
    "functions",
    [
        [{"function": GOLD}, {"function": "my.rewards:reward"}],
        [{"function": GOLD, "name": "model"}],
        [{"function": GOLD, "name": "length_penalty"}],
    ],
)
def test_two_rewards_of_one_name_are_refused(functions: list[dict]) -> None:
    with pytest.raises(ValueError, match="two rewards are called '(reward|model|length_penalty)'"):
        RewardsConfig(functions=functions)


def test_something_must_be_trained_on() -> None:
    watched = {"functions": [{"function": GOLD, "weight": 0.0}], "repetition_penalty": {"weight": 0.0}}
    with pytest.raises(ValueError, match="nothing to train on"):
        RewardsConfig(model_weight=0.0, **watched)
    RewardsConfig(**watched)
    RewardsConfig(model_weight=0.0, functions=[{"function": GOLD, "weight": -0.5}])
    RewardsConfig(model_weight=0.0, length_penalty={"per_token": 0.1})


@pytest.mark.parametrize("target", ["rubric", "my/rubric.py:reward", "a:b:c", ".rubric:reward", "a:"])
def test_a_function_is_module_colon_name(target: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        RewardsConfig(functions=[{"function": target}])


def test_ensemble_models_are_inputs_that_bring_their_tokenizers() -> None:
    config = Stage(rewards={"ensemble": {"models": ["runs/a", "org/b"], "combine": "min"}})
    found = [(r.field, r.kind, r.value, r.own_tokenizer) for r in find_references(config)]
    assert found == [
        ("rewards.ensemble.models.0", "model", "runs/a", True),
        ("rewards.ensemble.models.1", "model", "org/b", True),
    ]
    with pytest.raises(ValueError, match="at least 1"):
        Stage(rewards={"ensemble": {"models": []}})


def test_the_block_and_its_check_import_no_torch() -> None:
    code = (
        "import sys; from train.ppo.reward_config import *; "
        f"assert not check_functions(RewardsConfig(functions=[{{'function': '{GOLD}'}}]), 'rewards'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_in_cwd.py").write_text("def short(completions):\n    return [0.0]\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_function("rewards_in_cwd:short", "x")
    monkeypatch.chdir(tmp_path)
    assert load_function("rewards_in_cwd:short", "x")(completions=[]) == [0.0]


def test_what_is_wrong_with_a_function_is_said_with_field_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_half.py").write_text(
        "from math import sqrt\nTABLE = {}\ndef polite(**_): ...\ndef _hidden(): ...\n"
    )
    (tmp_path / "rewards_broken.py").write_text("def polite(:\n")
    (tmp_path / "rewards_needy.py").write_text("import no_such_package_here\n")
    (tmp_path / "rewards_rash.py").write_text("LIMIT = {}['limit']\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ["rewards_half:polite", "rewards_half:plite", "rewards_half:TABLE", "no_such_module:f"]
    names += ["rewards_broken:polite", "rewards_needy:f", "rewards_rash:f"]
    config = RewardsConfig(functions=[{"function": name, "name": f"f{i}"} for i, name in enumerate(names)])
    problems = check_functions(config, "stages.ppo.rewards")
    assert [problem.where for problem in problems] == [
        f"stages.ppo.rewards.functions.{index}.function" for index in range(1, 7)
    ]
    texts = [str(problem) for problem in problems]
    assert "'rewards_half:plite': the module rewards_half defines no plite" in texts[0]
    assert texts[0].endswith("it defines: _hidden, polite")
    assert "TABLE is of type dict, not a function" in texts[1]
    assert "No module named 'no_such_module'" in texts[2]
    assert "PYTHONPATH" in texts[2]
    assert "rewards_broken.py, line 1" in texts[3]
    assert "No module named 'no_such_package_here'" in texts[4]
    assert "rewards_rash cannot be imported (KeyError: 'limit')" in texts[5]
    assert texts[5].endswith("try `python -c 'import rewards_rash'`")
    with pytest.raises(ConfigError, match="rewards.functions.0.function") as caught:
        load_function("rewards_half:plite", "rewards.functions.0.function")
    assert caught.value.exit_code == 2
