"""Rollouts by transformers' paged continuous batching: a response that ends makes room for the next prompt.

What the library leaves open is settled here:
- the weights are those of the policy passed to the call. Its key-value cache is made anew for every call: one
  kept across updates would hold keys and values of old weights;
- all requests are queued before its thread starts, so that batches, and with them the random numbers, are a
  function of the call. (generate_batch starts the thread first: two runs with one seed then differ.)
- it seeds torch's global generators; they are put back, and the seed comes from the episodes' uniforms;
- its thread does not see the caller's autocast; 16-bit rollouts run on a temporary 16-bit copy of the
  weights, so that neither the trained weights nor what hangs on them (DDP's hooks) are touched;
- it changes the model's attention implementation and keeps it changed when it fails at the start.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from posttrain.errors import PosttrainError, UserError
from train.ppo.engines.base import Samples, SamplingParams
from train.ppo.engines.config import ContinuousSettings

SAFETY_MARGIN = 0.15
"""Share of the cache that the library's scheduler keeps free of new prompts (its FIFO default)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ContinuousEngine:
    """At most max_rows responses at a time, in a paged cache of bounded size.

    The distribution is the library's softmax(logits.float() / temperature), and so are the log-probabilities
    it returns. Responses are reproducible for given prompts, weights and uniforms; they are not those of
    HfSampler, and they change with the prompts of the call.
    """

    uses_uniforms: ClassVar[bool] = False

    sampling: SamplingParams
    eos_id: int
    pad_id: int
    settings: ContinuousSettings = ContinuousSettings()
    max_rows: int = 64

    def sync(self, policy: nn.Module) -> None:
        """Nothing to do: the weights are those of the module passed to every call."""

    def close(self) -> None:
        """Nothing is held between calls."""

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        """See Sampler; uniforms_BN gives the seed and, by its width, the longest response.

        Raises UserError where the model or the bounds rule the engine out, PosttrainError when it dies.
        """
        with _generating(base_model(policy), self.settings) as model, _only_new_objects_collected():
            config = batching_config(
                self.settings,
                [len(prompt) for prompt in prompts],
                uniforms_BN.shape[1],
                self.max_rows,
                accelerated=model.device.type != "cpu",
                half=model.dtype.itemsize == 2,
                seed=int(uniforms_BN[0, 0] * 2**32),
            )
            generation = GenerationConfig(
                do_sample=True,
                temperature=self.sampling.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=uniforms_BN.shape[1],
                eos_token_id=self.eos_id,
                pad_token_id=self.pad_id,
            )
            outputs = _generate(model, prompts, generation, config)
        responses = [output.generated_tokens for output in outputs]
        logprobs = [output.logprobs for output in outputs]
        for response, values in zip(responses, logprobs, strict=True):
            assert len(response) == len(values) > 0, "the library returned tokens without log-probabilities"
        return Samples(responses, logprobs)


def base_model(policy: nn.Module) -> PreTrainedModel:
    """The transformers model that generates. A LoRA adapter lives in its layers, so it is included.

    Raises UserError for a policy that transformers cannot generate with, or not with its own distribution.
    """
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UserError(
            f"rollout.engine is continuous, but the policy is a {type(model).__name__}, which transformers "
            "cannot generate with: use rollout.engine: hf"
        )
    softcap = model.config.get_text_config().to_dict().get("attn_logit_softcapping")
    if softcap is not None and not is_flash_attention_requested(model.config):
        raise UserError(
            f"rollout.engine is continuous, but this model caps its attention logits (at {softcap}), which "
            "transformers' paged attention leaves out unless the model is loaded with flash attention: it "
            "would sample from another distribution. Use rollout.engine: hf"
        )
    return model


