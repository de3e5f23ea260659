"""The reward stage on the two-layer model: head, calibration, folds."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from pydantic import ValidationError
from safetensors.torch import load_file

from posttrain.calibration import calibration_report, fit_temperature, out_of_fold_temperature
from posttrain.errors import DataError, UserError
from posttrain.models import load_causal_lm, load_reward_model, load_tokenizer
from tests.integration.conftest import file_names, load_adapter, read_rows
from train.config import RewardConfig
from train.encode import encode_whole
from train.frozen_trunk import FrozenTrunk
from train.reward_model import load_classifier, make_trainer
from train.reward_pairs import load_pairs
from train.reward_scores import pair_accuracy, score_dialogues, score_pairs
from train.trainer_args import build_args


def _demonstrations(run, data):
    from data_prep.dataset import read_split

    tokenizer = load_tokenizer(run / "model")
    rows = read_split(data, "train", "conversation")
    return tokenizer.apply_chat_template(list(rows["messages"]), return_dict=True)["input_ids"]


def test_writes_the_head_the_adapter_and_the_calibration(reward_run):
    assert file_names(reward_run / "model") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "reward_calibration.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((reward_run / "model" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and "score" in settings["modules_to_save"]


def test_the_saved_head_is_the_trained_one(reward_run):
    saved = next(tensor for name, tensor in load_adapter(reward_run).items() if "score" in name)
    generator = torch.Generator().manual_seed(0)
    initial = torch.normal(0.0, 1 / 33**0.5, saved.shape, generator=generator)
    assert saved.shape == (1, 32)
    assert not torch.equal(saved, initial)
    assert (saved - initial).abs().max() < 12 * 1e-2 * 1.5, (
        "twelve steps of Adam at 1e-2 from the documented start"
    )


def test_demonstrations_have_mean_reward_zero(reward_run, conversation_data):
    model, calibration = load_reward_model(reward_run / "model")
    scores = score_dialogues(model, calibration, _demonstrations(reward_run, conversation_data))
    assert calibration["n"] == 48
    assert abs(scores.mean().item()) < 1e-5
    assert scores.std() > 0


def test_learns_to_prefer_the_helpful_answer(reward_run):
    metrics = json.loads((reward_run / "manifest.json").read_text())["metrics"]
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_ties"] == 0 and metrics["eval_pairs"] == 16
    assert metrics["eval_accuracy_low"] == pytest.approx(16 / (16 + 1.959964**2), abs=1e-6), (
        "Wilson at 16 of 16"
    )
    losses = [row["loss"] for row in read_rows(reward_run) if "loss" in row]
    assert losses[-1] < losses[0]


def test_folds_score_every_pair_once_and_never_split_a_group(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    rows = make_rows["preference"](24, 0)
    for index, row in enumerate(rows):
        row["group"] = f"group-{index // 4}"
    data = write_dataset(tmp_path / "data", "preference", rows, rows[:4])
    run_dir = tmp_path / "run"
    metrics = run_stage("reward", run_dir, model=tiny_model_dir, data=data, folds=3, trainer={"max_steps": 8})
    lines = [json.loads(line) for line in (run_dir / "folds.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(row["id"] for row in rows)
    folds_of = {}
    for line in lines:
        folds_of.setdefault(line["group"], set()).add(line["fold"])
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert {line["fold"] for line in lines} == {0, 1, 2}
    assert metrics["cv_pairs"] == 24
    correct = sum(line["chosen"] > line["rejected"] for line in lines) / 24
    assert metrics["cv_accuracy"] == pytest.approx(correct)
    assert metrics["cv_accuracy_low"] < metrics["cv_accuracy"] < metrics["cv_accuracy_high"] or correct == 1.0
    assert metrics["bias"] == 0.0 and metrics["n"] == 0


def test_the_temperature_is_of_scores_not_trained_on(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    """With folds of the out-of-fold margins, without of the eval margins; saved beside the model."""
    rows = make_rows["preference"](24, 0)
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data = write_dataset(tmp_path / "data", "preference", rows, make_rows["preference"](9, 50))
    for folds, source, count in ((3, "folds", 24), (None, "eval", 9)):
        run_dir = tmp_path / source
        metrics = run_stage(
            "reward", run_dir, model=tiny_model_dir, data=data, folds=folds, trainer={"max_steps": 8}
        )
        saved = json.loads((run_dir / "model" / "reward_calibration.json").read_text())
        assert (saved["temperature_from"], saved["temperature_pairs"]) == (source, count)
        assert {name: metrics[name] for name in saved} == saved
        assert 0 <= saved["ece_after"] <= 0.5 and saved["bias"] == 0.0
    lines = [json.loads(line) for line in (tmp_path / "folds" / "folds.jsonl").read_text().splitlines()]
    margins = np.array([line["chosen"] - line["rejected"] for line in lines])
    saved = json.loads((tmp_path / "folds" / "model" / "reward_calibration.json").read_text())
    assert saved["temperature"] == pytest.approx(fit_temperature(margins), rel=1e-6)
    crossed = out_of_fold_temperature(margins, np.array([line["fold"] for line in lines]))
    assert saved["ece_after"] == pytest.approx(calibration_report(margins, crossed)["ece"])
    assert saved["ece_before"] == pytest.approx(calibration_report(margins)["ece"])


def test_a_margin_in_the_meta_enters_the_loss(run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset):
    """-log sigmoid(r_chosen - r_rejected - margin): a margin of 50 costs about 50 nats more."""
    rows = make_rows["preference"](8, 0)
    losses = {}
    for name, value in (("none", None), ("zero", 0), ("fifty", 50)):
        marked = [row | ({} if value is None else {"meta": json.dumps({"gap": value})}) for row in rows]
        data = write_dataset(tmp_path / f"data-{name}", "preference", marked, marked)
        run_dir = tmp_path / name
        trainer = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8}
        margin = {} if value is None else {"margin": "gap"}
        run_stage("reward", run_dir, model=tiny_model_dir, data=data, trainer=trainer, **margin)
        losses[name] = next(row["loss"] for row in read_rows(run_dir) if "loss" in row)
    assert losses["zero"] == losses["none"]
    assert losses["fifty"] == pytest.approx(50 + losses["none"] - math.log(2), abs=1.0)


def test_refuses_pairs_without_the_margin(run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset):
    rows = [row | {"meta": json.dumps({"gap": 1.5})} for row in make_rows["preference"](8, 0)]
    rows[2]["meta"] = json.dumps({"gap": "wide"})
    data = write_dataset(tmp_path / "data", "preference", rows, rows[:2])
    with pytest.raises(DataError, match=r"margin: 1 of 8 pairs .* `gap` .* preference-2 \('wide'\)"):
        run_stage("reward", tmp_path / "run", preflight=False, model=tiny_model_dir, data=data, margin="gap")


def test_centring_reaches_the_trainer(run_stage, tmp_path, tiny_model_dir, preference_data):
    """TRL adds coefficient x mean((r_chosen + r_rejected)^2) (2312.09244, eq. 2)."""
    losses = []
    for coefficient in (None, 100.0):
        run_dir = tmp_path / f"run-{coefficient}"
        trainer = {"max_steps": 1, "logging_steps": 1, "center_rewards_coefficient": coefficient}
        run_stage("reward", run_dir, model=tiny_model_dir, data=preference_data, trainer=trainer)
        losses.append(next(row["loss"] for row in read_rows(run_dir) if "loss" in row))
    assert losses[1] > losses[0]


HEAD_ONLY = {"peft": None, "head_only": True}


def test_a_head_alone_is_trained_as_on_a_frozen_model(
    run_stage, tmp_path, tiny_model_dir, preference_data, tiny_tokenizer
):
    """The oracle: TRL's trainer on the same model with every weight but the head's frozen."""
    trainer = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "bf16": False}
    metrics = run_stage(
        "reward", tmp_path / "run", model=tiny_model_dir, data=preference_data, trainer=trainer, **HEAD_ONLY
    )
    context = SimpleNamespace(path=lambda name: {"model": tiny_model_dir, "data": preference_data}[name])
    config = RewardConfig(model=str(tiny_model_dir), data=str(preference_data), peft=None, trainer=trainer)
    start = load_classifier(config, context, tiny_tokenizer, tmp_path)
    start.model.base_model.requires_grad_(False)
    pairs, _ = load_pairs(context, "train", tiny_tokenizer, 128, None)
    oracle = make_trainer(start, tiny_tokenizer, build_args(config, tmp_path / "oracle"), pairs, None)
    oracle.train()

    saved, _ = load_reward_model(tmp_path / "run" / "model")
    torch.testing.assert_close(saved.score.weight, oracle.model.score.weight.detach().cpu())
    given = load_causal_lm(tiny_model_dir).model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in saved.model.state_dict().items())
    assert metrics["train_pairs"] == len(pairs)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_head_alone_on_sixteen_bit_weights(bf16, run_stage, tmp_path, tiny_model_dir, preference_data):
    trainer = {"max_steps": 2, "learning_rate": 1e-3, "bf16": bf16}
    fields = {"model": tiny_model_dir, "data": preference_data, "dtype": "bfloat16", "trainer": trainer}
    run_stage("reward", tmp_path / "run", **fields, **HEAD_ONLY)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved["score.weight"].dtype == torch.float32
    assert saved["model.norm.weight"].dtype == torch.bfloat16


def test_the_head_beside_an_adapter_is_trained_in_float32(
    run_stage, tmp_path, tiny_model_dir, preference_data
):
    """In bfloat16 most updates of a head round to nothing: peft's float32 is for A and B only."""
    trainer = {"max_steps": 2, "learning_rate": 1e-3, "bf16": True}
    fields = {"model": tiny_model_dir, "data": preference_data, "dtype": "bfloat16", "trainer": trainer}
    run_stage("reward", tmp_path / "run", **fields, peft={"r": 4})
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    [head] = [tensor for name, tensor in saved.items() if "score" in name]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


