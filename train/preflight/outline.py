"""Models that are not here, by their architecture: how stages fit together, LoRA names, lengths, sizes.

The `outline` hook of the stages that make a model from a model, for `posttrain check --offline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from peft import TaskType
from transformers import AutoConfig, PreTrainedConfig

from posttrain.errors import UserError
from posttrain.offline import Outline
from posttrain.preflight import Findings
from train.config import RewardConfig, TrainingStageConfig
from train.merge_config import MergeConfig
from train.online_config import OnlineConfig
from train.peft_config import AdapterSettings, PeftSettings
from train.peft_setup import quiet_libraries
from train.ppo.config import PpoStageConfig
from train.preflight.disk import disk_room, gigabytes
from train.preflight.lora import check_lora
from train.preflight.models import Size, check_length, head_alone, measure, skeleton
from train.preflight.ppo import check_policy_length, lengths
from train.prompts import check_positions

Trained = TrainingStageConfig | PpoStageConfig
MERGE_IT = "put a merge stage between them, and start from its model"
OR_START = "or set peft.start to continue (train it further) or to stack (a new adapter on it)"


def check(config: Trained | MergeConfig, outlines: Mapping[str, Outline]) -> Findings:
    """Everything about the models in `outlines`, by field of the stage."""
    quiet_libraries()
    findings = Findings()
    model = outlines.get("model")
    if isinstance(config, MergeConfig):
        _check_merge(config, outlines, findings)
        return findings
    if model is not None:
        _check_start(config, model, findings)
        _check_model(config, model, findings)
    if isinstance(config, (PpoStageConfig, OnlineConfig)):
        for field in config.rewards.fields_beside(config.reward):
            if field in outlines:
                _check_reward(config, field, outlines[field], findings)
    if isinstance(config, PpoStageConfig):
        _check_sharing(config, outlines, findings)
    return findings


def is_adapter(outline: Outline) -> bool:
    """Whether the model will be a LoRA adapter: a stage with `peft` makes it, and none has merged it."""
    settings = outline.settings
    if isinstance(settings, MergeConfig):
        return settings.output == "adapter"
    return isinstance(settings, (TrainingStageConfig, PpoStageConfig)) and settings.peft is not None


def is_classifier(outline: Outline) -> bool:
    """Whether the model will be a reward model: a reward stage makes it, or the merge of one."""
    if outline.kind == "merge" and outline.source is not None:
        return is_classifier(outline.source)
    return outline.kind == "reward"


def _check_start(config: Trained, model: Outline, findings: Findings) -> None:
    """The model to start from is a language model, and no adapter where one cannot be built on."""
    if isinstance(config, RewardConfig) and config.peft is not None and config.peft.start == "continue":
        if not (is_classifier(model) and is_adapter(model)):
            findings.fail(
                "peft.start",
                f"continue needs an adapter of a reward model, which {model.ref} will not be",
                "name the run of a reward stage with `peft`, or remove it to train a new adapter",
            )
    elif is_classifier(model):
        findings.fail(
            "model",
            f"{model.ref} is a reward model, which no stage trains on",
            "set model to the run of the sft or merge stage",
        )
    elif isinstance(config, PpoStageConfig):
        return
    elif config.peft is not None and config.peft.start != "new":
        if not is_adapter(model):
            findings.fail(
                "peft.start",
                f"{config.peft.start} needs an adapter, and {model.ref} will be a full model",
                "remove it to train a new adapter on that model",
            )
    elif is_adapter(model):
        full = config.peft is None and not isinstance(config, (RewardConfig, OnlineConfig))
        if not full:
            message = f"{model.ref} will be a LoRA adapter, which no new adapter is trained on"
            findings.fail("model", message, f"{MERGE_IT}, {OR_START}")


def _check_merge(config: MergeConfig, outlines: Mapping[str, Outline], findings: Findings) -> None:
    """What is merged are adapters, of one base where there are several."""
    given = {field: outlines[field] for field in config.refs if field in outlines}
    for field, outline in given.items():
        if not is_adapter(outline):
            findings.fail(
                field,
                f"{outline.ref} is a full model, not an adapter: there is nothing to merge",
                "leave this stage out and name that model where this stage is named",
            )
    bases = {field: _base(outline) for field, outline in given.items() if is_adapter(outline)}
    if len(set(bases.values())) > 1:
        first, *others = bases.items()
        field, base = next(item for item in others if item[1] != first[1])
        message = f"{given[field].ref} will be an adapter of {base}, {given[first[0]].ref} one of {first[1]}"
        findings.fail(field, message, "adapters that are combined need the same base model")


def _check_model(config: Trained, outline: Outline, findings: Findings) -> None:
    """Architecture, LoRA names, positions; in words how much is trained and the room that it takes."""
    task = TaskType.SEQ_CLS if isinstance(config, RewardConfig) else TaskType.CAUSAL_LM
    model_config = _read(outline)
    if model_config is None:
        return
    if isinstance(config, (PpoStageConfig, OnlineConfig)):
        check_policy_length(config, model_config, findings)
    else:
        check_length(model_config, config.trainer.get("max_length"), findings)
    head_only = isinstance(config, RewardConfig) and config.head_only
    name, size, found = _build(outline.config, task, _trained_adapter(config, outline), head_only)
    findings.add(found)
    if size is None:
        return
    critic = _critic(config, size)
    size = Size(size.trained + critic, size.total, size.whole)
    room, what = disk_room(config, size, None)
    findings.notes.append(
        f"model: {name} of {size.total:,} parameters, {size.trained:,} trained; "
        f"{what} take {gigabytes(room)} of disk"
    )


def _trained_adapter(config: Trained, outline: Outline) -> str | None:
    """The LoRA settings of what is trained, as JSON; with start: continue those of the stage that made it."""
    settings: PeftSettings | None = config.peft
    source: Outline | None = outline
    while isinstance(settings, AdapterSettings) and settings.start == "continue" and source is not None:
        made_by = source.settings
        settings = made_by.peft if isinstance(made_by, (TrainingStageConfig, PpoStageConfig)) else None
        source = source.source
    if settings is None:
        return None
    return PeftSettings.model_validate(
        {name: value for name, value in dict(settings).items() if name in PeftSettings.model_fields}
        | ({"init_lora_weights": True} if isinstance(settings, AdapterSettings) else {})
    ).model_dump_json()


def _read(outline: Outline) -> PreTrainedConfig | None:
    """The configuration; None for one that cannot be read, which is said where the model itself is."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(outline.config)
    except (OSError, ValueError):
        return None
    return config


