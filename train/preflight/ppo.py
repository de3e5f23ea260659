"""PPO, GRPO, RLOO, synthesize: models that fit each other and the layout, prompts that fit the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import TaskType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data_prep.dataset import SPLITS, Split
from posttrain.errors import DataError, UserError
from posttrain.models import check_score_head, load_chat_tokenizer
from posttrain.preflight import Findings
from posttrain.rundir import read_manifest
from train.encode import Fault
from train.online_config import OnlineConfig
from train.ppo.config import PpoStageConfig
from train.ppo.layouts import choose_layout, reads_policy_tokens
from train.ppo.reward_sources import render_answer
from train.ppo.rollout import encode_prompts
from train.preflight.disk import check_disk
from train.preflight.lora import check_lora
from train.preflight.machine import check_precision, check_processes, this_device
from train.preflight.models import Size, measure, read_config, skeleton
from train.preflight.rows import MAX_LOST, Sample, all_alike, judge, read_samples
from train.preflight.tokens import doubled_bos, pieces, read_model, rendering
from train.preflight.trained import check_trained
from train.prompts import check_positions
from train.synthesis.config import SynthesizeConfig
from train.trainer_args import arguments_class, build_args

Sampling = PpoStageConfig | OnlineConfig | SynthesizeConfig
"""Stages in which a policy answers prompts."""
_GENERATION = ("generation_batch_size", "steps_per_generation", "per_device_train_batch_size")
MAX_PROMPTS_DROPPED = 0.5
"""Largest share of prompts over max_prompt_tokens; dropping more than that is refused, fewer a warning."""


def check_ppo(config: PpoStageConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a ppo stage."""
    findings = Findings()
    device = this_device()
    findings.add(check_precision(config, device))
    held_out = config.held_out is not None
    samples = read_prompts(config, paths["data"], held_out, findings) if "data" in paths else []
    findings.add(check_processes(config, device, None))
    for field in config.rewards.fields_beside(config.reward):
        if field in paths:
            check_reward(config, field, paths, samples, findings)
    if "model" not in paths:
        return findings
    _check_policy(config, paths, run_dir, findings)
    check_tokens(config, paths["model"], samples, findings)
    return findings


