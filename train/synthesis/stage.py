"""Synthesize: a policy answers every prompt n times, the answers are scored, and the best become a data set.

    posttrain run configs/tiny/synthetic.yaml

Best against worst of n makes preference pairs with margins; the best alone make demonstrations, the rejection
sampling of RAFT (Dong et al. 2023, 2304.06767) and Llama 2 (Touvron et al. 2023, 2307.09288, section 3.2.2).
Prompts go through in batches, each saved when it is answered and scored, so that an interrupted run goes on
with the same result. Choices that the papers leave open: unfinished answers are left out, identical ones
count once, and a prompt whose answers all tie gives nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import SPLITS, Split, read_info, read_split
from data_prep.figures import figures_of
from data_prep.ingest import Reject
from data_prep.records import excerpt
from posttrain.errors import DataError, RequeueError, UserError
from posttrain.inputs import ResolvedInput
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import atomic_write_text, read_rows
from posttrain.stage import StageContext
from train.peft_setup import quiet_libraries
from train.ppo.engines.base import SamplingParams
from train.ppo.engines.build import build_engine
from train.ppo.reward_mix import build_rewards
from train.ppo.reward_sources import load_reward_models
from train.ppo.rollout import encode_prompts
from train.ppo.stage import build_accelerator
from train.prompts import check_positions
from train.synthesis.config import SynthesizeConfig
from train.synthesis.dataset import describe, select, write_directory
from train.synthesis.judge import Judge
from train.synthesis.sampling import AnswerSampler, Nucleus, Prompt, RewardScorer, Scorer
from train.synthesis.selection import Answered
from train.synthesis.summary import ANSWERS_FILE, statistics

TOO_LONG = "prompt_too_long"
LINEAGE = ("policy", "prompts", "scorer", "sampling")
"""What a run that selects from another one's answers takes over from its dataset.json."""


def run(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """Write the dataset directory; returns counts, drops and scores. Resumes after the last saved batch.

    Raises UserError when models, prompts and settings do not go together, DataError when a side of the data
    set would be empty, RequeueError after SIGTERM, PosttrainError when a judge stays away.
    """
    quiet_libraries()
    if config.answers is not None:
        source = context.path("answers")
        answered, too_long, parent = reuse(source)
        lineage, prompts_in = parent["synthesis"], parent["rows_in"]
        origin = {name: parent["sources"][0][name] for name in ("name", "rows", "sha256")}
        split = parent["split"]
    else:
        answered, too_long = sample(config, context)
        lineage, prompts_in = describe_sampling(config, context), len(answered) + len(too_long)
        found = context.inputs["data"]
        origin = {"name": name_of(found), "rows": prompts_in, "sha256": found.content_hash}
        split = split_of(context.path("data"))
    with context.phase("select"):
        selected = select(config, answered, too_long)
        numbers = {name: lineage[name] for name in LINEAGE} | statistics(answered, config.truncated)
        figures = figures_of(config.kind, selected.rows)
        info = describe(config, selected, figures, prompts_in, origin, split, numbers)
    with context.phase("write"):
        write_directory(context.run_dir, info, selected, figures, answered)
    return summary(info, context)


def sample(config: SynthesizeConfig, context: StageContext) -> tuple[list[Answered], list[Reject]]:
    """Every prompt with its scored answers, from the batches that are saved or anew; the prompts that are too
    long.
    """
    accelerator = build_accelerator(bf16=False)
    if accelerator.num_processes > 1:
        raise UserError(
            f"synthesize runs on one process, and the launcher started {accelerator.num_processes}: start it "
            "without torchrun; rollout.engine vllm spreads one model over several GPUs"
        )
    with context.phase("load"):
        tokenizer = load_tokenizer(context.path("model"))
        prompts, too_long = read_prompts(config, context, tokenizer)
        policy = load_causal_lm(context.path("model"), config.dtype).requires_grad_(False)
        check_positions("model", policy.config, config.lengths)
        policy.to(accelerator.device)
        scorer = build_scorer(config, context, tokenizer, prompts, accelerator.device)
        engine = build_engine(
            config.rollout,
            SamplingParams(config.max_new_tokens, config.temperature),
            policy,
            tokenizer,
            accelerator,
            max_prompt_tokens=config.max_prompt_tokens,
        )
    try:
        engine.sync(policy)
        sampled = Nucleus(policy, config.temperature, config.top_p) if config.top_p < 1 else policy
        sampler = AnswerSampler(
            engine, sampled, tokenizer, scorer, config.n, config.max_new_tokens, config.seed
        )
        with context.phase("sample"), PreemptionFlag() as flag:
            return answer_all(config, context, prompts, sampler, flag), too_long
    finally:
        engine.close()


def read_prompts(
    config: SynthesizeConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Reject]]:
    """The prompts of both sides that fit max_prompt_tokens, train before eval, and those that do not."""
    prompts: list[Prompt] = []
    too_long: list[Reject] = []
    limits: dict[Split, int | None] = {"train": config.train_prompts, "eval": config.eval_prompts}
    for split in SPLITS:
        rows = read_split(context.path("data"), split, "prompt").to_list()[: limits[split]]
        ids, kept = encode_prompts([row["prompt"] for row in rows], tokenizer, config.max_prompt_tokens)
        for tokens, index in zip(ids, kept, strict=True):
            prompts.append(Prompt(split, index + 1, rows[index], tokens, len(prompts)))
        for index in sorted(set(range(len(rows))) - set(kept)):
            detail = f"more than max_prompt_tokens={config.max_prompt_tokens} tokens"
            text = excerpt(rows[index]["prompt"][-1]["content"])
            too_long.append(Reject(f"{split}.parquet", index + 1, TOO_LONG, detail, text))
    return prompts, too_long


