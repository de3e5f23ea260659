"""The `rollout:` block of the ppo stage (torch-free): which engine writes the responses, and its bounds."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import StrictModel


class ContinuousSettings(StrictModel):
    """transformers' paged continuous batching. Null leaves a choice to what the rollout needs."""

    page_size: int | None = Field(
        None,
        ge=4,
        description="Tokens per page of the key-value cache; null: 256 on an accelerator (what flash "
        "attention asks for), 16 on the CPU.",
    )
    max_blocks: int | None = Field(
        None,
        ge=1,
        description="Blocks (one page per layer) in the cache. Null: room for max_rows of the longest "
        "sequences. With fewer, responses wait for room, or are put aside and recomputed.",
    )
    max_batch_tokens: int = Field(
        2048, ge=1, description="Tokens in one forward pass; longer prompts are read in parts."
    )
    max_memory: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the free memory that cache and buffers may take; more is an error before the "
        "first token.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Type to generate in, on a temporary copy of the weights. Null: bfloat16 where the stage "
        "has bf16, else the weights' own type without a copy.",
    )
    flash: bool = Field(
        True,
        description="Generate with flash attention where it is installed and the type is 16-bit; the "
        "attention of training is left as it is.",
    )


class VllmSettings(StrictModel):
    """vLLM, through trl.generation. Fields of one mode are ignored by the other where not said otherwise."""

    mode: Literal["colocate", "server"] = Field(
        "colocate",
        description="colocate: an engine in every training process, sharing its GPU; server: a running "
        "`vllm serve` on other GPUs.",
    )
    gpu_memory_utilization: float = Field(
        0.3,
        gt=0,
        le=1,
        description="colocate: share of the GPU's memory for vLLM's weights and cache.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="colocate: GPUs per engine; must divide the number of processes."
    )
    sleep: bool = Field(
        False, description="colocate: give vLLM's memory back during the update (slower rollouts)."
    )
    model_impl: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="colocate: whose code runs the model."
    )
    max_model_length: int | None = Field(
        None,
        ge=2,
        description="colocate: longest prompt and response; null: max_prompt_tokens + max_new_tokens.",
    )
    server_base_url: str | None = Field(
        None, description="server: its address, http://host:port; replaces server_host and server_port."
    )
    server_host: str = Field("127.0.0.1", description="server: its host.")
    server_port: int = Field(8000, ge=1, le=65535, description="server: its port.")
    server_timeout: float = Field(240.0, ge=0, description="server: seconds to wait for it at the start.")
    group_port: int = Field(
        51216, ge=1, le=65535, description="server: port over which the weights are sent."
    )


class RolloutConfig(StrictModel):
    """Which engine writes the responses. What they are drawn from (temperature) is the stage's own."""

    engine: Literal["hf", "continuous", "vllm"] = Field(
        "hf",
        description="hf: the policy's own forward pass, responses a function of the seed alone; continuous: "
        "transformers' paged continuous batching; vllm: vLLM, weights sent after every update.",
    )
    max_rows: int = Field(
        64, ge=1, description="Responses written at the same time on one process; memory only."
    )
    continuous: ContinuousSettings = Field(ContinuousSettings(), description="Of engine continuous.")
    vllm: VllmSettings = Field(VllmSettings(), description="Of engine vllm.")

    @model_validator(mode="after")
    def _settings_of_the_chosen_engine(self) -> Self:
        """A block filled in for an engine that does not run would change nothing, silently."""
        for name, block in (("continuous", self.continuous), ("vllm", self.vllm)):
            defaults = type(block)().model_dump()
            changed = [key for key, value in block.model_dump().items() if value != defaults[key]]
            if self.engine != name and changed:
                raise ValueError(
                    f"rollout.{name} sets {', '.join(changed)}, but rollout.engine is {self.engine}: choose "
                    f"engine {name} or remove the block"
                )
        return self
