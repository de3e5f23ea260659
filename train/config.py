"""Configuration of the stages that train with TRL (torch-free).

Those of grpo and rloo are in ``train/online_config.py``, that of merge in ``train/merge_config.py``.

What TRL or transformers already name is not named again: it goes into ``trainer:`` under TRL's own field
names and is checked against TRL's dataclass (``train/trainer_args.py``) before a weight is loaded.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, ModelRef, StageConfig
from train.peft_config import AdapterSettings, QuantizationSettings

Dtype = Literal["float32", "bfloat16", "float16"]


class TrainingStageConfig(StageConfig):
    """What the stages that train a model with TRL have in common."""

    model: ModelRef = Field(description="Model to start from: a run directory, a local path or a Hub id.")
    peft: AdapterSettings | None = Field(
        AdapterSettings(), description="LoRA settings; null trains every weight."
    )
    quantization: QuantizationSettings | None = Field(
        None,
        description="Hold the frozen base in 4 or 8 bits while the adapter is trained (QLoRA); needs `peft` "
        "and bitsandbytes. What is saved is an adapter of the model as it is on disk, unquantised.",
    )
    dtype: Dtype = Field("float32", description="Type the weights are loaded in.")
    trainer: dict[str, Any] = Field({}, description="Fields of the TRL configuration of the stage.")
    attn_implementation: str | None = Field(
        None,
        description="Attention code: eager, sdpa, flash_attention_2, ...; null lets transformers choose.",
    )

    @model_validator(mode="after")
    def _quantised_base_is_frozen(self) -> Self:
        if self.quantization is None:
            return self
        name = self.quantization.name
        if self.peft is None:
            raise ValueError(
                f"quantization is {name} and peft is null: quantised weights cannot be trained. Set peft, or "
                "remove quantization"
            )
        if self.peft.changes_base:
            raise ValueError(
                f"quantization is {name} and peft.init_lora_weights is {self.peft.init_lora_weights}: what "
                "is left of the base would be quantised anew and fit no model on disk. Leave one out"
            )
        if self.peft.start == "stack":
            raise ValueError(
                f"quantization is {name} and peft.start is stack: folding the adapter into quantised "
                "weights would round it away. Merge it first (stage: merge) and use start: new, or use "
                "start: continue"
            )
        return self


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
    head_only: bool = Field(
        False,
        description="Train only the score head, on the model as it is (a linear probe); needs `peft: null`. "
        "The model reads each dialogue once, so epochs and folds cost next to nothing.",
    )
    margin: str | None = Field(
        None,
        description="Key in the meta of a pair under which its margin stands: how much higher the chosen "
        "answer is to score (TRL's column `margin`). `meta_columns` of the curate stage keeps it.",
    )
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

    @model_validator(mode="after")
    def _head_or_adapter(self) -> Self:
        start = "new" if self.peft is None else self.peft.start
        if start == "stack":
            raise ValueError(
                "peft.start: stack would need two score heads in one. Use peft.start: continue to train a "
                "reward adapter further, or merge the adapter first (stage: merge) and use start: new"
            )
        if start == "continue" and self.folds:
            raise ValueError(
                f"folds is {self.folds} and peft.start is continue: the adapter may have been trained on the "
                "very rows that a fold holds out, and its accuracy on them would mean nothing. Remove one"
            )
        if self.head_only and self.peft is not None:
            raise ValueError("`head_only` trains no adapter: set `peft: null` beside it")
        return self


class DpoConfig(TrainingStageConfig):
    """Direct preference optimisation on pairs. The reference is the model given: with LoRA the adapter
    switched off (of an adapter given, see peft.start), without LoRA a second, frozen copy."""

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
        description="A dataset directory of kind unpaired_preference, answers labelled true (desirable) or "
        "false, or of kind preference, of which each pair gives two rows, the chosen answer as desirable and "
        "the rejected one as undesirable."
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