def build_scorer(
    config: SynthesizeConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    device: Any,
) -> Scorer:
    """The judge, or the rewards that the ppo stage has. Raises UserError where they do not fit."""
    if config.judge is not None:
        unfinished = config.truncated == "mark"
        return Judge(config.judge, context.path("judge.prompt"), config.n, unfinished=unfinished)
    fields = config.rewards.fields_beside(config.reward)
    loaded = load_reward_models(fields, context.path, context.path("model"))
    for member in loaded:
        if member.tokenizer is None:
            check_positions(member.field, member.model.config, config.lengths)
    kept: dict[str, list[int]] = {
        split: [prompt.line - 1 for prompt in prompts if prompt.split == split] for split in SPLITS
    }
    data = context.path("data")
    rows = concatenate_datasets([read_split(data, side, "prompt").select(kept[side]) for side in SPLITS])
    limit = config.micro_batch_tokens
    rewards = build_rewards(config.rewards, [], loaded, tokenizer, rows, max_tokens=limit, device=device)
    return RewardScorer(rewards, tuple(item.label for item in config.rewards.functions if item.weight))


def answer_all(
    config: SynthesizeConfig,
    context: StageContext,
    prompts: Sequence[Prompt],
    sampler: AnswerSampler,
    flag: PreemptionFlag,
) -> list[Answered]:
    """Batch by batch: read back where it is saved, else answered, scored and saved. Raises RequeueError."""
    context.checkpoints.mkdir(exist_ok=True)
    starts = range(0, len(prompts), config.batch_size)
    answered: list[Answered] = []
    with context.progress("synthesize: prompts", len(prompts)) as bar:
        for number, start in enumerate(starts, 1):
            batch = prompts[start : start + config.batch_size]
            file = context.checkpoints / f"answers-{start:08d}.jsonl"
            if file.is_file():
                done = [Answered.from_json(row) for row in read_rows(file)]
            else:
                groups = sampler(batch)
                done = [
                    Answered(prompt.split, prompt.line, prompt.row, answers)
                    for prompt, answers in zip(batch, groups, strict=True)
                ]
                save(file, done)
                scores = [a.score for one in done for a in one.answers if a.score is not None]
                mean = sum(scores) / len(scores) if scores else None
                context.log(number, prompts=start + len(batch), score=mean, scored=len(scores))
            answered += done
            bar.advance(len(batch))
            if flag.requested and number < len(starts):
                raise RequeueError(f"prompt batch {number} of {len(starts)}")
    return answered