def check_online(config: OnlineConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a grpo or rloo stage."""
    findings = Findings()
    evaluates = config.trainer.get("eval_strategy", "no") != "no"
    samples = read_prompts(config, paths["data"], evaluates, findings) if "data" in paths else []
    for field in config.rewards.fields_beside(config.reward):
        if field in paths:
            check_reward(config, field, paths, samples, findings)
    check_trained(config, TaskType.CAUSAL_LM, paths, [], run_dir, findings)
    if "model" not in paths:
        return findings
    model = read_config(paths["model"], "model", Findings())
    if model is not None and not is_reward_model(config.model, paths["model"], model, findings):
        check_policy_length(config, model, findings)
    check_tokens(config, paths["model"], samples, findings)
    return findings


def check_tokens(config: Sampling, path: Path, samples: Sequence[Sample], findings: Findings) -> None:
    """The policy's tokenizer, and the prompts in its tokens."""
    read = read_model(path, findings)
    if read is None:
        return
    _, tokenizer = read
    for sample in samples:
        with rendering(tokenizer, sample.where, "data", findings):
            _check_prompts(config, tokenizer, sample, findings)


def read_prompts(config: Sampling, path: Path, evaluates: bool, findings: Findings) -> list[Sample]:
    """The prompts of the train split, and of the eval split where the stage reads it."""
    splits: tuple[Split, ...] = SPLITS if evaluates else ("train",)
    samples = read_samples(path, "prompt", config.seed, findings, splits=splits)
    for sample in samples:
        if sample.split == "train":
            prompts = [row["prompt"] for row in sample.rows]
            all_alike(findings.warn, sample, "prompts", prompts, "curate prompts that differ")
    return samples


def _check_policy(
    config: PpoStageConfig, paths: Mapping[str, Path], run_dir: Path, findings: Findings
) -> None:
    """The policy, which frozen is the reference: an SFT model with a possible layout, LoRA and disk space."""
    path = paths["model"]
    kind = _made_by(path)
    if kind == "base":
        findings.warn(
            "model",
            f"{config.model} is a base model: it is the reference that KL is measured from, and has not "
            "learned to answer",
            "fine-tune it first (stage: sft, then merge) and start PPO from that model",
        )
    model_config = read_config(path, "model", findings)
    if model_config is None:
        return
    if is_reward_model(config.model, path, model_config, findings):
        return
    check_policy_length(config, model_config, findings)
    layout = _check_layout(config, paths, findings)
    model = skeleton(model_config, TaskType.CAUSAL_LM, "model", findings)
    if model is None or layout is None:
        return
    if config.peft is None:
        size: Size | None = measure(model, None, TaskType.CAUSAL_LM)
    else:
        size = check_lora(config.peft, model, TaskType.CAUSAL_LM, findings)
    if size is not None:
        critic = {"shared": size.trained, "full": size.total}[layout] if config.value == "model" else 0
        findings.add(check_disk(config, Size(size.trained + critic, size.total, size.whole), None, run_dir))


def is_reward_model(name: str, path: Path, model: PreTrainedConfig, findings: Findings) -> bool:
    """Whether the policy is a reward model, with a problem in `findings`."""
    classifies = any("SequenceClassification" in name for name in model.architectures or [])
    if classifies or _made_by(path) == "reward":
        findings.fail(
            "model",
            f"{name} is a reward model, not the SFT model that training starts from and measures KL to",
            "set model to the run of the sft or merge stage, and reward to this one",
        )
        return True
    return False


def lengths(config: Sampling) -> dict[str, int]:
    """The longest prompt and response in tokens, by field."""
    if not isinstance(config, OnlineConfig):
        return config.lengths
    name = "max_completion_length"
    default = {field.name: field.default for field in dataclasses.fields(arguments_class(config))}[name]
    limit = config.trainer.get(name, default)
    return {"max_prompt_tokens": config.max_prompt_tokens, f"trainer.{name}": limit}


def check_policy_length(config: Sampling, model: PreTrainedConfig, findings: Findings) -> None:
    """Add a problem where prompt and response together are longer than the policy has positions."""
    try:
        check_positions("model", model, lengths(config))
    except UserError as error:
        _fail_with_advice(findings, "max_prompt_tokens", error, ": lower")


def _made_by(path: Path) -> str | None:
    """The kind of stage that made a model directory; None where that is not known."""
    try:
        manifest = read_manifest(path.parent) if path.name == "model" else None
    except UserError:
        return None
    return manifest["stage"] if manifest else None


def _check_layout(config: PpoStageConfig, paths: Mapping[str, Path], findings: Findings) -> str | None:
    """The layout, as far as the models are there; None, with a problem, when it is impossible."""
    reward = paths.get("reward")
    if config.reward is not None and reward is None:
        return config.layout if config.layout != "auto" else "full"
    try:
        if reward is not None and not reads_policy_tokens(paths["model"], reward):
            reward = None
        layout, obstacle = choose_layout(config, paths["model"].resolve(), reward and reward.resolve())
    except UserError as error:
        field, _, text = str(error).partition(": ")
        message, _, remedy = text.partition(". ")
        findings.fail(field if field in ("layout", "model") else "model", message, remedy)
        return None
    if obstacle and config.peft is not None:
        findings.notes.append(f"layout {layout}: {obstacle}")
    return layout


def check_reward(
    config: Sampling,
    field: str,
    paths: Mapping[str, Path],
    samples: Sequence[Sample],
    findings: Findings,
) -> None:
    """A reward model: score head, context, and that a template of its own renders the prompts."""
    path = paths[field]
    try:
        check_score_head(path)
        model = read_config(path, field, findings)
        if model is None or "model" not in paths:
            return
        if reads_policy_tokens(paths["model"], path):
            check_positions(field, model, lengths(config))
            return
        tokenizer = load_chat_tokenizer(path)
        for sample in samples[:1]:
            render_answer(field, tokenizer, sample.rows[0]["prompt"], "Hello.", False)
    except UserError as error:
        _fail_with_advice(findings, field, error, ": lower")
        return
    value = ", and the value network starts from the policy" if isinstance(config, PpoStageConfig) else ""
    findings.warn(
        field,
        f"{path} has a tokenizer or chat template of its own: responses are rendered anew for it{value}",
        "train the reward model from the policy's own SFT model to score the very tokens it samples",
    )


def _fail_with_advice(findings: Findings, field: str, error: UserError, advice: str) -> None:
    """Add an error whose remedy follows `advice` in the same sentence, or is indented below it."""
    message, found, remedy = str(error).partition(advice)
    if found:
        findings.fail(field, message, f"{advice.removeprefix(': ')}{remedy}")
    else:
        findings.fail_with(field, error)


def _check_prompts(
    config: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    findings: Findings,
) -> None:
    """Prompts that are too long, or begin with two BOS tokens."""
    where, limit = "max_prompt_tokens", config.max_prompt_tokens
    try:
        ids, kept = encode_prompts([row["prompt"] for row in sample.rows], tokenizer, limit)
    except DataError as error:
        message, _, remedy = str(error).partition(". ")
        findings.fail(where, f"{sample.where}: {message}", remedy)
        return
    fits = set(kept)
    long = [name for index, name in enumerate(sample.ids) if index not in fits]
    if long:
        what = f"are longer than max_prompt_tokens={limit} and would be dropped"
        remedy = "raise max_prompt_tokens, or curate shorter prompts"
        fault = Fault(long, len(sample.rows), "prompts", what, remedy)
        judge(findings, where, sample.where, fault, MAX_PROMPTS_DROPPED)
    if isinstance(config, OnlineConfig) and sample.split == "train" and len(sample.rows) == sample.total:
        _check_generations(config, sample, len(kept), findings)
    names = [sample.ids[index] for index in kept]
    judge(findings, "model", sample.where, doubled_bos(tokenizer, ids, names))
    if not findings.example:
        findings.example = pieces(tokenizer, ids[0], [False] * len(ids[0]))


def _check_generations(config: OnlineConfig, sample: Sample, prompts: int, findings: Findings) -> None:
    """Too few prompts for one generation, or many that none reaches: TRL leaves out an incomplete generation,
    and the order of the prompts is the same in every pass.
    """
    args = build_args(config, Path("unused"))
    answers, group = args.generation_batch_size, args.num_generations
    wanted = answers // group
    given = [name for name in _GENERATION if name in config.trainer]
    field = given[0] if given else _GENERATION[-1]
    generation = f"{answers} answers a generation are {wanted} prompts x num_generations {group}"
    if prompts < wanted:
        findings.fail(
            f"trainer.{field}",
            f"{generation}, and {sample.where} has {prompts} prompts that fit: there would be no step",
            f"use at most {prompts * group} answers a generation (a smaller batch, fewer steps or less "
            "accumulation, or more answers to a prompt), or curate more prompts",
        )
    elif prompts % wanted > MAX_LOST * prompts:
        findings.warn(
            f"trainer.{field}",
            f"{generation}: the last {prompts % wanted} of {prompts} prompts fill none and are never used",
            f"use a number of prompts a generation that divides {prompts}, or curate more prompts",
        )
