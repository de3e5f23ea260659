"""Rollouts by vLLM, through TRL's VLLMGeneration: an engine in every process, or a server on other GPUs.

TRL gathers the policy's weights (DDP, ZeRO-3, FSDP), merges a LoRA adapter, sends the result under vLLM's
names and unmerges. What PPO needs beyond that is settled here:
- log-probabilities are those after temperature (`logprobs_mode=processed_logprobs`), checked on a server;
- a response ends at the tokenizer's end token and nowhere else, whatever generation_config says;
- merging and unmerging leaves rounding in the frozen weights, a little more with every rollout: they are put
  back to the bit;
- rollouts are in vLLM's own 16-bit type where the weights are float32; `rollout_gap` shows what that costs.

vLLM draws its own random numbers: runs are not reproducible. A seed per request would be the same for every
prompt of a call, and their samples would be correlated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from posttrain.errors import PosttrainError, UserError
from train.ppo.engines.base import Samples, SamplingParams
from train.ppo.engines.config import VllmSettings

SERVER_COMMAND = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve <model> --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)


class Generation(Protocol):
    """What is used of trl.generation.vllm_generation.VLLMGeneration."""

    max_completion_length: int

    def sync_weights(self) -> None: ...

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int
    ) -> tuple[Any, list[list[int]], list[list[list[float | None]]] | None, Any]: ...


def require_vllm() -> None:
    """Raise UserError where vLLM is not installed."""
    if not is_vllm_available():
        raise UserError(
            "rollout.engine is vllm, but vLLM is not installed here: install it with `pip install "
            "'trl[vllm]'` (Linux with a CUDA GPU), or set rollout.engine to hf (any "
            "machine) or continuous (transformers' paged continuous batching)"
        )


def vllm_arguments(
    settings: VllmSettings, sampling: SamplingParams, *, eos_id: int, max_prompt_tokens: int, max_rows: int
) -> dict[str, Any]:
    """Keyword arguments of VLLMGeneration, its model, accelerator and processing_class aside."""
    arguments: dict[str, Any] = {
        "mode": settings.mode,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_completion_length": sampling.max_new_tokens,
        "logprobs": 0,
        "generation_kwargs": {"ignore_eos": True, "stop_token_ids": [eos_id]},
    }
    if settings.mode == "server":
        return arguments | {
            "server_base_url": settings.server_base_url,
            "server_host": settings.server_host,
            "server_port": settings.server_port,
            "server_timeout": settings.server_timeout,
            "group_port": settings.group_port,
        }
    return arguments | {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_length": settings.max_model_length or max_prompt_tokens + sampling.max_new_tokens,
        "max_num_seqs": max_rows * settings.tensor_parallel_size,
        "enable_sleep_mode": settings.sleep,
        "model_impl": settings.model_impl,
    }


def check_settings(
    settings: VllmSettings, sampling: SamplingParams, processes: int, max_prompt_tokens: int
) -> None:
    """Raise UserError for what vLLM would refuse after minutes of loading."""
    if settings.mode == "server":
        return
    if processes % settings.tensor_parallel_size:
        raise UserError(
            f"rollout.vllm.tensor_parallel_size {settings.tensor_parallel_size} does not divide the "
            f"number of processes, {processes}"
        )
    longest = max_prompt_tokens + sampling.max_new_tokens
    if settings.max_model_length is not None and settings.max_model_length < longest:
        raise UserError(
            f"rollout.vllm.max_model_length {settings.max_model_length} is less than max_prompt_tokens + "
            f"max_new_tokens = {longest}: raise it, or leave it out"
        )


def start_vllm(
    settings: VllmSettings,
    sampling: SamplingParams,
    policy: PreTrainedModel | PeftModel,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_rows: int,
) -> VllmEngine:
    """Start vLLM (colocate) or connect to its server; every process calls this.

    Raises UserError when vLLM is missing, the settings do not fit, or the server cannot be used.
    """
    require_vllm()
    check_settings(settings, sampling, accelerator.num_processes, max_prompt_tokens)
    from trl.generation.vllm_generation import VLLMGeneration

    arguments = vllm_arguments(
        settings,
        sampling,
        eos_id=tokenizer.eos_token_id,
        max_prompt_tokens=max_prompt_tokens,
        max_rows=max_rows,
    )
    try:
        generation = VLLMGeneration(policy, accelerator, tokenizer, **arguments)
    except ConnectionError as error:
        raise UserError(
            f"rollout.vllm.mode is server, but no vLLM server answers: {error} Start it with "
            f"`{SERVER_COMMAND}` and check server_base_url, or server_host and server_port"
        ) from error
    if settings.mode == "server" and accelerator.is_main_process:
        check_server(generation.vllm_client.get_server_info())
    return VllmEngine(generation, policy)


def check_server(info: dict[str, Any]) -> None:
    """Raise UserError when a server's log-probabilities are not those at the sampling temperature.

    info: what its /server_info endpoint reports.
    """
    mode = info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise UserError(
            f"rollout.vllm.mode is server, and the server reports {mode}, taken before the temperature: "
            f"start it with `{SERVER_COMMAND}`"
        )


@dataclass
class VllmEngine:
    """Responses from vLLM. The weights it samples from are those of the last `sync`.

    policy: the module that generation was built with; it cannot generate for another.
    """

    uses_uniforms: ClassVar[bool] = False

    generation: Generation
    policy: nn.Module
    frozen: list[tuple[nn.Parameter, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.frozen = [
            (parameter, parameter.detach().to("cpu", copy=True)) for parameter in merged_into(self.policy)
        ]

    @torch.no_grad()
    def sync(self, policy: nn.Module) -> None:
        """Send the policy's weights; a LoRA adapter goes merged, and the weights under it come back exact."""
        assert policy is self.policy, "vLLM was started for another policy"
        self.generation.sync_weights()
        for parameter, original in self.frozen:
            parameter.copy_(original)

    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        """See Sampler; of uniforms_BN only the width is used. Every process calls this with equally many
        prompts.
        """
        assert policy is self.policy, "vLLM was started for another policy"
        self.generation.max_completion_length = uniforms_BN.shape[1]
        _, responses, logprobs, _ = self.generation.generate(prompts=prompts, images=None, num_generations=1)
        if logprobs is None or len(responses) != len(prompts):
            raise PosttrainError(
                f"vLLM returned {len(responses)} responses for {len(prompts)} prompts, "
                f"{'without' if logprobs is None else 'with'} log-probabilities"
            )
        return Samples(
            [list(response) for response in responses],
            [[_finite(values[0]) for values in row] for row in logprobs],
        )

    def close(self) -> None:
        """Let go of vLLM: its memory goes with the last reference (colocate), the server goes on."""
        del self.generation


def merged_into(policy: nn.Module) -> list[nn.Parameter]:
    """The frozen weights that merging an adapter changes: those of the adapted layers."""
    return [
        parameter
        for module in policy.modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.get_base_layer().parameters()
        if not parameter.requires_grad
    ]


def _finite(value: float | None) -> float:
    """TRL hands NaN on as None."""
    return math.nan if value is None else value
