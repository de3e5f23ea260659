"""Configuration of the stages that train with TRL, and of merge (torch-free).

Those of grpo and rloo are in ``train/online_config.py``.

What TRL or transformers already name is not named again: it goes into ``trainer:`` under TRL's own field
names and is checked against TRL's dataclass (``train/trainer_args.py``) before a weight is loaded.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from posttrain.config import DatasetRef, ModelRef, StageConfig, StrictModel

Dtype = Literal["float32", "bfloat16", "float16"]


class PeftSettings(StrictModel):
    """LoRA, under the field names of peft's LoraConfig.

    ``init_lora_weights`` takes only the initialisations that leave the base weights alone: after pissa,
    olora, loftq and the like the saved adapter no longer fits the base model it names.
    """

    r: int = Field(16, ge=1, description="Rank of the update.")
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Adapted modules: names, or all-linear for every linear layer but the head."
    )
    exclude_modules: list[str] | None = Field(None, description="Modules to leave out of target_modules.")
    modules_to_save: list[str] | None = Field(
        None,
        description="Modules trained in full and saved with the adapter; reward models always add score.",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale lora_alpha / sqrt(r).")
    use_dora: bool = Field(False, description="Weight-decomposed update (DoRA).")
    init_lora_weights: Literal[True, "gaussian"] = Field(
        True, description="true: A Kaiming-uniform, B zero; gaussian: A normal, B zero."
    )
    layers_to_transform: list[int] | None = Field(
        None, description="Indices of the layers to adapt; all if null."
    )
    rank_pattern: dict[str, int] = Field({}, description="Module name pattern -> rank, where it is not r.")
    alpha_pattern: dict[str, int] = Field(
        {}, description="Module name pattern -> alpha, where it is not lora_alpha."
    )


class TrainingStageConfig(StageConfig):
    """What the stages that train a model with TRL have in common."""

    model: ModelRef = Field(description="Model to start from: a run directory, a local path or a Hub id.")
    peft: PeftSettings | None = Field(PeftSettings(), description="LoRA settings; null trains every weight.")
    dtype: Dtype = Field("float32", description="Type the weights are loaded in.")
    trainer: dict[str, Any] = Field({}, description="Fields of the TRL configuration of the stage.")
    attn_implementation: str | None = Field(
        None,
        description="Attention code: eager, sdpa, flash_attention_2, ...; null lets transformers choose.",
    )


class PretrainConfig(TrainingStageConfig):
    """Continued pretraining on plain text: loss on every token."""

    data: DatasetRef = Field(description="Texts: a dataset directory of kind text.")
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.SFTConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class SftConfig(TrainingStageConfig):
    """Supervised fine-tuning on conversations: loss on the assistant's turns."""

    data: DatasetRef = Field(description="Demonstrations: a dataset directory of kind conversation.")
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.SFTConfig. Defaults that differ from TRL's: assistant_only_loss true; "
        "train_sampling_strategy group_by_length, or padding_free true with a flash attention; bf16 only on "
        "a GPU that computes in it; activation_checkpointing false, save_steps 100, save_total_limit 2.",
    )


class RewardConfig(TrainingStageConfig):
    """Reward model (Bradley-Terry) on preference pairs: one score per dialogue, read at its last token."""

    data: DatasetRef = Field(description="Labelled pairs: a dataset directory of kind preference.")
    calibration_data: DatasetRef | None = Field(
        None, description="Demonstrations (kind conversation) whose mean reward is set to 0 after training."
    )
    calibration_rows: int = Field(512, ge=1, description="Demonstrations used for that, drawn with the seed.")
    folds: int | None = Field(
        None,
        ge=2,
        description="Cross-validate over the train rows first: so many folds, a group never in two of them. "
        "Out-of-fold scores go to folds.jsonl, accuracy and interval to the metrics.",
    )
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.RewardConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class DpoConfig(TrainingStageConfig):
    """Direct preference optimisation on pairs. The reference is the model given: with LoRA the adapter
    switched off, without LoRA a second, frozen copy."""

    data: DatasetRef = Field(description="Labelled pairs: a dataset directory of kind preference.")
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.DPOConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class KtoConfig(TrainingStageConfig):
    """Kahneman-Tversky optimisation: answers that are each good or bad, without a partner to compare with.
    The reference is that of dpo."""

    data: DatasetRef = Field(
        description="Labelled pairs: a dataset directory of kind preference. Each pair gives two rows, the "
        "chosen answer as desirable and the rejected one as undesirable."
    )
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.KTOConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class OrpoConfig(TrainingStageConfig):
    """Odds-ratio preference optimisation on pairs: supervised loss and preference loss in one, without a
    reference. TRL keeps it in trl.experimental."""

    data: DatasetRef = Field(description="Labelled pairs: a dataset directory of kind preference.")
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.experimental.orpo.ORPOConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class CpoConfig(TrainingStageConfig):
    """Contrastive preference optimisation on pairs, without a reference; ``trainer.loss_type`` makes it SimPO
    or AlphaPO. TRL keeps it in trl.experimental."""

    data: DatasetRef = Field(description="Labelled pairs: a dataset directory of kind preference.")
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.experimental.cpo.CPOConfig. Defaults that differ from TRL's: "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class MergeConfig(StageConfig):
    """Fold a LoRA adapter into its base model and prove that the result computes the same."""

    model: ModelRef = Field(
        description="The adapter: the run directory of a training stage, or a PEFT directory."
    )
    data: DatasetRef | None = Field(
        None,
        description="Dialogues to compare the logits on (any kind; the first rows of its eval split). "
        "null: token ids that span the vocabulary.",
    )
    dtype: Dtype = Field(
        "float32", description="Type the merged weights are saved in; the merge itself is float32."
    )
    tolerance: float = Field(
        1e-4, gt=0, description="Largest allowed |logit(adapter) - logit(merged)|, both in float32."
    )
