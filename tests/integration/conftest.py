"""Running one training stage on the two-layer model, and reading what it wrote."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from posttrain.errors import UserError
from serving.embedded import find_environment
from tests.integration import curate_golden

CONFIGS = {
    "pretrain": "train.config:PretrainConfig",
    "sft": "train.config:SftConfig",
    "reward": "train.config:RewardConfig",
    "dpo": "train.config:DpoConfig",
    "kto": "train.config:KtoConfig",
    "orpo": "train.config:OrpoConfig",
    "cpo": "train.config:CpoConfig",
    "grpo": "train.online_config:GrpoConfig",
    "rloo": "train.online_config:RlooConfig",
    "merge": "train.merge_config:MergeConfig",
    "synthesize": "train.synthesis.config:SynthesizeConfig",
}
UNTRAINED = ("merge", "synthesize")
"""Stages without `peft` and `trainer`."""
TRAINER = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_steps": 3,
}
PEFT = {"r": 4, "lora_alpha": 8}


def make_config(kind: str, /, **fields: Any) -> Any:
    """The configuration of a stage. `trainer` is laid over TRAINER, `peft` is PEFT unless given."""
    if kind not in UNTRAINED:
        fields = {"peft": PEFT} | fields
        fields["trainer"] = TRAINER | fields.get("trainer", {})
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    module, name = CONFIGS[kind].split(":")
    return getattr(importlib.import_module(module), name)(**fields)


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., dict[str, Any]]:
    """run_stage(kind, run_dir, **fields) runs the stage for real and returns its metrics; preflight=False as
    with --no-check.
    """
    from posttrain.stage import execute_stage

    def run(kind: str, run_dir: Path, /, preflight: bool = True, **fields: Any) -> dict[str, Any]:
        config = make_config(kind, **fields)
        return execute_stage(kind, config, run_dir, preflight=preflight).manifest["metrics"]

    return run


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def file_names(directory: Path) -> set[str]:
    """Relative names of all files under a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def load_adapter(run_dir: Path) -> dict[str, Any]:
    """Tensors of the adapter in a run directory's model/."""
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def sft_run(
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    conversation_data: Path,
) -> Path:
    """A finished sft run: a LoRA adapter on the tiny model. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data)
    return run_dir


@pytest.fixture(scope="session")
def reward_run(
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    preference_data: Path,
    conversation_data: Path,
) -> Path:
    """A finished reward run, calibrated. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "reward"
    run_stage(
        "reward",
        run_dir,
        model=tiny_model_dir,
        data=preference_data,
        calibration_data=conversation_data,
        trainer={"max_steps": 12},
    )
    return run_dir


def command(*arguments: str | Path) -> Result:
    """Run the posttrain command in this process."""
    from posttrain.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_stage(directory: Path, kind: str, fields: Mapping[str, Any]) -> Path:
    """A stage's YAML file, one line a field, whose run directory is `directory/out`."""
    settings = {"stage": kind, "run_dir": str(directory / "out"), **fields}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if kind not in ("ppo", *UNTRAINED):
        plain = {"peft": PEFT} | plain
        plain["trainer"] = {"max_steps": 2, "per_device_train_batch_size": 4} | plain.get("trainer", {})
    path = directory / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return path


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """refused(kind, key, *texts, **fields): the stage's command exits with 2 before it writes anything, and a
    problem at `key` of its file ("" for the file itself) says all of `texts`. Returns stderr.
    """

    def run(kind: str, key: str, /, *texts: str, **fields: Any) -> str:
        done = command(kind, write_stage(tmp_path, kind, fields))
        assert done.exit_code == 2, done.output
        assert not (tmp_path / "out").exists()
        assert "error: the preflight found" in done.stderr
        assert done.stderr.endswith("nothing was started; --no-check starts without looking\n")
        place = rf"{kind}\.yaml(?::\d+)?: " + (rf"{re.escape(key)}: " if key else "")
        problems = re.findall(place + r"(.*?)(?=\n  \S|\nnothing was started)", done.stderr, re.DOTALL)
        assert any(all(text in problem for text in texts) for problem in problems), done.stderr
        return done.stderr

    return run