@lru_cache(maxsize=32)
def _build(
    config: Path, task: TaskType, peft: str | None, head_only: bool
) -> tuple[str, Size | None, Findings]:
    """Class and size of a model under these LoRA settings (JSON), and what is wrong with them; once for all
    the stages of a pipeline that say the same.
    """
    findings = Findings()
    model = skeleton(AutoConfig.from_pretrained(config), task, "model", findings)
    if model is None:
        return "", None, findings
    name = type(model).__name__
    if head_only:
        return name, head_alone(model), findings
    if peft is None:
        return name, measure(model, None, task), findings
    return name, check_lora(PeftSettings.model_validate_json(peft), model, task, findings), findings


def _critic(config: Trained, size: Size) -> int:
    """Trained parameters of PPO's value network, as far as the layout can be told yet."""
    if not isinstance(config, PpoStageConfig) or config.value == "head":
        return 0
    return size.total if config.peft is None or config.layout == "full" else size.trained


def _check_reward(
    config: PpoStageConfig | OnlineConfig, field: str, outline: Outline, findings: Findings
) -> None:
    if not is_classifier(outline):
        findings.fail(
            field,
            f"{outline.ref} is a language model without a score head, not a reward model",
            "name the run of a reward stage",
        )
        return
    model_config = _read(outline)
    if model_config is None:
        return
    try:
        check_positions(field, model_config, lengths(config))
    except UserError as error:
        message, _, remedy = str(error).partition(": lower")
        findings.fail(field, message, f"lower{remedy}")


def _check_sharing(config: PpoStageConfig, outlines: Mapping[str, Outline], findings: Findings) -> None:
    """What stands in the way of `layout: shared`, and what `layout: full` does not take."""
    model, reward = outlines.get("model"), outlines.get("reward")
    if model is not None and is_adapter(model) and config.peft is not None and config.layout == "full":
        message = f"{model.ref} will be a LoRA adapter, which `peft` continues in layout: shared only"
        findings.fail(
            "model", message, f"{MERGE_IT}, or set peft: null to train all weights of the merged model"
        )
    if config.layout != "shared":
        return
    obstacle = None
    if config.peft is None:
        obstacle = "it needs `peft`, since all weights of the policy are trained"
    elif reward is not None and not is_adapter(reward):
        obstacle = f"the reward model ({reward.ref}) is a full model, not a LoRA adapter"
    elif model is not None and reward is not None and _base(model) != _base(reward):
        obstacle = f"the reward model's base ({_base(reward)}) is not the policy's ({_base(model)})"
    if obstacle is not None:
        findings.fail("layout", f"shared is not possible: {obstacle}", "use layout: full, or mend that")


def _base(outline: Outline) -> str:
    """The full model under an adapter, or the model itself, as the configuration names it."""
    while is_adapter(outline) and outline.source is not None:
        outline = outline.source
    return outline.ref