def batching_config(
    settings: ContinuousSettings,
    prompt_lengths: list[int],
    max_new_tokens: int,
    max_rows: int,
    *,
    accelerated: bool,
    half: bool,
    seed: int,
) -> ContinuousBatchingConfig:
    """The library's configuration for one call: sizes that are null are what these prompts need.

    accelerated: not on the CPU; half: 16-bit weights. Raises UserError when the longest sequence does not fit
    into max_blocks.
    """
    page = settings.page_size or (256 if accelerated else 16)
    rows = min(max_rows, len(prompt_lengths))
    longest = max(prompt_lengths) + max_new_tokens
    per_row = math.ceil(longest / page)
    blocks = settings.max_blocks
    if blocks is None:
        blocks = math.ceil((rows * per_row + 1) / (1 - SAFETY_MARGIN))
    elif blocks < per_row:
        raise UserError(
            f"rollout.continuous.max_blocks {blocks} holds {blocks * page} tokens, but the longest prompt "
            f"and max_new_tokens make {longest}: set max_blocks to at least {per_row}, or leave it out"
        )
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=blocks,
        max_batch_tokens=min(settings.max_batch_tokens, max(sum(prompt_lengths), rows)),
        max_requests_per_batch=rows,
        max_memory_percent=settings.max_memory,
        safety_margin=SAFETY_MARGIN,
        return_logprobs=True,
        seed=seed,
        auto_switch_to_flash=settings.flash and accelerated and half,
        drop_unsupported_processors=False,
    )


def _generate(
    model: Any,
    prompts: list[list[int]],
    generation: GenerationConfig,
    config: ContinuousBatchingConfig,
) -> list[Any]:
    """One GenerationOutput per prompt, in order; the library's thread lives as long as this call."""
    try:
        manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
    except ValueError as error:
        raise UserError(
            f"rollout.engine is continuous, but transformers cannot run it for this model: {error}. Use "
            "rollout.engine: hf, or load the model with attention sdpa, eager or flash"
        ) from error
    manager.add_requests(prompts, max_new_tokens=generation.max_new_tokens)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    manager.start()
    try:
        outputs = _collect(manager, len(prompts))
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
    _require_all(outputs, len(prompts), manager.background_thread_status.fatal_error)
    return [outputs[f"req_{index}"] for index in range(len(prompts))]


def _collect(manager: Any, count: int) -> dict[str, Any]:
    """Results by request, until there are `count` or the first failure."""
    outputs: dict[str, Any] = {}
    while len(outputs) < count:
        output = manager.get_result(timeout=1.0)
        if output is not None:
            outputs[output.request_id] = output
            if output.error is not None:
                break
        elif manager.background_thread_status.fatal_error is not None or not manager.is_running():
            break
    return outputs


def _require_all(outputs: dict[str, Any], count: int, error: Exception | None) -> None:
    """Raise UserError when the cache did not fit into memory, PosttrainError for any other failure."""
    if isinstance(error, MemoryError):
        raise UserError(
            f"rollout.engine continuous does not fit into rollout.continuous.max_memory: {error} (bytes). "
            "Raise max_memory, or lower rollout.max_rows or rollout.continuous.max_batch_tokens"
        ) from error
    failures = [output.error for output in outputs.values() if output.error is not None]
    if failures or len(outputs) < count:
        reason = error or failures or "its thread ended"
        raise PosttrainError(
            f"rollout.engine continuous stopped after {len(outputs) - len(failures)} of {count} responses: "
            f"{reason}. rollout.engine: hf writes them without it"
        ) from error


@contextmanager
def _only_new_objects_collected() -> Iterator[None]:
    """The library collects garbage twice per call; over the objects of a whole training process that takes
    half a second each time, over those made in the call nothing.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _generating(model: PreTrainedModel, settings: ContinuousSettings) -> Iterator[PreTrainedModel]:
    """The model to generate with, in the type asked for. On leaving, the policy's attention implementation,
    training mode and torch's random state are what they were.
    """
    device = model.device
    dtype = _generation_dtype(model, settings)
    attention, training = model.config._attn_implementation, model.training
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_rng(device)):
        try:
            yield model if dtype == model.dtype else copy_in(model, dtype)
        finally:
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            model.train(training)


def _rng(device: torch.device) -> str:
    """fork_rng asks for an accelerator's name even where it has none to save."""
    return "cuda" if device.type == "cpu" else device.type


def _generation_dtype(model: PreTrainedModel, settings: ContinuousSettings) -> torch.dtype:
    if settings.dtype is not None:
        return DTYPES[settings.dtype]
    if torch.is_autocast_enabled(model.device.type):
        return torch.get_autocast_dtype(model.device.type)
    return model.dtype


def copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose floating-point parameters are of `dtype`, without a copy in the old type in between.

    Buffers keep their type (rotary frequencies are float32 in every model). The original is not touched.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            parameter.detach().to(dtype if parameter.is_floating_point() else parameter.dtype),
            requires_grad=False,
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