@pytest.fixture
def warned(tmp_path: Path) -> Refused:
    """warned(kind, *texts, **fields): `posttrain check` exits with 0, and its stderr holds all of `texts`."""

    def run(kind: str, /, *texts: str, **fields: Any) -> str:
        done = command("check", write_stage(tmp_path, kind, fields))
        assert done.exit_code == 0, done.output
        assert not (tmp_path / "out").exists()
        assert all(text in done.stderr for text in texts), done.stderr
        return done.stderr

    return run


@pytest.fixture
def dataset(tmp_path: Path, write_dataset: Callable[..., Path]) -> Callable[..., Path]:
    """dataset(kind, rows, evaluation): a dataset directory of these rows; evaluation: the first two."""

    def write(kind: str, train: list[dict], evaluation: list[dict] | None = None) -> Path:
        return write_dataset(tmp_path / "data", kind, train, train[:2] if evaluation is None else evaluation)

    return write


@pytest.fixture
def variant(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """variant(old, new, source, **tokens): a copy of a model directory with `old` in its template replaced,
    and these special tokens in its tokenizer (None removes one).
    """

    def make(old: str = "", new: str = "", source: Path = tiny_model_dir, **tokens: str | None) -> Path:
        directory = tmp_path / "variant"
        shutil.copytree(source, directory)
        template = directory / "chat_template.jinja"
        assert old in template.read_text()
        template.write_text(template.read_text().replace(old, new, 1))
        file = directory / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | tokens
        file.write_text(
            json.dumps({name: value for name, value in settings.items() if tokens.get(name, "") is not None})
        )
        return directory

    return make


@pytest.fixture(scope="session")
def untrained_adapter_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A LoRA adapter on the tiny model, as peft begins it."""
    from peft import LoraConfig, get_peft_model

    from posttrain.models import load_causal_lm, load_tokenizer

    directory = tmp_path_factory.mktemp("adapter") / "sft"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **PEFT)
    adapted = get_peft_model(load_causal_lm(tiny_model_dir), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
    adapted.save_pretrained(directory)
    load_tokenizer(tiny_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the preflight takes the machine for: one GPU that does not compute in bfloat16."""
    from train.preflight import ppo, trained
    from train.preflight.machine import Device

    for module in (ppo, trained):
        monkeypatch.setattr(module, "this_device", lambda: Device("cuda", "Tesla T4", False, 1))


def last_turns(count: int) -> list[dict[str, Any]]:
    """Prompts of the support-desk world, the last user turn only so that they fit the tiny model."""
    from data_prep.tiny import world

    return [
        {
            "id": record.id,
            "source": record.source,
            "group": record.group,
            "meta": record.meta,
            "prompt": record.content_columns()["prompt"][-1:],
        }
        for record in world.generate("prompt", count, seed=5)
    ]


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with its weights moved a little: a policy that differs from the baseline. Not to be
    written to.
    """
    import torch

    from posttrain.models import load_causal_lm

    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model_dir, directory)
    model = load_causal_lm(tiny_model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def triton_environment() -> Path | None:
    """Where tritonserver is; None where it was not installed."""
    try:
        return find_environment(str(Path(__file__).parents[2] / ".venv-triton"))
    except UserError:
        return None


@pytest.fixture(scope="session")
def ending_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with EOS where its greedy answers come upon it: two rows of its head swapped."""
    import torch

    from posttrain.models import load_causal_lm, load_tokenizer
    from serving.parity import reference_answer

    directory = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model_dir, directory)
    model, tokenizer = load_causal_lm(directory), load_tokenizer(directory)
    answers = [
        reference_answer(model, tokenizer, [{"role": "user", "content": f"K{i}?"}], 24).ids for i in range(8)
    ]
    late = [token for ids in answers for token in ids[6:]]
    chosen = max(set(late), key=late.count)
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[[tokenizer.eos_token_id, chosen]] = rows[[chosen, tokenizer.eos_token_id]]
    model.save_pretrained(directory)
    return directory


def processes_of(word: str) -> dict[int, list[str]]:
    """Arguments by id of the processes that have `word` among them; a zombie has none."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word in argument for argument in arguments):
            found[int(entry.parent.name)] = arguments
    return found


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the golden data of curation, which tests only read."""
    folder = tmp_path_factory.mktemp("golden")
    curate_golden.write(folder)
    return folder