def test_a_head_alone_is_cross_validated_in_one_reading(
    run_stage, tmp_path, tiny_model_dir, preference_data, monkeypatch
):
    """Each dialogue passes through the trunk once, over three folds, the final training and scoring."""
    read = []
    original = FrozenTrunk._read

    def counting(self, dialogues):
        read.extend(tuple(ids.tolist()) for ids in dialogues)
        return original(self, dialogues)

    monkeypatch.setattr(FrozenTrunk, "_read", counting)
    run_dir = tmp_path / "run"
    fields = HEAD_ONLY | {"model": tiny_model_dir, "data": preference_data, "folds": 3}
    metrics = run_stage("reward", run_dir, trainer={"max_steps": 8}, **fields)
    assert len(read) == len(set(read)) == 2 * (metrics["train_pairs"] + metrics["eval_pairs"])
    model, calibration = load_reward_model(run_dir / "model")
    tokenizer = load_tokenizer(run_dir / "model")
    context = SimpleNamespace(path=lambda name: preference_data)
    pairs, _ = load_pairs(context, "eval", tokenizer, 128, None)
    accuracy = pair_accuracy(*score_pairs(model, calibration, pairs.ids))["accuracy"]
    assert accuracy == metrics["eval_accuracy"], "the saved model, trunk and head, scores as was measured"


