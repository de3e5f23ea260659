"""Configuration of LoRA and of a quantised base (torch-free)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from posttrain.config import StrictModel

PissaSteps = Annotated[str, StringConstraints(pattern=r"^pissa_niter_[1-9]\d*$")]
START_FIELDS = ("start", "loraplus_lr_ratio")
"""Fields of `AdapterSettings` that are not peft's LoraConfig's."""


class PeftSettings(StrictModel):
    """LoRA, under the field names of peft's LoraConfig.

    ``init_lora_weights`` takes the initialisations that leave the base weights alone; `AdapterSettings` has
    those that change them.
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


class AdapterSettings(PeftSettings):
    """LoRA of the stages that train with TRL: where it starts from, and at which learning rates.

    pissa (Meng et al. 2024, 2404.02948) and olora (Buyukakyuz 2024, 2406.01775) take the strongest directions
    out of the base weights and train those. The stage saves the difference from where it started, a plain
    LoRA adapter of rank 2 r, so that the adapter fits the base model as it is on disk.
    """

    start: Literal["new", "continue", "stack"] = Field(
        "new",
        description="What becomes of `model`. new: it is a full model, a new adapter is trained on it. "
        "continue: it is an adapter directory, whose own weights are trained further; rank, alpha and "
        "modules are the adapter's. stack: it is an adapter directory, which stays frozen beneath a new "
        "adapter; both are saved as one. In continue and stack the reference of dpo, kto, grpo and rloo is "
        "the adapter as it was given.",
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1,
        description="LoRA+: learning rate of the B matrices over that of all else, which is "
        "trainer.learning_rate (the paper uses 16, with about half the learning rate of plain LoRA). null: "
        "one learning rate.",
    )
    # Wider than PeftSettings': the TRL stages can save what these start from.
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] | PissaSteps = Field(  # type: ignore[assignment]
        True,
        description="true: A Kaiming-uniform, B zero; gaussian: A normal, B zero; pissa: the r strongest "
        "singular directions of each weight, pissa_niter_N: those by N steps of randomised SVD, which is "
        "much faster; olora: the first r of its QR decomposition. After pissa and olora the saved adapter "
        "has rank 2 r.",
    )

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation takes something out of the base weights."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.changes_base and self.use_dora:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights} and use_dora is true: DoRA's magnitudes "
                "would be those of a base model without its strongest directions, which is saved nowhere. "
                "Leave one out"
            )
        if self.start == "continue" and "init_lora_weights" in self.model_fields_set:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights}, but start: continue goes on from the "
                "adapter's weights. Remove it, or use start: stack"
            )
        if self.start == "stack":
            extra = [name for name in ("use_dora", "modules_to_save") if getattr(self, name)]
            extra += [] if self.bias == "none" else ["bias"]
            if extra:
                raise ValueError(
                    f"start: stack saves two adapters as one, which holds for LoRA matrices only, not for "
                    f"{', '.join(extra)}. Remove that, or merge the adapter first (stage: merge) and use "
                    "start: new"
                )
        return self

    @model_serializer(mode="wrap")
    def _as_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With start: continue, without the fields that were left to the adapter: their defaults, read back
        from the config.yaml of a run, would contradict it."""
        values = handler(self)
        if self.start == "continue":
            return {name: value for name, value in values.items() if name in self.model_fields_set}
        return values


class QuantizationSettings(StrictModel):
    """A base model held in 4 or 8 bits by bitsandbytes while an adapter is trained on it (QLoRA, Dettmers et
    al. 2023, 2305.14314), under the field names of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = Field(False, description="Hold linear layers in 4 bits.")
    load_in_8bit: bool = Field(False, description="Hold linear layers in 8 bits (LLM.int8).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit type; nf4 is the paper's, for weights that are normally distributed."
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantise the quantisation constants too: 0.4 bits less per parameter."
    )
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Type that 4-bit weights are expanded to for the arithmetic."
    )

    @model_validator(mode="after")
    def _four_or_eight(self) -> Self:
        if self.load_in_4bit == self.load_in_8bit:
            both = "both are" if self.load_in_4bit else "neither is"
            raise ValueError(f"set load_in_4bit: true or load_in_8bit: true; {both} set")
        four = sorted(name for name in self.model_fields_set if name.startswith("bnb_4bit_"))
        if self.load_in_8bit and four:
            raise ValueError(f"{', '.join(four)} has no effect with load_in_8bit; remove it")
        return self

    @property
    def name(self) -> str:
        """In words: ``4-bit nf4`` or ``8-bit``."""
        return f"4-bit {self.bnb_4bit_quant_type}" if self.load_in_4bit else "8-bit"
