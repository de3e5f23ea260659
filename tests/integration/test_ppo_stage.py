"""The ppo stage in a run directory: exact outputs, resume after a kill, and what it says to the user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_rewards import later_is_worse
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from posttrain.errors import DataError, PosttrainError, UserError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.rundir import append_rows, truncate_rows
from posttrain.stage import execute_stage
from train.ppo import held_out
from train.ppo.config import PpoStageConfig

LORA = {"r": 4, "lora_alpha": 8}
Settings = Callable[..., PpoStageConfig]


@pytest.fixture
def settings(tiny_model_dir: Path, tiny_reward_dir: Path, prompt_data: Path) -> Settings:
    def make(**overrides: Any) -> PpoStageConfig:
        values = {
            "model": str(tiny_model_dir),
            "reward": str(tiny_reward_dir),
            "data": str(prompt_data),
            "total_episodes": 24,
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_prompt_tokens": 128,
            "max_new_tokens": 6,
            "num_ppo_epochs": 2,
            "learning_rate": 1e-3,
            "save_every": 2,
            "log_samples_every": 2,
            "peft": LORA,
        }
        return PpoStageConfig(**(values | overrides))

    return make


@pytest.fixture(scope="session")
def adapter_reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A reward model that is a LoRA adapter with a score head on the policy's base."""
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    settings = LoraConfig(
        task_type="SEQ_CLS",
        target_modules="all-linear",
        modules_to_save=["score"],
        init_lora_weights=False,
        **LORA,
    )
    adapted = get_peft_model(base, settings)
    directory = tmp_path_factory.mktemp("adapters") / "reward"
    adapted.save_pretrained(directory)
    load_tokenizer(tiny_model_dir).save_pretrained(directory)
    (directory / "reward_calibration.json").write_text('{"bias": 0.25, "n": 8}')
    return directory