def test_a_frozen_trunk_reads_padding_on_either_side_alike(tiny_model_dir):
    trunk = load_causal_lm(tiny_model_dir).model
    frozen = FrozenTrunk(trunk, bf16=False)
    right = frozen(torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])).last_hidden_state
    left = frozen(torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]])).last_hidden_state
    assert len(frozen) == 1 and right.shape[:2] == (1, 5) and left.shape[:2] == (1, 4)
    alone = trunk(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
    torch.testing.assert_close(right[0, 2], alone)
    torch.testing.assert_close(left[0, 3], alone)
    assert not list(frozen.parameters())


def test_head_only_and_an_adapter_contradict_each_other():
    with pytest.raises(ValidationError, match="set `peft: null` beside it"):
        RewardConfig(model="a", data="b", head_only=True)


def test_refuses_more_folds_than_groups(run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset):
    rows = [row | {"group": "all"} for row in make_rows["preference"](8, 0)]
    data = write_dataset(tmp_path / "data", "preference", rows, rows)
    with pytest.raises(UserError, match="lower `folds`"):
        run_stage("reward", tmp_path / "run", model=tiny_model_dir, data=data, folds=2)


def test_refuses_identical_sides(run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset):
    rows = make_rows["preference"](8, 0)
    rows[3]["rejected"] = rows[3]["chosen"]
    data = write_dataset(tmp_path / "data", "preference", rows, rows[:2])
    with pytest.raises(DataError, match=r"1 of 8 pairs .* preference-3"):
        run_stage("reward", tmp_path / "run", preflight=False, model=tiny_model_dir, data=data)


def test_full_training_saves_the_head(run_stage, tmp_path, tiny_model_dir, preference_data):
    run_stage("reward", tmp_path / "run", model=tiny_model_dir, data=preference_data, peft=None)
    model, calibration = load_reward_model(tmp_path / "run" / "model")
    assert model.config.num_labels == 1 and calibration["bias"] == 0.0
    assert model.config.pad_token_id == 0


def test_reads_the_score_at_the_end_token_of_a_template_that_breaks_the_line_after_it(
    run_stage, tmp_path, tiny_model_dir, preference_data, conversation_data, make_rows
):
    """Qwen2.5's own template, as TRL ships it: the last token of a rendered dialogue is a line break."""
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    shutil.copyfile(template, model_dir / "chat_template.jinja")
    tokenizer = load_tokenizer(model_dir)
    rows = make_rows["conversation"](2, 0)
    dialogues, names = [row["messages"] for row in rows], [row["id"] for row in rows]
    assert tokenizer.apply_chat_template(dialogues[0], tokenize=False).endswith("<|im_end|>\n")
    assert all(ids[-1] == tokenizer.eos_token_id for ids in encode_whole(tokenizer, dialogues, names))

    metrics = run_stage(
        "reward",
        tmp_path / "run",
        model=model_dir,
        data=preference_data,
        calibration_data=conversation_data,
        trainer={"max_steps": 2},
    )
    assert metrics["train_pairs"] > 0 and metrics["n"] == 48


def test_refuses_a_template_that_goes_on_after_the_end_token(tiny_tokenizer, make_rows):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "That was all."
    rows = make_rows["conversation"](2, 0)
    with pytest.raises(DataError, match=r"2 of 2 dialogues .* do not end with <\|im_end\|>"):
        encode_whole(tokenizer, [row["messages"] for row in rows], [row["id"] for row in rows])
