"""The ``trainer:`` block against TRL's dataclasses: every problem found, none invented."""

from __future__ import annotations

import dataclasses

import pytest

from train.config import DpoConfig, PeftSettings, RewardConfig, SftConfig
from train.trainer_args import OWNED, arguments_class, build_args, check

KINDS = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig}


def make(kind, trainer=None, **fields):
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
        if default is not None and field.name not in OWNED and field.init:
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
        ("sft", {"padding_free": True}, "max_length"),
        ("sft", {"completion_only_loss": True}, "conversations"),
        ("sft", {"save_total_limit": 1}, "deleted"),
        ("dpo", {"sync_ref_model": True}, "LoRA"),
        ("dpo", {"padding_free": True}, "ignores"),
    ],
)
def test_contradictions_that_trl_ignores_or_finds_late(kind, block, word):
    assert word in only(check(make(kind, block), "w")).message


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}),
        ("sft", {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"}),
        ("sft", {"optim_args": "a=1", "warmup_steps": -1}),
    ],
)
def test_what_the_dataclass_itself_raises_is_a_problem(kind, block):
    problem = only(check(make(kind, block), "w"))
    assert problem.where == "w.trainer" and problem.message


def test_an_adapter_on_the_head_is_refused():
    settings = PeftSettings(target_modules=["q_proj", "lm_head"])
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
