"""From the `rollout:` block to the engine it names."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from train.ppo.engines.base import RolloutEngine, SamplingParams
from train.ppo.engines.config import RolloutConfig
from train.ppo.engines.hf import HfSampler


def build_engine(
    config: RolloutConfig,
    sampling: SamplingParams,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    max_prompt_tokens: int,
) -> RolloutEngine:
    """The engine of `config.engine`, ready for its first `sync`. Every process calls this.

    policy: the module that rollouts come from, unwrapped and on its device. Raises UserError where the engine
    cannot run.
    """
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if config.engine == "vllm":
        from train.ppo.engines.vllm import start_vllm

        return start_vllm(
            config.vllm,
            sampling,
            policy,
            accelerator,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            max_rows=config.max_rows,
        )
    if config.engine == "continuous":
        from train.ppo.engines.continuous import ContinuousEngine, base_model

        require_whole_weights(accelerator)
        base_model(policy)
        return ContinuousEngine(sampling, eos_id, pad_id, config.continuous, config.max_rows)
    return HfSampler(eos_id, pad_id, sampling.temperature, config.max_rows)


def require_whole_weights(accelerator: Accelerator) -> None:
    """Raise UserError where no process holds the whole policy: the paged engine takes its weights as they
    lie in memory.
    """
    plugin = accelerator.state.deepspeed_plugin
    sharded = accelerator.distributed_type == DistributedType.FSDP or (
        plugin is not None and plugin.zero_stage == 3
    )
    if sharded:
        raise UserError(
            "rollout.engine is continuous, but the launch configuration shards the policy's weights "
            f"({accelerator.distributed_type.value}): use rollout.engine vllm or hf, or launch with DDP "
            "or ZeRO stage 2"
        )
