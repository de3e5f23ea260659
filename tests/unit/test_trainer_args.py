"""The ``trainer:`` block against TRL's dataclasses: every problem found, none invented."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
from pydantic import ValidationError

from train.config import (
    AdapterSettings,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from train.online_config import GrpoConfig, OnlineConfig, RlooConfig
from train.trainer_args import OWNED, OWNED_ONLINE, arguments_class, build_args, check
from train.trainer_rules import GRPO_VALUES, MASKED_BY_POSITION, generation_period

KINDS = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "orpo": OrpoConfig,
    "cpo": CpoConfig,
    "grpo": GrpoConfig,
    "rloo": RlooConfig,
}
ONLINE = ["grpo", "rloo"]


def make(kind, trainer=None, **fields):
    if issubclass(KINDS[kind], OnlineConfig):
        fields = {"reward": "r"} | fields
    return KINDS[kind](model="m", data="d", trainer=trainer or {}, **fields)


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_block_is_valid(kind):
    assert check(make(kind), "run.yaml: stages.x") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_trl_pass_its_own_type_hints(kind):
    cls = arguments_class(make(kind))
    block = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else None
        owned = OWNED | (OWNED_ONLINE if kind in ONLINE else {})
        if default is not None and field.name not in owned and field.init:
            block[field.name] = default
    block |= {"save_total_limit": 2, "use_cpu": True, "bf16": False}
    problems = [p for p in check(make(kind, block), "w") if "deprecated" not in p.message]
    assert problems == []


def test_a_misspelt_key_names_the_nearest_field_and_its_path():
    problem = only(check(make("sft", {"learning_rat": 1e-3}), "run.yaml: stages.sft"))
    assert problem.where == "run.yaml: stages.sft.trainer.learning_rat"
    assert "learning_rate" in problem.remedy and "SFTConfig" in problem.message


def test_a_field_of_another_trainer_is_unknown():
    assert check(make("dpo", {"beta": 0.1}), "w") == []
    assert "no field `beta`" in only(check(make("sft", {"beta": 0.1}), "w")).message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "fast", "float"),
        ("max_steps", 2.5, "int"),
        ("max_steps", True, "int"),
        ("max_steps", None, "int"),
        ("packing", "yes", "bool"),
        ("max_length", [3], "int or null"),
    ],
)
def test_a_wrong_type_names_the_right_one(name, value, expected):
    problem = only(check(make("sft", {name: value}), "w"))
    assert problem.where == f"w.trainer.{name}" and problem.remedy == f"expected {expected}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("max_length", None),
        ("pad_to_multiple_of", 8),
        ("lr_scheduler_kwargs", {"num_cycles": 1}),
    ],
)
def test_values_of_a_fitting_type_pass(name, value):
    assert check(make("sft", {name: value}), "w") == []


def test_enumerations_and_choices_name_the_nearest_value():
    block = {"lr_scheduler_type": "linaer", "packing_strategy": "bdf"}
    scheduler, strategy = check(make("sft", block), "w")
    assert "linear" in scheduler.remedy and "bfd" in strategy.remedy


def test_a_single_loss_type_stands_for_a_list():
    assert check(make("dpo", {"loss_type": "ipo"}), "w") == []
    assert check(make("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}), "w") == []


@pytest.mark.parametrize("name", sorted(OWNED))
def test_what_posttrain_sets_itself_is_refused_with_a_remedy(name):
    problem = only(check(make("sft", {name: "x"}), "w"))
    assert problem.where == f"w.trainer.{name}" and problem.remedy == OWNED[name]


@pytest.mark.parametrize(
    ("kind", "block", "word"),
    [
        ("sft", {"packing": True, "packing_strategy": "wrapped"}, "attend"),
        ("sft", {"packing": True, "max_length": None}, "max_length"),
        ("sft", {"eval_packing": True}, "attend"),
        ("pretrain", {"padding_free": True}, "max_length"),
        ("sft", {"completion_only_loss": True}, "conversations"),
        ("sft", {"save_total_limit": 1}, "deleted"),
        ("pretrain", {"assistant_only_loss": True}, "no assistant"),
        ("pretrain", {"packing": True, "packing_strategy": "wrapped"}, "attend"),
        ("dpo", {"sync_ref_model": True}, "LoRA"),
        ("dpo", {"padding_free": True}, "ignores"),
        ("dpo", {"loss_type": "sigmod"}, "not a valid value"),
        ("dpo", {"loss_type": ["sigmoid", "exo_pair"]}, "logarithm"),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, "divides"),
        ("dpo", {"loss_type": "aot", "use_weighting": True}, "sorts"),
        ("dpo", {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "nca_pair"),
        ("kto", {"sync_ref_model": True}, "LoRA"),
        ("kto", {"train_sampling_strategy": "random"}, "neighbour"),
        ("kto", {"per_device_train_batch_size": 1}, "another answer"),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "length of their own"),
        ("grpo", {"train_sampling_strategy": "group_by_length"}, "length of their own"),
        ("kto", {"train_sampling_strategy": "group_by_length"}, "length of their own"),
        (
            "kto",
            {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "group_by_length"},
            "length of their own",
        ),
        ("orpo", {"generate_during_eval": True}, "trackers"),
        ("grpo", {"sync_ref_model": True, "beta": 0.1}, "LoRA"),
        ("grpo", {"loss_type": "dapoo"}, "not a valid value"),
        ("grpo", {"scale_rewards": "groups"}, "not a valid value"),
        ("grpo", {"max_completion_length": None}, "limit"),
        ("grpo", {"num_iterations": 3}, "not a multiple of 3"),
        ("rloo", {"steps_per_generation": 8, "save_steps": 50}, "not a multiple of 8"),
        ("rloo", {"save_steps": 0.1}, "not a multiple of 1"),
    ],
)
def test_contradictions_that_trl_ignores_or_finds_late(kind, block, word):
    assert word in only(check(make(kind, block), "w")).message


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("grpo", {"auto_find_batch_size": True}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}),
        ("sft", {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"}),
        ("sft", {"optim_args": "a=1", "warmup_steps": -1}),
    ],
)
def test_what_the_dataclass_itself_raises_is_a_problem(kind, block):
    problem = only(check(make(kind, block), "w"))
    assert problem.where == "w.trainer" and problem.message


def test_an_adapter_on_the_head_is_refused():
    settings = AdapterSettings(target_modules=["q_proj", "lm_head"])
    assert only(check(make("dpo", peft=settings), "w")).where == "w.peft.target_modules"
    assert check(make("reward", peft=settings), "w") == []


def test_all_problems_are_reported_together():
    block = {"learning_rat": 1.0, "max_steps": "x", "seed": 3, "save_total_limit": 1}
    assert len(check(make("sft", block), "w")) == 4


def test_build_args_puts_the_block_between_defaults_and_what_is_owned(tmp_path):
    args = build_args(
        make("sft", {"save_steps": 7, "gradient_checkpointing": True}, seed=5), tmp_path, max_length=99
    )
    assert (args.save_steps, args.max_length, args.seed, args.data_seed) == (7, 99, 5, 5)
    assert args.activation_checkpointing and not args.bf16 and args.report_to == []
    assert not args.logging_nan_inf_filter and args.disable_tqdm
    assert not build_args(make("sft"), tmp_path).activation_checkpointing


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("name", sorted(OWNED_ONLINE))
def test_what_group_training_sets_itself_is_refused_too(kind, name):
    problem = only(check(make(kind, {name: "x"}), "w"))
    assert problem.where == f"w.trainer.{name}" and problem.remedy == OWNED_ONLINE[name]


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_trained_biases_would_move_the_reference(kind):
    problem = only(check(make(kind, peft=AdapterSettings(bias="all")), "w"))
    assert problem.where == "w.peft.bias" and "reference" in problem.message
    assert check(make("sft", peft=AdapterSettings(bias="all")), "w") == []


@pytest.mark.parametrize("block", [{"optim": "galore_adamw"}, {"optim": "lomo"}, {"fsdp": "full_shard"}])
def test_optimizers_without_the_groups_of_loraplus(block):
    if block.get("optim") == "galore_adamw":
        block = block | {"optim_target_modules": ["mlp"]}
    found = check(make("sft", block, peft=AdapterSettings(loraplus_lr_ratio=16.0)), "w")
    assert "w.peft.loraplus_lr_ratio" in {problem.where for problem in found}
    assert check(make("sft", {"optim": "sgd"}, peft=AdapterSettings(loraplus_lr_ratio=16.0)), "w") == []


PISSA = {"init_lora_weights": "pissa"}


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("sft", {"peft": PISSA | {"use_dora": True}}, "DoRA's magnitudes"),
        ("sft", {"peft": PISSA | {"start": "continue"}}, "goes on from the adapter's weights"),
        ("sft", {"peft": {"init_lora_weights": "pissa_niter_0"}}, "pissa_niter_"),
        ("sft", {"peft": {"loraplus_lr_ratio": 0.5}}, "greater than or equal to 1"),
        ("dpo", {"peft": {"start": "stack", "modules_to_save": ["lm_head"]}}, "not for modules_to_save"),
        ("dpo", {"peft": {"start": "stack", "bias": "all"}}, "not for bias"),
        ("reward", {"peft": {"start": "stack"}}, "two score heads"),
        ("reward", {"peft": {"start": "continue"}, "folds": 3}, "would mean nothing"),
        ("sft", {"quantization": {"load_in_4bit": True}, "peft": None}, "cannot be trained"),
        ("sft", {"quantization": {"load_in_4bit": True}, "peft": PISSA}, "quantised anew"),
        ("dpo", {"quantization": {"load_in_8bit": True}, "peft": {"start": "stack"}}, "round it away"),
        ("sft", {"quantization": {}}, "neither is set"),
        ("sft", {"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "both are set"),
        ("sft", {"quantization": {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}}, "no effect"),
    ],
)
def test_settings_of_adapters_that_contradict_each_other(kind, fields, said):
    with pytest.raises(ValidationError, match=said):
        make(kind, **fields)


@pytest.mark.parametrize("kind", ["kto", "orpo", "cpo", "grpo", "rloo"])
def test_dropout_of_an_adapter_is_not_dropped_in_silence(kind):
    settings = AdapterSettings(lora_dropout=0.1)
    assert only(check(make(kind, peft=settings), "w")).where == "w.peft.lora_dropout"
    assert check(make(kind, {"disable_dropout": False}, peft=settings), "w") == []


@pytest.mark.parametrize(
    ("block", "period"),
    [
        ({}, 1),
        ({"num_iterations": 2}, 2),
        ({"steps_per_generation": 4}, 4),
        ({"gradient_accumulation_steps": 4}, 1),
        ({"gradient_accumulation_steps": 4, "num_iterations": 2}, 2),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, 3),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 1),
    ],
)
def test_optimizer_steps_that_a_generation_serves(block, period, tmp_path):
    assert generation_period(build_args(make("grpo", block), tmp_path)) == period


def test_the_values_of_grpo_known_here_are_those_of_trl():
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    named = re.findall(
        r"self\.(loss_type|importance_sampling_level|scale_rewards) (==|in|!=) ([^:\n]+)", source
    )
    found = {name: set() for name in GRPO_VALUES}
    for name, _, values in named:
        found[name] |= set(re.findall(r"\"(\w+)\"", values))
    assert {name: set(values) for name, values in GRPO_VALUES.items()} == found


def test_a_reward_function_that_is_not_there_is_a_problem():
    config = make("grpo", reward=None, rewards={"functions": [{"function": "data_prep.answers:gsm9k"}]})
    problem = only(check(config, "w"))
    assert problem.where == "w.rewards.functions.0.function" and "gsm8k_reward" in problem.remedy


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"reward": None}, "nothing is rewarded"), ({"rewards": {"normalise": "scale"}}, "checkpoints")],
)
def test_group_training_refuses_what_it_cannot_do(fields, word):
    with pytest.raises(ValidationError, match=word):
        make("rloo", **fields)


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_rows_in_one_sequence_need_an_attention_that_keeps_them_apart(kind, name):
    block = {"packing": True} | {name: True}
    problems = check(make(kind, block, attn_implementation="paged|eager"), "w")
    assert f"w.trainer.{name}" in [problem.where for problem in problems]
    assert all("apart" in problem.message and "sdpa" in problem.remedy for problem in problems)
    for attention in (None, *MASKED_BY_POSITION, "flash_attention_2", "kernels-community/flash-attn3"):
        assert check(make(kind, block, attn_implementation=attention), "w") == []


def test_the_attention_that_keeps_rows_apart_has_a_mask_in_transformers():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert set(MASKED_BY_POSITION) <= set(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())


def test_padding_free_alone_is_allowed_in_sft():
    assert check(make("sft", {"padding_free": True}), "w") == []
