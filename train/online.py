"""Groups of answers: GRPO (Shao et al. 2024, 2402.03300) and RLOO (Ahmadian et al. 2024, 2402.14740).

    posttrain run configs/tiny/breadth.yaml --only grpo

TRL's GRPOTrainer and RLOOTrainer: several answers per prompt, each measured against the others. Departures:

- TRL gives a reward model the answer as text without special tokens, rendered anew, so that it never sees the
  end token it was trained to read. Here one reward function gets the sampled ids, and scores prompt and
  answer as they were: with the end token where the policy wrote one, without it where it was cut off.
- The rewards are the ppo stage's: reward models, Python functions, penalties, with their weights.
- Prompts are shuffled once, with the stage's seed. TRL's sampler draws a new order in every pass but keeps no
  record of it in a checkpoint, so that a run resumed in a later pass would see other prompts.
- The reference is the model given, or the adapter given; see ``train/adapters.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import GRPOTrainer, RLOOTrainer

from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy, refuse_adapter
from train.finish import train_and_save
from train.online_config import GrpoConfig, OnlineConfig, RlooConfig
from train.peft_setup import quiet_libraries
from train.ppo.config import MissingEos
from train.ppo.reward_mix import Rewards, build_rewards
from train.ppo.reward_sources import RewardBatch, load_reward_models
from train.ppo.rewards import shape_scores
from train.prompts import Prompts, check_positions, end_with, read_prompts
from train.trainer_args import build_args
from train.trainer_rules import generation_period

TRAINERS: dict[type[OnlineConfig], tuple[str, Any]] = {
    GrpoConfig: ("grpo", GRPOTrainer),
    RlooConfig: ("rloo", RLOOTrainer),
}


def run(config: GrpoConfig | RlooConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/``: a PEFT directory, or a full model when ``peft`` is null.

    Raises:
        UserError: prompts, rewards or models do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or nothing was learned.
    """
    quiet_libraries()
    name, trainer_class = TRAINERS[type(config)]
    path = context.path("model")
    if config.peft is None:
        refuse_adapter(path, config.model)
    tokenizer = load_tokenizer(path)
    start = load_policy(path, config, context.checkpoints)
    end_with(start.model, tokenizer)
    args = build_args(config, context.checkpoints, shuffle_dataset=False)

    with context.phase("tokenize"):
        splits = [read_prompts(context, tokenizer, "train", config.max_prompt_tokens, name)]
        if args.eval_strategy != "no":
            splits.append(read_prompts(context, tokenizer, "eval", config.max_prompt_tokens, name))
        ids = [prompt for split in splits for prompt in split.ids]
        rows = concatenate_datasets([split.rows for split in splits])
        train_rows, *eval_rows = numbered(splits, config.seed)
    with context.phase("load"):
        rewards = load_rewards(config, context, start.model.config, tokenizer, rows, args)

    trainer = trainer_class(
        model=start.model,
        reward_funcs=reward_function(rewards, ids, config.missing_eos, tokenizer.eos_token_id),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows[0] if eval_rows else None,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    counts = {"prompts": len(splits[0].ids), "prompts_dropped": splits[0].dropped}
    period = generation_period(args)
    return counts | train_and_save(
        trainer, start, tokenizer, context, name, tokens_in_state=True, stop_period=period
    )


def numbered(splits: Sequence[Prompts], seed: int) -> list[Dataset]:
    """Each split as TRL takes it: ``prompt``, and ``row``, its place among the prompts of all splits.

    The first split, the one trained on, is shuffled with `seed`.
    """
    datasets, start = [], 0
    for split in splits:
        count = len(split.ids)
        rows = split.rows.select_columns(["prompt"]).add_column("row", list(range(start, start + count)))
        datasets.append(rows)
        start += count
    order = np.random.default_rng(seed).permutation(len(datasets[0])).tolist()
    return [datasets[0].select(order), *datasets[1:]]


def load_rewards(
    config: OnlineConfig,
    context: StageContext,
    model: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: Any,
) -> Rewards:
    """The rewards that the stage asks for, on the training device. Raises UserError where they do not fit."""
    lengths = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "trainer.max_completion_length": args.max_completion_length,
    }
    check_positions("model", model, lengths)
    fields = config.rewards.fields_beside(config.reward)
    loaded = load_reward_models(fields, context.path, context.path("model"))
    for member in loaded:
        if member.tokenizer is None:
            check_positions(member.field, member.model.config, lengths)
    limit = config.micro_batch_tokens
    return build_rewards(config.rewards, [], loaded, tokenizer, rows, max_tokens=limit, device=args.device)


def reward_function(
    rewards: Rewards, prompt_ids: Sequence[list[int]], missing_eos: MissingEos, eos_id: int
) -> Callable[..., list[float]]:
    """The one reward function that TRL calls; the unweighted parts go to the metrics as ``reward/NAME``."""

    def total(
        completion_ids: list[list[int]], row: list[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        finished = [ids[-1] == eos_id for ids in completion_ids]
        batch = RewardBatch([prompt_ids[place] for place in row], completion_ids, finished, row)
        result = rewards(batch)
        for name, scores_B in result.parts.items():
            log_metric(f"reward/{name}", scores_B.mean().item())
        finished_B = torch.tensor(finished, device=result.total_B.device)
        return shape_scores(result.total_B, finished_B, missing_eos, None).tolist()

    return total
