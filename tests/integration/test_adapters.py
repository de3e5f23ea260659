"""What a stage starts from: an adapter that is trained further, one beneath a new one, PiSSA, LoRA+.

Of every run: what is saved is what was trained, as an adapter of the base model on disk; and the reference is
the policy before the first step, and stays there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import TaskType
from trl.trainer.utils import use_adapter

from posttrain.errors import PosttrainError, UserError
from posttrain.models import load_causal_lm, load_reward_model
from tests.integration.conftest import PEFT, file_names, load_adapter, read_rows
from tests.integration.test_resume import assert_same_run, cut_back
from train import finish, reward_model
from train.adapters import INITIAL
from train.concatenate import saved_parameters
from train.peft_config import AdapterSettings
from train.peft_setup import check_learned
from train.preflight import trained as preflight
from train.preflight.models import Size
from train.reward_scores import score_dialogues

STAGES = ["sft", "pretrain", "dpo", "kto", "orpo", "cpo", "grpo", "rloo"]
WITH_REFERENCE = ["dpo", "kto", "grpo", "rloo"]
IDS = torch.arange(3, 103)[None]
STEPS = {"max_steps": 2, "logging_steps": 1, "save_steps": 2}
GROUPS = {"num_generations": 4, "max_completion_length": 4, "beta": 0.05, "per_device_train_batch_size": 16}
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    training = model.training
    result = model.eval()(input_ids=IDS).logits.float()
    model.train(training)
    return result


def reference_logits(model: Any) -> torch.Tensor:
    """As TRL computes its reference: with the copy of the adapter, or without an adapter."""
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        return logits(model)


@pytest.fixture(scope="session")
def inputs(conversation_data, text_data, preference_data, prompt_data, tiny_reward_dir) -> dict[str, dict]:
    """What each stage is given besides its model."""
    prompts = {"data": prompt_data, "reward": tiny_reward_dir, "max_prompt_tokens": 100}
    pairs = {"data": preference_data}
    return {
        "sft": {"data": conversation_data},
        "pretrain": {"data": text_data},
        **dict.fromkeys(("dpo", "kto", "orpo", "cpo", "reward"), pairs),
        **dict.fromkeys(("grpo", "rloo"), prompts),
    }


@pytest.fixture
def trained(monkeypatch, run_stage, inputs, tmp_path):
    """trained(kind, model=..., peft=...) runs the stage and returns its run_dir and metrics, and the logits
    of policy and reference before and after training.
    """
    seen: dict[str, Any] = {}
    fit, save = finish.fit, finish.save_model

    def watched_fit(trainer: Any, *arguments: Any, **options: Any) -> Any:
        if trainer.model.peft_config:
            seen.update(before=logits(trainer.model), reference_before=reference_logits(trainer.model))
        metrics = fit(trainer, *arguments, **options)
        seen.update(trained=logits(trainer.model), reference_after=reference_logits(trainer.model))
        return metrics

    def watched_save(trainer: Any, *arguments: Any, **options: Any) -> None:
        seen["trainer"] = trainer
        save(trainer, *arguments, **options)

    def watched_disk(config: Any, size: Size, *arguments: Any) -> Any:
        seen["size"] = size
        return check_disk(config, size, *arguments)

    check_disk = preflight.check_disk
    monkeypatch.setattr(preflight, "check_disk", watched_disk)
    monkeypatch.setattr(finish, "fit", watched_fit)
    monkeypatch.setattr(finish, "save_model", watched_save)

    def run(kind: str, name: str = "run", trainer: dict | None = None, **fields: Any) -> Any:
        seen.clear()
        block = STEPS | (GROUPS if kind in ("grpo", "rloo") else {}) | (trainer or {})
        run_dir = tmp_path / name
        metrics = run_stage(kind, run_dir, trainer=block, **inputs[kind], **fields)
        return SimpleNamespace(run_dir=run_dir, metrics=metrics, **seen)

    return run


def saved_config(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "model" / "adapter_config.json").read_text())


@pytest.mark.parametrize("start", ["continue", "stack"])
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("sft", "dpo", "grpo") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in STAGES
    ],
)
def test_starts_from_an_adapter(kind, start, trained, sft_run, tiny_model_dir):
    """What is saved is what was trained, on the base model on disk; the reference is the adapter given."""
    run = trained(kind, model=sft_run, peft={"r": 4, "start": start})
    assert file_names(run.run_dir / "model") == FILES
    assert saved_config(run.run_dir)["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert saved_config(run.run_dir)["r"] == {"continue": 4, "stack": 8}[start]
    given, saved = logits(load_causal_lm(sft_run / "model")), logits(load_causal_lm(run.run_dir / "model"))
    assert (run.before - given).abs().max() < 1e-5 < 1e-2 < change(given, tiny_model_dir)
    assert (saved - run.trained).abs().max() < 1e-5
    assert (saved - given).abs().max() > 1e-3
    if kind != "pretrain":  # it has no preflight
        assert saved_parameters(run.run_dir / "model") == run.size.trained + run.size.added
        assert run.size.reference == (
            run.size.trained if start == "continue" and kind in WITH_REFERENCE else 0
        )
    if kind in WITH_REFERENCE:
        assert torch.equal(run.reference_before, run.before)
        assert torch.equal(run.reference_after, run.reference_before)
    first = read_rows(run.run_dir)[0]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if kind in ("grpo", "rloo"):
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def change(result: torch.Tensor, directory: Path) -> float:
    """How far logits are from those of the model in a directory."""
    return (result - logits(load_causal_lm(directory))).abs().max().item()


def test_a_precomputed_reference_is_that_of_the_adapter(run_stage, inputs, tmp_path, sft_run):
    losses = []
    for precompute in (False, True):
        block = STEPS | {"max_steps": 3, "learning_rate": 1e-3, "precompute_ref_log_probs": precompute}
        fields = {"model": sft_run, "peft": {"start": "continue"}, "trainer": block}
        run_stage("dpo", tmp_path / str(precompute), **fields, **inputs["dpo"])
        losses.append([row["loss"] for row in read_rows(tmp_path / str(precompute)) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_an_adapter_goes_through_a_chain_of_stages(trained, sft_run, tiny_model_dir):
    """sft, dpo stacked on it, kto continuing that: still one adapter on the first base."""
    stacked = trained("dpo", "dpo", model=sft_run, peft={"r": 2, "lora_alpha": 3, "start": "stack"})
    assert (saved_config(stacked.run_dir)["r"], saved_config(stacked.run_dir)["lora_alpha"]) == (6, 6)
    last = trained("kto", "kto", model=stacked.run_dir, peft={"start": "continue"})
    assert torch.allclose(last.before, stacked.trained, atol=1e-5)
    assert saved_config(last.run_dir)["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert torch.allclose(logits(load_causal_lm(last.run_dir / "model")), last.trained, atol=1e-5)


@pytest.mark.parametrize(
    "peft",
    [
        {"use_rslora": True, "lora_alpha": 8},
        {"target_modules": ["q_proj", "gate_proj"], "rank_pattern": {"gate_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "alpha_pattern": {"q_proj": 5}},
    ],
    ids=["rslora", "other-modules", "one-layer"],
)
def test_stacks_adapters_of_other_shapes(peft, trained, sft_run):
    run = trained("sft", model=sft_run, peft={"r": 2, "start": "stack"} | peft)
    assert (logits(load_causal_lm(run.run_dir / "model")) - run.trained).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        ("sft", "pissa_niter_4"),
        ("dpo", "pissa"),
        pytest.param("rloo", "olora", marks=pytest.mark.slow),
    ],
)
def test_what_took_something_out_of_the_base_is_saved_as_lora_on_the_base(
    kind, init, trained, tiny_model_dir
):
    run = trained(kind, model=tiny_model_dir, peft=PEFT | {"init_lora_weights": init})
    base = logits(load_causal_lm(tiny_model_dir))
    assert (run.before - base).abs().max() < 1e-4
    assert (logits(load_causal_lm(run.run_dir / "model")) - run.trained).abs().max() < 1e-4
    assert (run.trained - base).abs().max() > 1e-2
    assert (
        saved_parameters(run.run_dir / "model") == run.size.trained + run.size.added == 2 * run.size.trained
    )
    saved = saved_config(run.run_dir)
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    assert saved["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    if kind != "sft":
        assert torch.equal(run.reference_before, run.before), "TRL would compare with a base that lacks them"
        assert torch.equal(run.reference_after, run.reference_before)


def test_pissa_starts_at_the_strongest_directions(trained, tiny_model_dir):
    run = trained("sft", model=tiny_model_dir, peft=PEFT | {"init_lora_weights": "pissa"})
    weight = load_causal_lm(tiny_model_dir).model.layers[0].mlp.up_proj.weight.detach()
    strongest = torch.linalg.svdvals(weight)[:4]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    tensors = load_adapter(run.run_dir)  # [trained; initial] with the scale in A, and the initial's sign
    initial = -tensors[name.format("B")][:, 4:] @ tensors[name.format("A")][4:]
    taken = torch.linalg.svdvals(-initial)[:4]
    assert torch.allclose(taken, strongest, atol=1e-4)


@pytest.mark.parametrize("start", ["new", "stack"])
def test_pissa_keeps_modules_that_are_trained_in_full(start, trained, tiny_model_dir, sft_run):
    """peft's own conversion drops them; under an adapter they are refused, and PiSSA is not."""
    peft = PEFT | {"init_lora_weights": "pissa", "use_rslora": True, "start": start}
    if start == "new":
        peft["modules_to_save"] = ["embed_tokens"]
    run = trained("sft", model=tiny_model_dir if start == "new" else sft_run, peft=peft)
    assert any("embed_tokens" in name for name in load_adapter(run.run_dir)) == (start == "new")
    assert (logits(load_causal_lm(run.run_dir / "model")) - run.trained).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "peft"),
    [
        ("sft", {"init_lora_weights": "pissa_niter_2", "loraplus_lr_ratio": 4.0}),
        ("dpo", {"start": "continue", "loraplus_lr_ratio": 4.0}),
        pytest.param("kto", {"start": "stack", "init_lora_weights": "olora"}, marks=pytest.mark.slow),
        ("reward", {"init_lora_weights": "pissa", "loraplus_lr_ratio": 4.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_resumes_to_the_bit(kind, peft, run_stage, inputs, tmp_path, tiny_model_dir, sft_run):
    block = {
        "max_steps": 6,
        "logging_steps": 2,
        "save_steps": 3,
        "save_total_limit": 9,
        "num_train_epochs": 9,
    }
    block |= GROUPS if kind == "rloo" else {}
    peft = ({} if peft.get("start") == "continue" else PEFT) | peft
    model = sft_run if "start" in peft else tiny_model_dir
    fields = {"model": model, "peft": peft, "trainer": block, **inputs[kind]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage(kind, whole, **fields)
    cut_back(whole, cut, 3)
    assert run_stage(kind, cut, **fields)["resumed_from_step"] == 3
    assert_same_run(whole, cut)


def test_a_resumed_run_takes_out_of_the_base_what_was_taken_out(run_stage, inputs, tmp_path, tiny_model_dir):
    """Another machine may find singular vectors of another sign: they come from the run directory."""
    from safetensors.torch import load_file, save_file

    fields = {"model": tiny_model_dir, "peft": PEFT | {"init_lora_weights": "pissa"}, **inputs["sft"]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage("sft", whole, **fields)
    cut_back(whole, cut, 0)
    store = cut / "checkpoints" / INITIAL
    save_file({name: -tensor for name, tensor in load_file(store).items()}, store)
    run_stage("sft", cut, **fields)
    left, right = load_adapter(whole), load_adapter(cut)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(left[name][4:], -right[name][4:])
    models = [logits(load_causal_lm(path / "model")) for path in (whole, cut)]
    assert torch.allclose(*models, atol=1e-4)


def test_pissa_knows_transposed_layers(tmp_path):
    """GPT-2's Conv1D: the base is the same after a resume, and the model still computes what it did."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from train.adapters import initialise, lora_config

    def fresh(init):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=128)
        settings = AdapterSettings(
            r=4, lora_alpha=8, init_lora_weights=init, target_modules=["c_attn", "c_fc"]
        )
        return GPT2LMHeadModel(config), lora_config(settings, TaskType.CAUSAL_LM)

    first, initial = initialise(*fresh("pissa"), tmp_path / "store.safetensors")
    second, again = initialise(*fresh("pissa"), tmp_path / "store.safetensors")
    left, right = first.state_dict(), second.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(initial.tensors[name], again.tensors[name]) for name in initial.tensors)
    plain = fresh("pissa")[0]
    assert (logits(first) - logits(plain)).abs().max() < 1e-5
    taken = left["base_model.model.transformer.h.0.mlp.c_fc.base_layer.weight"]
    assert not torch.equal(taken, plain.transformer.h[0].mlp.c_fc.weight)
    with pytest.raises(UserError, match="use pissa"):
        initialise(*fresh("olora"), tmp_path / "other.safetensors")


def test_loraplus_trains_b_at_a_higher_rate(trained, tiny_model_dir):
    block = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
    }
    run = trained("sft", model=tiny_model_dir, peft=PEFT | {"loraplus_lr_ratio": 8.0}, trainer=block)
    groups = run.trainer.optimizer.param_groups
    of_a, _, of_b, _ = [{id(p) for p in group["params"]} for group in groups]
    named = dict(run.trainer.model.named_parameters())
    assert of_a == {id(p) for name, p in named.items() if "lora_A" in name}
    assert of_b == {id(p) for name, p in named.items() if "lora_B" in name}
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-6, 8e-3, 8e-3])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]
    plain = trained("sft", "plain", model=tiny_model_dir, peft=PEFT, trainer=block)
    ratios = [
        load_adapter(run.run_dir)[name].norm() / load_adapter(plain.run_dir)[name].norm()
        for name in load_adapter(run.run_dir)
        if "lora_B" in name
    ]
    assert 4 < sum(ratios) / len(ratios) < 12


def test_dora_trains_its_magnitudes(trained, tiny_model_dir):
    run = trained("sft", model=tiny_model_dir, peft=PEFT | {"use_dora": True})
    weights = load_causal_lm(tiny_model_dir).state_dict()
    magnitudes = {n: t for n, t in load_adapter(run.run_dir).items() if "lora_magnitude_vector" in n}
    assert len(magnitudes) == 14
    for name, tensor in magnitudes.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        assert not torch.equal(tensor, weights[f"{module}.weight"].norm(dim=1))
    assert (logits(load_causal_lm(run.run_dir / "model")) - run.trained).abs().max() < 1e-4
    before = {n: p.detach().clone() for n, p in run.trainer.model.named_parameters() if p.requires_grad}
    for name, tensor in before.items():
        if "lora_magnitude_vector" not in name:
            tensor += 1
    with pytest.raises(PosttrainError, match="none of 14 magnitude vectors"):
        check_learned(run.trainer, before)


def test_continues_an_adapter_with_dora_and_full_modules(trained, tiny_model_dir):
    peft = PEFT | {"use_dora": True, "modules_to_save": ["embed_tokens"]}
    given = trained("sft", "given", model=tiny_model_dir, peft=peft)
    run = trained("dpo", model=given.run_dir, peft={"start": "continue"})
    assert torch.allclose(run.before, given.trained, atol=1e-5)
    assert torch.equal(run.reference_after, run.before)
    old, new = load_adapter(given.run_dir), load_adapter(run.run_dir)
    assert old.keys() == new.keys()
    assert not any(
        torch.equal(old[name], new[name]) for name in old if "magnitude" in name or "embed" in name
    )
    assert torch.allclose(logits(load_causal_lm(run.run_dir / "model")), run.trained, atol=1e-4)


def test_settings_choose_what_the_adapter_holds(trained, tiny_model_dir):
    chosen = {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [1],
    }
    run = trained("orpo", model=tiny_model_dir, peft=PEFT | chosen)
    names = set(load_adapter(run.run_dir))
    layer = "base_model.model.model.layers.1.self_attn"
    lora = {f"{layer}.{p}_proj.lora_{m}.weight" for p in "qv" for m in "AB"}
    assert names == lora | {"base_model.model.lm_head.weight"}
    whole = trained("orpo", "whole", model=tiny_model_dir, peft=PEFT | {"exclude_modules": ["down_proj"]})
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in load_adapter(whole.run_dir)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_a_reward_adapter_is_trained_further(monkeypatch, run_stage, inputs, tmp_path, reward_run):
    """Head and adapter go on from where they were."""
    before = {}
    fit = reward_model.fit

    def watched(trainer: Any, *arguments: Any) -> Any:
        before.update({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        return fit(trainer, *arguments)

    monkeypatch.setattr(reward_model, "fit", watched)
    fields = inputs["reward"] | {"trainer": STEPS}
    run_stage("reward", tmp_path / "run", model=reward_run, peft={"start": "continue"}, **fields)
    old, new = load_adapter(reward_run), load_adapter(tmp_path / "run")
    assert old.keys() == new.keys()
    started = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in before.items()}
    assert started.keys() == old.keys()
    assert all(torch.equal(started[name], old[name]) for name in old)
    assert not torch.equal(old["base_model.model.score.weight"], new["base_model.model.score.weight"])


def test_a_reward_model_from_pissa_scores_as_it_was_trained(
    monkeypatch, run_stage, inputs, tmp_path, tiny_model_dir
):
    seen = {}
    save = reward_model.save_model
    dialogues = [[5, 6, 7, 2], [40, 41, 2]]

    def watched(trainer: Any, *arguments: Any) -> None:
        seen["scores"] = score_dialogues(trainer.model.eval(), {"bias": 0.0}, dialogues)
        save(trainer, *arguments)

    monkeypatch.setattr(reward_model, "save_model", watched)
    peft = PEFT | {"init_lora_weights": "pissa"}
    fields = inputs["reward"] | {"trainer": STEPS}
    run_stage("reward", tmp_path / "run", model=tiny_model_dir, peft=peft, **fields)
    model, calibration = load_reward_model(tmp_path / "run" / "model")
    assert torch.allclose(score_dialogues(model, calibration, dialogues), seen["scores"], atol=1e-4)


def test_config_yaml_of_a_continued_run_runs_again(trained, sft_run):
    """It holds no default of a setting that the adapter decides."""
    from train.config import SftConfig

    run = trained("sft", model=sft_run, peft={"start": "continue", "loraplus_lr_ratio": 2.0})
    written = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    assert written["peft"] == {"start": "continue", "loraplus_lr_ratio": 2.0}
    written.pop("stage")
    assert SftConfig.model_validate(written).peft.model_fields_set == {"start", "loraplus_lr_ratio"}


@pytest.mark.parametrize(
    ("kind", "key", "peft", "texts"),
    [
        ("sft", "peft.start", {"start": "continue", "r": 16}, ("r 16 (the adapter has 4)", "start: stack")),
        (
            "dpo",
            "peft.start",
            {"start": "continue", "lora_alpha": 32},
            ("lora_alpha 32 (the adapter has 8)",),
        ),
        ("rloo", "peft.start", {"start": "continue", "target_modules": ["q_proj"]}, ("['q_proj'] (the",)),
        ("reward", "peft.start", {"start": "continue"}, ("task SEQ_CLS here", "adapter of task CAUSAL_LM")),
        ("kto", "model", {}, ("is a LoRA adapter", "set peft.start to continue", "stage: merge")),
        ("grpo", "model", None, ("is a LoRA adapter",)),
    ],
)
def test_what_does_not_fit_the_adapter_is_refused(kind, key, peft, texts, refused, inputs, sft_run):
    block = {"trainer": GROUPS} if kind in ("grpo", "rloo") else {}
    refused(kind, key, *texts, model=sft_run, peft=peft, **inputs[kind], **block)


@pytest.mark.parametrize("start", ["continue", "stack"])
def test_a_full_model_is_no_adapter(start, refused, inputs, tiny_model_dir):
    said = (f"{start} needs an adapter directory", "remove peft.start")
    refused("dpo", "peft.start", *said, model=tiny_model_dir, peft={"start": start}, **inputs["dpo"])


def test_an_adapter_with_more_than_matrices_is_not_stacked_on(
    run_stage, refused, inputs, tmp_path, tiny_model_dir
):
    peft = PEFT | {"modules_to_save": ["embed_tokens"]}
    run_stage("sft", tmp_path / "given", model=tiny_model_dir, peft=peft, trainer=STEPS, **inputs["sft"])
    said = ("1 other tensors", "embed_tokens", "merge it first")
    refused("sft", "peft.start", *said, model=tmp_path / "given", peft={"start": "stack"}, **inputs["sft"])


def test_trained_biases_are_not_continued_beside_a_reference(
    run_stage, refused, inputs, tmp_path, tiny_model_dir
):
    peft = PEFT | {"bias": "lora_only"}
    run_stage("sft", tmp_path / "given", model=tiny_model_dir, peft=peft, trainer=STEPS, **inputs["sft"])
    said = ("trained biases (lora_only)", "the reference would move")
    refused("dpo", "model", *said, model=tmp_path / "given", peft={"start": "continue"}, **inputs["dpo"])


def test_the_preflight_names_the_reference(warned, inputs, sft_run):
    warned(
        "dpo",
        f"the reference is the adapter {sft_run} as it is now",
        model=sft_run,
        peft={"start": "continue"},
        **inputs["dpo"],
    )


def test_runs_without_preflight_refuse_the_same(run_stage, inputs, tmp_path, sft_run):
    with pytest.raises(UserError, match=r"r 16 \(the adapter has 4\)"):
        run_stage(
            "sft",
            tmp_path / "run",
            preflight=False,
            model=sft_run,
            peft={"start": "continue", "r": 16},
            **inputs["sft"],
        )
    assert not (tmp_path / "run" / "model").exists()