def save(file: Path, done: Sequence[Answered]) -> None:
    """One batch, there completely or not at all."""
    lines = (json.dumps(one.as_json(), ensure_ascii=False, allow_nan=False) + "\n" for one in done)
    atomic_write_text(file, "".join(lines))


def reuse(directory: Path) -> tuple[list[Answered], list[Reject], dict[str, Any]]:
    """The scored answers of a finished synthesize run, its prompts that were too long, and its dataset.json.

    Raises DataError when it is another kind of run.
    """
    info = read_info(directory)
    if info is None or "synthesis" not in info or not (directory / ANSWERS_FILE).is_file():
        raise DataError(
            f"answers: {directory} holds no scored answers ({ANSWERS_FILE})\n"
            "    name the run directory of a synthesize stage"
        )
    answered = [Answered.from_json(row) for row in read_rows(directory / ANSWERS_FILE)]
    rejects = [Reject(**row) for row in read_rows(directory / "rejects.jsonl")]
    return answered, [reject for reject in rejects if reject.reason == TOO_LONG], info


def describe_sampling(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """Where the answers come from and how they were scored: names without folders, and content hashes."""

    def named(field: str) -> dict[str, str]:
        found = context.inputs[field]
        return {"name": name_of(found), "content_hash": found.content_hash}

    scorer: dict[str, Any] = {}
    for field in context.inputs:
        if field == "reward" or field.startswith(("rewards.", "judge.")):
            scorer[field] = named(field)
    if config.judge is not None:
        scorer["judge"] = config.judge.model_dump(exclude={"prompt", "api_key_env"})
    else:
        scorer["rewards"] = config.rewards.model_dump(exclude_defaults=True, exclude={"ensemble": {"models"}})
    sampling = ("n", "temperature", "top_p", "max_prompt_tokens", "max_new_tokens", "seed", "dtype")
    settings = config.model_dump(include={*sampling})
    return {
        "policy": named("model"),
        "prompts": named("data"),
        "scorer": scorer,
        "sampling": {name: settings[name] for name in sampling} | {"engine": config.rollout.engine},
    }


def name_of(found: ResolvedInput) -> str:
    """What an input is called: its run, its Hub id, or the last part of its path."""
    if found.manifest is not None:
        return str(found.manifest.get("name"))
    return found.hub_id or Path(found.ref).name


def split_of(directory: Path) -> dict[str, Any]:
    """How the prompts were divided, as their dataset.json says."""
    split = (read_info(directory) or {}).get("split", {})
    return {
        "by": split.get("by", "the files of the prompts"),
        "salt": split.get("salt", ""),
        "eval_fraction": split.get("eval_fraction", 0.0),
    }


def summary(info: dict[str, Any], context: StageContext) -> dict[str, Any]:
    """Says what became of the prompts, and returns it for the manifest."""
    counts, synthesis = info["rows_out"], info["synthesis"]
    for reason, count in synthesis["answers_left_out"].items():
        _say(context, f"left out {count:,} of {synthesis['sampled']:,} answers: {reason}")
    for reason, count in info["drops"].items():
        _say(context, f"dropped {count:,} of {info['rows_in']:,} prompts: {reason} (see rejects.jsonl)")
    _say(context, f"kept {counts['train']:,} rows to train on and {counts['eval']:,} to evaluate on")
    last = synthesis["best_of_n"][-1] if synthesis["best_of_n"] else None
    return {
        "prompts": info["rows_in"],
        "answers": synthesis["sampled"],
        "rows_out": counts["train"] + counts["eval"],
        "train_rows": counts["train"],
        "eval_rows": counts["eval"],
        "drops": info["drops"],
        "answers_left_out": synthesis["answers_left_out"],
        "score_mean": None if synthesis["scores"] is None else synthesis["scores"]["mean"],
        "score_best_of_n": None if last is None else last["score"],
        "kl_bound": None if last is None else last["kl_bound"],
        "content_hash": info["content_hash"],
    }


def _say(context: StageContext, line: str) -> None:
    context.console.print(f"synthesize: {line}", markup=False, highlight=False, soft_wrap=True)
