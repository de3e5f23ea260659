"""Configuration of the `base` stage (torch-free)."""

from __future__ import annotations

from pydantic import Field

from posttrain.config import DatasetRef, StageConfig, StrictModel


class ArchitectureConfig(StrictModel):
    """Size of the Llama-architecture model (names as in transformers' LlamaConfig)."""

    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(384, ge=8, description="Width of the MLP.")
    num_hidden_layers: int = Field(4, ge=1, description="Number of transformer layers.")
    num_attention_heads: int = Field(4, ge=1, description="Attention heads; must divide hidden_size.")
    max_position_embeddings: int = Field(512, ge=16, description="Longest sequence in tokens.")


class BaseConfig(StageConfig):
    """Train a tokenizer and pretrain a small model from scratch: the embedded default's base model."""

    data: DatasetRef = Field(description="Corpus: a dataset directory of kind text or conversation.")
    vocab_size: int = Field(
        1400, ge=300, description="Size of the byte-level BPE vocabulary, keep_whole apart."
    )
    keep_whole: str | None = Field(
        None,
        description="Regular expression: every distinct match in the corpus becomes one token with the space "
        "before it, so that identifiers are copied in one step.",
    )
    architecture: ArchitectureConfig = Field(ArchitectureConfig(), description="Model size.")
    prompt_loss_weight: float = Field(
        0.1, ge=0, le=1, description="Loss weight of tokens outside assistant turns (kind conversation)."
    )
    steps: int = Field(600, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Sequences per step.")
    max_length: int = Field(256, ge=8, description="Longest sequence in tokens; longer ones are cut.")
    matrix_learning_rate: float = Field(0.02, gt=0, description="Muon's learning rate for hidden matrices.")
    learning_rate: float = Field(
        4e-3, gt=0, description="AdamW's learning rate for embeddings, head and norms."
    )
    warmup_steps: int = Field(
        20,
        ge=0,
        description="Linear warm-up, in steps; the rate is then constant, and falls to 0 over the last 30 %.",
    )
    bf16: bool = Field(True, description="bfloat16 autocast for forward and backward.")
    log_every: int = Field(20, ge=1, description="Steps between log rows.")
    save_every: int = Field(200, ge=1, description="Steps between checkpoints.")
