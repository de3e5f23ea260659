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

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


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
        from train.ppo.engines.vllm_engine import start_vllm

        return start_vllm(
            config.vllm,
            sampling,
            policy,
            accelerator,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            max_rows=config.max_rows,
        )
    require_attention(policy, config.engine)
    if config.engine == "continuous":
        from train.ppo.engines.continuous import ContinuousEngine, base_model

        require_whole_weights(accelerator)
        base_model(policy)
        return ContinuousEngine(sampling, eos_id, pad_id, config.continuous, config.max_rows)
    return HfSampler(eos_id, pad_id, sampling.temperature, config.max_rows)


def require_attention(policy: PreTrainedModel | PeftModel, engine: str) -> None:
    """Raise UserError for layers with a recurrent state (linear attention, Mamba): their cache cannot drop
    the rows that ended, and padding on the left goes into the state.
    """
    kinds = set(policy.config.get_text_config().to_dict().get("layer_types") or ()) - ATTENTION
    if kinds:
        raise UserError(
            f"rollout.engine is {engine}, which cannot run this model's layers of type "
            f"{', '.join(sorted(kinds))}: use rollout.engine vllm"
        )


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
