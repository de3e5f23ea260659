"""What makes the sft stage fast must not change what it trains: batches by length, packed rows, the head."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from posttrain.errors import UserError
from posttrain.models import load_tokenizer
from tests.integration.conftest import read_rows
from tests.integration.test_resume import assert_same_run, cut_back
from train import sft
from train.encode import encode_conversations
from train.sft_defaults import sft_defaults
from train.supervised_head import score_supervised_only

ONE_STEP = {"max_steps": 1, "logging_steps": 1}
STILL = {"learning_rate": 1e-9}
"""Too little to change a loss, enough to change a weight."""


def first_row(run_dir):
    row = read_rows(run_dir)[0]
    return {name: row[name] for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy")}


def last_eval(run_dir):
    return [row["eval_loss"] for row in read_rows(run_dir) if "eval_loss" in row][-1]


@pytest.fixture
def encoded(tiny_model_dir, make_rows):
    rows = make_rows["conversation"](5, 3)
    tokenizer = load_tokenizer(tiny_model_dir)
    return encode_conversations(tokenizer, [row["messages"] for row in rows], [row["id"] for row in rows])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_row_has_the_same_loss_in_a_shared_sequence_and_alone(tiny_model_dir, encoded, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation=attention)
    add_fused_lm_head(model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    examples = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    together = model(**collate(examples), fused_lm_head=True).log_probs[0]
    start = 0
    for example in examples:
        alone = model(**collate([example]), fused_lm_head=True).log_probs[0]
        assert alone.abs().sum() > 1
        assert torch.allclose(together[start : start + len(alone)], alone, atol=1e-5)
        start += len(alone) + 1


@pytest.mark.parametrize("shared", [{"padding_free": True}, {"packing": True, "max_length": 256}])
@pytest.mark.parametrize("assistant_only", [True, False])
def test_rows_in_one_sequence_train_as_rows_of_a_batch(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset, shared, assistant_only
):
    rows = make_rows["conversation"](8, 3)
    data = write_dataset(tmp_path / "data", "conversation", rows, rows[:2])
    results = []
    for block in ({}, shared):
        run_dir = tmp_path / str(len(results))
        trainer = ONE_STEP | {"assistant_only_loss": assistant_only} | block
        run_stage("sft", run_dir, model=tiny_model_dir, data=data, trainer=trainer)
        results.append(first_row(run_dir))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_an_attention_that_mixes_rows_stops_the_stage(run_stage, tmp_path, tiny_model_dir, conversation_data):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("blind", sdpa_attention_forward)  # without a mask function: it gets no mask
    fields = {"model": tiny_model_dir, "data": conversation_data, "attn_implementation": "blind"}
    for block in ({"packing": True}, {"padding_free": True}):
        with pytest.raises(UserError, match=r"see each other with attn_implementation `blind`"):
            run_stage("sft", tmp_path / "run", preflight=False, trainer=ONE_STEP | block, **fields)
    assert not (tmp_path / "run" / "model").exists()
    run_stage("sft", tmp_path / "alone", preflight=False, trainer=ONE_STEP, **fields)


@pytest.mark.parametrize("peft", [None, {"r": 4, "lora_alpha": 8}])
def test_the_head_without_unlabelled_tokens_gives_the_same(
    run_stage, tmp_path, tiny_model_dir, conversation_data, monkeypatch, peft
):
    applied = []
    results = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(sft, "score_supervised_only", applied.append)
        run_dir = tmp_path / str(whole)
        run_stage(
            "sft", run_dir, model=tiny_model_dir, data=conversation_data, peft=peft, trainer=ONE_STEP | STILL
        )
        results.append(first_row(run_dir) | {"eval_loss": last_eval(run_dir)})
    assert len(applied) == 1
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_head_scores_exactly_the_labelled_tokens(tiny_model_dir, encoded):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    )
    whole = model(**batch, fused_lm_head=True)
    plain = model(input_ids=batch["input_ids"]).logits
    assert score_supervised_only(model)
    kept = model(**batch, fused_lm_head=True)
    mask = batch["labels"][:, 1:] != -100
    assert kept.log_probs.shape == (1, int(mask.sum()))
    for name in ("log_probs", "entropy"):
        assert torch.allclose(kept[name][0], whole[name][mask], atol=1e-5)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, plain), "generation reads every position"


def test_eval_loss_does_not_depend_on_how_training_batches_are_made(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    losses = {}
    for strategy in ("group_by_length", "random"):
        run_dir = tmp_path / strategy
        block = ONE_STEP | STILL | {"train_sampling_strategy": strategy, "per_device_eval_batch_size": 3}
        run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data, trainer=block)
        losses[strategy] = (last_eval(run_dir), first_row(run_dir)["loss"])
    assert losses["random"][0] == pytest.approx(losses["group_by_length"][0], rel=1e-6)
    assert losses["random"][1] != pytest.approx(losses["group_by_length"][1], rel=1e-3)


@pytest.mark.parametrize("block", [{}, {"padding_free": True}, {"packing": True, "max_length": 128}])
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resumes_in_every_epoch(run_stage, tmp_path, tiny_model_dir, conversation_data, block, stop):
    """48 rows in batches of 8 (of 4 where they are packed): inside an epoch and at its end."""
    trainer = {"max_steps": 11, "logging_steps": 3, "save_steps": 1, "save_total_limit": 20}
    if "packing" in block:
        trainer["per_device_train_batch_size"] = 4
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": trainer | block, "peft": peft}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage("sft", whole, **fields)
    assert [row["epoch"] for row in read_rows(whole) if "loss" in row][-1] > 1
    cut_back(whole, cut, stop)
    assert run_stage("sft", cut, **fields)["resumed_from_step"] == stop
    assert_same_run(whole, cut)


def test_neftune_is_noise_in_training_and_none_in_evaluation(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    results = {}
    for alpha in (None, 5.0):
        run_dir = tmp_path / str(alpha)
        block = ONE_STEP | STILL | {"neftune_noise_alpha": alpha}
        run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data, trainer=block)
        results[alpha] = (first_row(run_dir)["loss"], last_eval(run_dir))
    assert results[5.0][0] != pytest.approx(results[None][0], rel=1e-4)
    assert results[5.0][1] == pytest.approx(results[None][1], rel=1e-6)


def test_assistant_only_loss_counts_what_the_assistant_said(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    counted = {}
    for assistant_only in (True, False):
        metrics = run_stage(
            "sft",
            tmp_path / str(assistant_only),
            model=tiny_model_dir,
            data=conversation_data,
            trainer=ONE_STEP | {"assistant_only_loss": assistant_only},
        )
        counted[assistant_only] = metrics["supervised_tokens"]
    assert 0 < counted[True] < 0.7 * counted[False]


def test_defaults_follow_the_attention_and_give_way_to_the_block():
    flash, plain = LlamaConfig(), LlamaConfig()
    flash._attn_implementation, plain._attn_implementation = "flash_attention_2", "sdpa"
    grouped = {"train_sampling_strategy": "group_by_length"}
    assert sft_defaults({}, plain).items() >= grouped.items()
    assert sft_defaults({}, flash).items() >= {"padding_free": True}.items()
    assert "train_sampling_strategy" not in sft_defaults({}, flash)
    assert sft_defaults({"padding_free": False}, flash).items() >= grouped.items()
    for block in ({"packing": True}, {"padding_free": True}):
        for model in (flash, plain):
            assert not {"padding_free", "train_sampling_strategy"} & sft_defaults(block, model).keys()
