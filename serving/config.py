"""Configuration of the `export` and `serve` stages. Imports neither torch nor tritonclient."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config import DatasetRef, ModelRef, RunRef, StageConfig
from posttrain.errors import Problem, UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Target = Literal["triton-vllm", "triton-python", "triton-onnx", "triton-trtllm", "vllm", "kserve"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
AdapterName = Annotated[str, Field(pattern=NAME_PATTERN)]
ADAPTER_TARGETS = ("triton-vllm", "triton-python", "vllm", "kserve")


class ExportConfig(StageConfig):
    """Write a trained model, or a base model and adapters, as a versioned repository for a server."""

    model: ModelRef = Field(
        description="Trained model or adapter; an adapter is merged into its base. With `adapters`: the base."
    )
    adapters: dict[AdapterName, ModelRef] = Field(
        default_factory=dict,
        description="LoRA adapters of `model`, served unmerged beside it: a request names one as lora_name.",
    )
    target: Target = Field(
        "triton-vllm",
        description="What is to serve it: Triton's vLLM backend; Triton's Python backend with transformers; "
        "its ONNX Runtime backend (reward models and classifiers) or its TensorRT-LLM backend; vLLM by "
        "itself; KServe.",
    )
    name: str = Field(
        "posttrain",
        pattern=NAME_PATTERN,
        description="Model name in the repository: what a client asks Triton for.",
    )
    version: int | None = Field(
        None, ge=1, description="Version to write, which must not exist; default: the next one."
    )
    num_versions: int = Field(1, ge=1, description="How many of the newest versions the server loads.")
    dtype: Dtype = Field("float32", description="Precision of the exported weights and of serving.")
    max_model_len: int | None = Field(
        None, ge=8, description="Most tokens of prompt and answer together; default: what the model allows."
    )
    mount_path: str | None = Field(
        "/models",
        description="Absolute path at which the container sees the model repository; null writes a path "
        "relative to the version folder, which only the embedded server resolves.",
    )
    max_prompt_characters: int = Field(32768, ge=1, description="Longest text_input the server accepts.")
    max_output_tokens: int = Field(1024, ge=1, description="Largest max_tokens the server accepts.")
    max_queue: int = Field(256, ge=1, description="Requests that may wait; further ones are refused.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="vLLM's share of the GPU's memory.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="More arguments of vLLM or TensorRT-LLM, written as they are.",
    )
    prompts: DatasetRef | None = Field(
        None,
        description="Prompt, preference or conversation dataset whose eval split gives the golden prompts; "
        "null: a few general ones.",
    )
    golden_prompts: int = Field(
        32, ge=0, description="Prompts whose greedy answers are stored for `posttrain parity`; 0: none."
    )
    golden_tokens: int = Field(48, ge=1, description="Longest golden answer, in tokens.")
    image: str | None = Field(
        None,
        description="Container image in the deployment files, or what their Dockerfile builds on; default: "
        "that of the target.",
    )


class ServeConfig(StageConfig):
    """Serve an export with the embedded Triton and prove that it answers as the trained model does."""

    export: RunRef = Field(description="Run directory of an `export` stage.")
    prompts: DatasetRef = Field(
        description="Prompt, preference or conversation dataset; its eval split is asked."
    )
    reference: ModelRef | None = Field(
        None, description="Model that the answers are compared with; default: the one that was exported."
    )
    num_prompts: int = Field(32, ge=1, description="Prompts compared.")
    max_new_tokens: int = Field(48, ge=1, description="Longest answer, in tokens.")
    concurrency: int = Field(4, ge=1, le=64, description="Requests in flight while comparing.")
    max_logprob_delta: float | None = Field(
        None,
        gt=0,
        description="Largest allowed difference of a served token's log-probability, in nats; default: 1e-3 "
        "in float32, 0.1 in half precision.",
    )
    triton_env: str = Field(
        ".venv-triton",
        description="Environment with tritonserver, made by `make triton-env`; POSTTRAIN_TRITON_ENV "
        "overrides it.",
    )
    start_timeout_s: float = Field(300.0, gt=0, description="Seconds the server may take to become ready.")
    request_timeout_s: float = Field(120.0, gt=0, description="Seconds one answer may take.")


RESERVED_ENGINE_ARGS = frozenset(
    {
        "model",
        "tokenizer",
        "dtype",
        "max_model_len",
        "gpu_memory_utilization",
        "enable_lora",
        "max_lora_rank",
        "max_loras",
    }
)


def check_export(config: ExportConfig, where: str) -> list[Problem]:
    """Contradictions inside the block, found before any input is opened."""
    problems = []
    if config.mount_path is not None and not config.mount_path.startswith("/"):
        problems.append(
            Problem(
                f"{where}.mount_path",
                f"'{config.mount_path}' is not an absolute path",
                "give the path inside the container, for example /models, or null",
            )
        )
    if config.mount_path is None and config.target not in ("triton-vllm", "triton-python", "triton-onnx"):
        problems.append(
            Problem(
                f"{where}.mount_path",
                f"the target {config.target} resolves no relative path",
                "give the path inside the container, for example /models",
            )
        )
    for key in sorted(RESERVED_ENGINE_ARGS & config.engine_args.keys()):
        problems.append(
            Problem(
                f"{where}.engine_args.{key}", "is written by the export", "use the stage's own fields instead"
            )
        )
    if config.adapters and config.target not in ADAPTER_TARGETS:
        problems.append(
            Problem(
                f"{where}.adapters",
                f"the target {config.target} serves no adapters",
                f"use the target {' or '.join(ADAPTER_TARGETS)}, or export each adapter merged",
            )
        )
    if config.max_model_len is not None and config.max_output_tokens > config.max_model_len:
        problems.append(
            Problem(
                f"{where}.max_output_tokens",
                f"{config.max_output_tokens} tokens never fit in max_model_len={config.max_model_len}",
                "lower max_output_tokens or raise max_model_len",
            )
        )
    return problems


def check_serve(config: ServeConfig, where: str) -> list[Problem]:
    """Whether the Triton environment is there: a pipeline should not find out after all the training."""
    from serving.embedded import find_environment

    try:
        find_environment(config.triton_env)
    except UserError as error:
        message, _, remedy = str(error).partition("\n")
        return [Problem(f"{where}.triton_env", message, remedy.strip(), here=True)]
    return []
