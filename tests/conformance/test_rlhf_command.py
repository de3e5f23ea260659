"""`posttrain conformance`: passes on a sound model, and on a broken one exits 1 and says what is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from posttrain.cli import app
from train.ppo import conformance_invariants, conformance_updates
from train.ppo.conformance import check_model

NAMES = {invariant.name for invariant in conformance_invariants.INVARIANTS}
MERGED = "the merged model equals model and adapter"
NEED_A_REWARD_MODEL = {"batch mates do not change values", "batch mates do not change scores"}
LOGPROBS = "batch mates do not change log-probabilities"


def command(*arguments: str | Path) -> tuple[int, Any]:
    """Exit code and JSON of the command."""
    result = CliRunner().invoke(app, ["conformance", *map(str, arguments), "--device", "cpu", "--json"])
    return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr


def failing(report: Any) -> set[str]:
    return {row["invariant"] for row in report["invariants"] if not row["passed"]}


@pytest.fixture(scope="session")
def adapted_reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A reward model that is LoRA and a score head on the tiny model."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear", modules_to_save=["score"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
    directory = tmp_path_factory.mktemp("adapted") / "reward"
    model.save_pretrained(str(directory))
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_passes_in_every_layout(
    tiny_model_dir: Path, tiny_reward_dir: Path, adapted_reward_dir: Path, dtype: str
) -> None:
    cases: list[tuple[list[Any], str, set[str]]] = [
        ([], "full", {MERGED, *NEED_A_REWARD_MODEL}),
        (["--reward", tiny_reward_dir], "full", {MERGED}),
        (["--reward", adapted_reward_dir, "--peft", "4"], "shared", set()),
    ]
    for arguments, layout, missing in cases:
        code, report = command("--model", tiny_model_dir, "--dtype", dtype, *arguments)
        assert (code, failing(report)) == (0, set())
        assert report["layout"].split()[0] == layout
        assert {row["invariant"] for row in report["invariants"]} == NAMES - missing


def test_an_adapter_is_continued(tmp_path: Path, tiny_model_dir: Path) -> None:
    """An SFT adapter as the model: the reference is a frozen copy of it, and the policy goes on from it."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
    model.save_pretrained(str(tmp_path / "sft"))
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "sft")
    code, report = command("--model", tmp_path / "sft", "--peft", "4")
    assert (code, failing(report)) == (0, set())
    code, message = command("--model", tmp_path / "sft", "--peft", "8")
    assert code == 2
    assert "give --peft 4" in message


def test_the_table_names_model_and_result(tiny_model_dir: Path) -> None:
    done = CliRunner().invoke(app, ["conformance", "--model", str(tiny_model_dir), "--device", "cpu"])
    assert done.exit_code == 0
    assert "the first ratio is exactly 1" in done.stdout
    assert "all 16 invariants hold" in done.stdout


def mix_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalisation over the batch, as a layer with batch statistics does it."""
    inner = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: inner(self, x) + 0.3 * x.mean((0, 1), True)
    )


def leave_dropout_on(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: functional.dropout(inner(self, x), 0.1, True)
    )


def see_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over all positions, where the tokens come in one call."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    inner = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        self.is_causal = False
        return inner(self, *arguments, **options)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def ignore_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute positions counted from the left edge, padding included."""
    inner = modeling_llama.LlamaModel.forward

    def forward(self: Any, *arguments: Any, position_ids: Any = None, **options: Any) -> Any:
        ids = options["input_ids"]
        past = options.get("past_key_values")
        start = past.get_seq_length() if past is not None else 0
        hidden = inner(self, *arguments, position_ids=position_ids, **options)
        columns = torch.arange(start, start + ids.shape[1], device=ids.device)
        hidden.last_hidden_state = hidden.last_hidden_state + 0.1 * torch.sin(columns)[None, :, None]
        return hidden

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


def forget_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets: what was read in an earlier call is halved."""
    inner = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length(self.layer_idx):
            layer = cache.layers[self.layer_idx]
            layer.storage[1].mul_(0.5)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (mix_rows, {LOGPROBS, "batch mates do not change values", "batch mates do not change scores"}),
        (leave_dropout_on, {"the same input gives the same output", "the first ratio is exactly 1"}),
        (see_the_future, {"later tokens do not change earlier ones", LOGPROBS}),
        (ignore_positions, {"padding on the left changes nothing"}),
        (forget_half, {"rollout log-probabilities equal the trainer's"}),
    ],
)
def test_a_broken_model_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_dir: Path,
    tiny_reward_dir: Path,
    break_it: Any,
    named: set[str],
) -> None:
    break_it(monkeypatch)
    code, report = command("--model", tiny_model_dir, "--reward", tiny_reward_dir)
    assert code == 1
    assert named <= failing(report)


def test_a_checkpoint_that_forgets_the_optimizer_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    inner = conformance_updates.load_checkpoint

    def forgetful(*arguments: Any) -> Any:
        state = inner(*arguments)
        state["updater"]["policy"]["state"] = {}
        return state

    monkeypatch.setattr(conformance_updates, "load_checkpoint", forgetful)
    code, report = command("--model", tiny_model_dir, "--peft", "4")
    assert (code, failing(report)) == (1, {"a resumed run equals an uninterrupted one"})


def edited(source: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model directory with other settings of the tokenizer."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    cases: list[tuple[dict[str, str], str]] = [
        ({"pad_token": "<|im_end|>"}, "pad token and end token are two"),
        ({"eos_token": "<|im_start|>"}, "the template ends an answer with the end token"),
    ]
    for index, (settings, name) in enumerate(cases):
        model = edited(tiny_model_dir, tmp_path / str(index), **settings)
        code, report = command("--model", model)
        assert (code, failing(report)) == (1, {name})


def test_a_failure_says_what_it_means(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = edited(tiny_model_dir, tmp_path / "model", pad_token="<|im_end|>")
    done = CliRunner().invoke(app, ["conformance", "--model", str(model), "--device", "cpu"])
    assert done.exit_code == 1
    assert "FAIL pad token and end token are two" in done.stdout
    assert "never learns to stop" in " ".join(done.stdout.split())


def test_bad_input_exits_2(tmp_path: Path, tiny_model_dir: Path, tiny_reward_dir: Path) -> None:
    foreign = edited(tiny_reward_dir, tmp_path / "reward", eos_token="<|im_start|>")
    cases = {
        str(tmp_path / "absent"): ["--model", str(tmp_path / "absent")],
        "--dtype int8": ["--model", str(tiny_model_dir), "--dtype", "int8"],
        "--device tpu": ["--model", str(tiny_model_dir), "--device", "tpu"],
        "tokenizer or chat template of its own": ["--model", str(tiny_model_dir), "--reward", str(foreign)],
        "no score head": ["--model", str(tiny_model_dir), "--reward", str(tiny_model_dir)],
    }
    for message, arguments in cases.items():
        done = CliRunner().invoke(app, ["conformance", *arguments])
        assert done.exit_code == 2, message
        assert message in done.stderr


def test_a_number_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    inner = modeling_llama.LlamaMLP.forward

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return inner(self, hidden) + (float("nan") if torch.is_grad_enabled() else 0.0)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    report = check_model(str(tiny_model_dir), device="cpu")
    values = {row["invariant"]: row["deviation"] for row in report.as_json()["invariants"]}
    assert values["the first ratio is exactly 1"] == "nan"
    assert not report.passed