def rows_without_times(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds", "tokens_per_second", "mfu")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def run_child(program: str, config: PpoStageConfig, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """`program` in a process of its own, with the configuration as JSON and the run directory as
    arguments."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", program, config.model_dump_json(), str(run_dir)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_lora_run_writes_an_adapter_on_the_sft_model(
    tmp_path: Path, settings: Settings, tiny_model_dir: Path
) -> None:
    run_dir = tmp_path / "ppo"
    result = execute_stage("ppo", settings(), run_dir)
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    adapter = json.loads((run_dir / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert adapter["task_type"] == "CAUSAL_LM"
    generation = json.loads((run_dir / "model" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(run_dir / "model")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    tuned, base = load_causal_lm(run_dir / "model"), load_causal_lm(tiny_model_dir)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert (tuned(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-4

    metrics = result.manifest["metrics"]
    assert metrics["updates"] == 6
    assert metrics["episodes"] == 24
    assert metrics["prompts"] == 48
    assert metrics["prompts_dropped"] == 0
    assert [row["step"] for row in rows_without_times(run_dir)] == [1, 2, 3, 4, 5, 6]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2] * 4 + [4] * 4 + [6] * 4
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_shared_layout_gives_the_rewards_of_the_merged_reward_model(
    tmp_path: Path, settings: Settings, adapter_reward_dir: Path
) -> None:
    """The first rollout is the same policy's in both layouts, so its scores must agree; the adapter is saved
    at the top of model/.
    """
    rows = {}
    for layout in ("full", "shared"):
        config = settings(reward=str(adapter_reward_dir), layout=layout, total_episodes=8)
        result = execute_stage("ppo", config, tmp_path / layout)
        assert result.manifest["metrics"]["layout"] == layout
        rows[layout] = rows_without_times(tmp_path / layout)
    for name in ("score", "values", "kl", "entropy", "explained_variance"):
        assert rows["shared"][0][name] == pytest.approx(rows["full"][0][name], abs=1e-4)
    assert (tmp_path / "shared" / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "shared" / "model" / "value").exists()
    load_causal_lm(tmp_path / "shared" / "model")


def test_auto_layout_says_why_it_does_not_share(
    tmp_path: Path, settings: Settings, adapter_reward_dir: Path
) -> None:
    """The fixture's reward model is a full model; an adapter on the policy's base is shared."""
    apart = execute_stage("ppo", settings(total_episodes=4), tmp_path / "apart")
    assert apart.manifest["metrics"]["layout"] == "full"
    together = execute_stage(
        "ppo", settings(total_episodes=4, reward=str(adapter_reward_dir)), tmp_path / "together"
    )
    assert together.manifest["metrics"]["layout"] == "shared"
    with pytest.raises(
        UserError, match=r"layout: shared is not possible: the reward model .* is a full model"
    ):
        execute_stage("ppo", settings(layout="shared"), tmp_path / "refused")


def test_an_unmerged_sft_adapter_is_continued_and_is_the_reference(
    tmp_path: Path, settings: Settings, tiny_model_dir: Path, adapter_reward_dir: Path
) -> None:
    """KL is 0 at the start, although the policy differs from the base; the saved adapter is on the base."""
    torch.manual_seed(4)
    sft = get_peft_model(
        load_causal_lm(tiny_model_dir),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **LORA),
    )
    sft.peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
    sft.save_pretrained(tmp_path / "sft")
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / "sft")
    common = {"model": str(tmp_path / "sft"), "reward": str(adapter_reward_dir), "total_episodes": 8}
    execute_stage("ppo", settings(**common), tmp_path / "ppo")
    first, second = rows_without_times(tmp_path / "ppo")
    assert first["kl"] == 0.0
    assert second["kl"] != 0.0
    saved = json.loads((tmp_path / "ppo" / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    before, after = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "sft", tmp_path / "ppo" / "model")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert max((before[name] - after[name]).abs().max() for name in before) < 0.1, "it was continued"
    with pytest.raises(UserError, match=r"peft asks for r 8 \(the adapter has 4\)"):
        execute_stage("ppo", settings(**common | {"peft": {"r": 8, "lora_alpha": 8}}), tmp_path / "other")


def test_the_best_held_out_policy_is_the_one_saved(tmp_path: Path, settings: Settings) -> None:
    """A learning rate that wrecks the policy: the first evaluation is the best, and its weights are kept."""
    config = settings(
        held_out={"every": 1, "num_prompts": 4},
        keep="best",
        total_episodes=12,
        learning_rate=3e-3,
        rewards={"functions": [{"function": "ppo_rewards:later_is_worse", "weight": 100.0}]},
    )
    later_is_worse.calls = 0
    result = execute_stage("ppo", config, tmp_path / "ppo")
    rows = rows_without_times(tmp_path / "ppo")
    scores = [row["held_out_score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert result.manifest["metrics"]["kept_update"] == 1
    kept = load_file(tmp_path / "ppo" / "model" / "adapter_model.safetensors")
    stopped = execute_stage(
        "ppo",
        config.model_copy(update={"total_episodes": 4, "lr_scheduler_type": "constant"}),
        tmp_path / "one",
    )
    assert stopped.status == "completed"
    constant = execute_stage(
        "ppo", config.model_copy(update={"lr_scheduler_type": "constant"}), tmp_path / "three"
    )
    assert constant.manifest["metrics"]["kept_update"] == 1
    one, three = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "three")
    )
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert kept.keys() == one.keys()


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(
    tmp_path: Path, settings: Settings
) -> None:
    config = settings(save_every=100)
    execute_stage("ppo", config, tmp_path / "whole")
    program = (
        "import os, signal, sys, pathlib\n"
        "from posttrain.errors import PosttrainError\n"
        "from posttrain.stage import execute_stage\n"
        "from train.ppo.config import PpoStageConfig\n"
        "from train.ppo.update import PpoUpdate\n"
        "run = PpoUpdate.run\n"
        "def preempted(self, experience, step, kl_coef):\n"
        "    if step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return run(self, experience, step, kl_coef)\n"
        "PpoUpdate.run = preempted\n"
        "try:\n"
        "    execute_stage('ppo', PpoStageConfig.model_validate_json(sys.argv[1]), "
        "pathlib.Path(sys.argv[2]))\n"
        "except PosttrainError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    child = run_child(program, config, tmp_path / "stopped")
    assert child.returncode == 75, child.stderr[-2000:]
    assert "stopped at update 3 of 6" in child.stderr
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-3"]
    assert execute_stage("ppo", config, tmp_path / "stopped").status == "completed"
    assert rows_without_times(tmp_path / "stopped") == rows_without_times(tmp_path / "whole")
    ours, theirs = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("stopped", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_lines_are_kept_whatever_a_response_holds(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for Python's splitlines, and a policy may sample them."""
    file = tmp_path / "samples.jsonl"
    append_rows(file, [{"step": step, "response": "a\u2028b\u0085c"} for step in (1, 2, 3)])
    with open(file, "a") as open_file:
        open_file.write('{"step": 4, "respon')
    truncate_rows(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().split("\n") if line] == [1, 2]


def test_sampling_settings_that_transformers_will_not_write_are_mended(
    tmp_path: Path, settings: Settings, tiny_model_dir: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}'
    )
    execute_stage("ppo", settings(model=str(model), total_episodes=4, peft=None), tmp_path / "ppo")
    saved = json.loads((tmp_path / "ppo" / "model" / "generation_config.json").read_text())
    assert saved["do_sample"] is True
    stops = saved["eos_token_id"]
    eos = load_tokenizer(model).eos_token_id
    assert eos in (stops if isinstance(stops, list) else [stops])


def test_a_nan_leaves_the_batch_it_came_with(
    tmp_path: Path, settings: Settings, tiny_model_dir: Path
) -> None:
    """A reward model whose head is NaN: the run stops before the weights do, and says what to look at."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / "reward")
    with pytest.raises(
        PosttrainError, match=r"update 1: 4 of 4 entries of the reward scores are not finite"
    ) as error:
        execute_stage("ppo", settings(reward=str(tmp_path / "reward")), tmp_path / "ppo")
    file = tmp_path / "ppo" / "offending_batch.pt"
    assert str(file) in str(error.value)
    saved = torch.load(file, weights_only=True)
    assert saved["update"] == 1
    assert len(saved["prompts"]) == len(saved["responses"]) == len(saved["scores"]) == 4


def test_a_nan_in_an_evaluation_leaves_the_responses_of_the_evaluation(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "shape_scores", lambda scores_B, *_: scores_B * float("nan"))
    config = settings(held_out={"every": 1, "num_prompts": 3})
    with pytest.raises(PosttrainError, match=r"update 1: 3 of 3 entries of the held-out scores"):
        execute_stage("ppo", config, tmp_path / "ppo")
    saved = torch.load(tmp_path / "ppo" / "offending_batch.pt", weights_only=True)
    assert saved["update"] == 1
    assert len(saved["prompts"]) == len(saved["responses"]) == len(saved["scores"]) == 3


def test_functions_alone_can_be_the_reward(tmp_path: Path, settings: Settings) -> None:
    """No reward model: the value head starts at zero; a source of weight 0 is logged and not trained on."""
    functions = [
        {"function": "ppo_rewards:short"},
        {"function": "ppo_rewards:later_is_worse", "weight": 0.0, "name": "gold"},
    ]
    config = settings(
        reward=None, rewards={"functions": functions}, layout="full", value="head", total_episodes=8
    )
    execute_stage("ppo", config, tmp_path / "ppo")
    first, _ = rows_without_times(tmp_path / "ppo")
    assert first["values"] == 0.0
    assert first["score"] == pytest.approx(first["reward/short"])
    assert "reward/gold" in first
    assert "reward/model" not in first


def test_full_run_writes_a_model(tmp_path: Path, settings: Settings, tiny_model_dir: Path) -> None:
    run_dir = tmp_path / "ppo"
    execute_stage("ppo", settings(peft=None, total_episodes=4), run_dir)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, run_dir / "model"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2


@pytest.mark.parametrize("layout", ["full", "shared"])
def test_killed_run_resumes_to_the_same_end(
    tmp_path: Path, settings: Settings, layout: str, adapter_reward_dir: Path
) -> None:
    peft = LORA if layout == "shared" else None
    extra = {"reward": str(adapter_reward_dir)} if layout == "shared" else {}
    # Everything that has a state: running moments, an adaptive coefficient, the best policy so far.
    config = settings(
        peft=peft,
        layout=layout,
        rewards={"normalise": "standardise"},
        kl_controller={"type": "adaptive", "target": 0.1, "horizon": 16},
        held_out={"every": 2, "num_prompts": 3},
        keep="best",
        **extra,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    execute_stage("ppo", config, whole)
    # A child that dies by SIGKILL inside its fourth update, after a metrics row that no checkpoint covers.
    program = (
        "import os, signal, sys, pathlib\n"
        "from posttrain.stage import execute_stage\n"
        "from train.ppo.config import PpoStageConfig\n"
        "from train.ppo.update import PpoUpdate\n"
        "run = PpoUpdate.run\n"
        "def dying(self, experience, step, kl_coef):\n"
        "    if step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, experience, step, kl_coef)\n"
        "PpoUpdate.run = dying\n"
        "config = PpoStageConfig.model_validate_json(sys.argv[1])\n"
        "execute_stage('ppo', config, pathlib.Path(sys.argv[2]))\n"
    )
    child = run_child(program, config, killed)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert [row["step"] for row in rows_without_times(killed)] == [1, 2, 3]
    assert not (killed / "model").exists()
    shutil.copytree(killed / "checkpoints" / "step-2", killed / "checkpoints" / "step-5")
    (killed / "checkpoints" / "step-5" / "COMPLETE").unlink()

    result = execute_stage("ppo", config, killed)
    assert result.status == "completed"
    assert rows_without_times(killed) == rows_without_times(whole)
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    ours, theirs = (load_file(run / "model" / name) for run in (killed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path,
    settings: Settings,
    write_dataset: Callable[..., Path],
    make_rows: dict[str, Callable[..., Any]],
) -> None:
    rows = make_rows["prompt"](6, 0)
    rows[2]["prompt"] = [{"role": "user", "content": "please " * 100}]
    data = write_dataset(tmp_path / "data", "prompt", rows, rows)
    config = settings(data=str(data), total_episodes=4, max_prompt_tokens=64)
    metrics = execute_stage("ppo", config, tmp_path / "ppo").manifest["metrics"]
    assert (metrics["prompts"], metrics["prompts_dropped"]) == (5, 1)


def test_no_prompt_left_is_an_error(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(
        DataError, match=r"all 48 are longer than max_prompt_tokens=3, the shortest has \d+ tokens"
    ):
        execute_stage("ppo", settings(max_prompt_tokens=3), tmp_path / "ppo", preflight=False)


def test_sequences_must_fit_the_models(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(
        UserError, match=r"max_prompt_tokens 250 \+ max_new_tokens 20 = 270 tokens.*at most 256"
    ):
        execute_stage("ppo", settings(max_prompt_tokens=250, max_new_tokens=20), tmp_path / "ppo")


def test_an_adapter_under_a_second_one_is_refused(tmp_path: Path, settings: Settings) -> None:
    first = tmp_path / "first"
    execute_stage("ppo", settings(total_episodes=4), first)
    with pytest.raises(UserError, match="is a LoRA adapter"):
        execute_stage("ppo", settings(model=str(first), total_episodes=4, layout="full"), tmp_path / "second")
    # Full fine-tuning starts from the adapter merged in memory, and KL to it is 0 at first.
    result = execute_stage("ppo", settings(model=str(first), total_episodes=4, peft=None), tmp_path / "third")
    assert result.manifest["metrics"]["kl"] == 0.0
