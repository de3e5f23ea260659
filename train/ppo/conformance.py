"""`posttrain conformance`: the invariants that PPO rests on, measured on a model of the user's own.

    posttrain conformance --model runs/tiny/sft-merged --reward runs/tiny/reward --peft 8

Builds the networks and the trainer that the `ppo` stage would build, on four short prompts and responses of
at most 12 tokens, and measures how far each invariant is from holding. Nothing is written but a checkpoint in
a temporary directory.

Memory: the networks (4 bytes per parameter and copy: policy, reference, value network and reward model, or
one base with `--peft` and a LoRA reward model), and for each trained parameter 20 bytes more (gradient twice,
two moments of AdamW, a copy). The checkpoint takes 12 bytes per trained parameter on disk.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer
from posttrain.inputs import download, resolve
from posttrain.models import is_adapter, load_chat_tokenizer
from train.peft_config import PeftSettings
from train.peft_setup import quiet_libraries
from train.ppo.batches import TokenBatch
from train.ppo.config import PpoStageConfig
from train.ppo.engines.build import require_attention
from train.ppo.engines.hf import HfSampler
from train.ppo.experience import NotFiniteError, Rollout
from train.ppo.layouts import load_networks, make_ready
from train.ppo.reward_config import LengthPenalty, RewardsConfig
from train.ppo.reward_mix import Rewards
from train.ppo.reward_sources import NetworkReward, RewardBatch, RewardSource
from train.ppo.rollout import encode_prompts
from train.ppo.stage import require_positions
from train.ppo.trainer import PpoTrainer

Dtype = Literal["float32", "bfloat16"]
QUESTIONS = (
    "Where is my order?",
    "Please tell me in two sentences how a refund works, and how long it takes until I have my money.",
    "Hello!",
    "The lamp that I bought last week does not switch on. What can I do?",
)
NEW_TOKENS, EPOCHS, LEARNING_RATE = 12, 2, 1e-5


@dataclass(frozen=True)
class Result:
    """One invariant: how far from holding it is, how far it may be and why, what it means beyond that."""

    invariant: str
    deviation: float
    bound: float
    reason: str
    meaning: str

    @property
    def passed(self) -> bool:
        """False for a deviation that is not a number, too."""
        return self.deviation <= self.bound


@dataclass(frozen=True)
class Report:
    """All results of one model."""

    model: str
    reward: str | None
    peft: int | None
    device: str
    dtype: str
    layout: str
    memory_gib: float
    results: list[Result]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """JSON values; a deviation that is not finite becomes a string."""
        rows = [
            asdict(result)
            | {"passed": result.passed}
            | ({} if math.isfinite(result.deviation) else {"deviation": str(result.deviation)})
            for result in self.results
        ]
        facts = {name: value for name, value in vars(self).items() if name != "results"}
        return facts | {"passed": self.passed, "invariants": rows}

    def print(self, console: Console) -> None:
        """A table of all invariants, and below it what the failed ones mean."""
        table = Table("invariant", "measured", "bound", "", title=f"PPO invariants of {self.model}")
        for result in self.results:
            verdict = Text("pass", style="green") if result.passed else Text("FAIL", style="bold red")
            numbers = (Text(f"{x:.1e}" if x else "0") for x in (result.deviation, result.bound))
            table.add_row(Text(result.invariant), *numbers, verdict)
        console.print(table)
        console.print(
            Text(f"layout {self.layout}, {self.dtype} on {self.device}, about {self.memory_gib:.2g} GiB")
        )
        failed = [result for result in self.results if not result.passed]
        for result in failed:
            console.print(Text(f"\nFAIL {result.invariant}", style="bold red"))
            console.print(Text(f"  {result.meaning}\n  bound: {result.reason}"))
        count = len(self.results)
        summary = f"{len(failed)} of {count} invariants fail" if failed else f"all {count} invariants hold"
        console.print(Text(summary, style="bold"))


class EvenTokens:
    """Stands in for a reward model: the share of even token ids in the response."""

    name, weight = "even_tokens", 1.0

    def __call__(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([sum(t % 2 == 0 for t in row) / len(row) for row in batch.responses])


class Subject:
    """The model under test: a trainer over it, one rollout, and the means to build the trainer anew."""

    def __init__(
        self,
        config: PpoStageConfig,
        model_dir: Path,
        reward_dir: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model_dir, self.reward_dir = config, model_dir, reward_dir
        self.tokenizer, self.accelerator = tokenizer, accelerator
        self.eos_id = cast(int, tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id)
        self.prompts = _prompts(tokenizer)
        self.trainer, self.layout = self.build()
        self.rollout: Rollout = self.trainer.generate()
        self.update: dict[str, float] | None = None
        """Metrics of the first update, once it has been taken."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def build(self) -> tuple[PpoTrainer, str]:
        """A trainer over freshly loaded weights, and its layout in words."""
        networks, layout = load_networks(self.config, self.model_dir, self.reward_dir)
        policy = networks.policy_model
        require_attention(policy, "hf")
        require_positions("model", networks.policy_trunk.plain.config, self.config)
        make_ready(networks, self.config, self.device, self.prompts, self.pad_id)
        source: RewardSource = EvenTokens()
        if networks.reward_trunk is not None:
            source = NetworkReward(networks, self.config.micro_batch_tokens, self.pad_id)
        trainer = PpoTrainer(
            self.config,
            self.accelerator,
            networks,
            Rewards(RewardsConfig(), [source], [], self.device, lambda total: total),
            HfSampler(self.eos_id, self.pad_id, self.config.temperature),
            self.prompts,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )
        return trainer, layout

    def rebuild(self) -> None:
        """Let go of the trainer and build another; there are never two in memory."""
        del self.trainer
        gc.collect()
        self.trainer, _ = self.build()

    def tokens(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenBatch:
        return TokenBatch.build(prompts, responses, self.pad_id, self.device)

    @property
    def batch(self) -> TokenBatch:
        """All of the rollout."""
        return self.tokens(self.rollout.prompts, self.rollout.responses)

    def singles(self) -> list[TokenBatch]:
        """The rollout's rows one by one, without padding."""
        pairs = zip(self.rollout.prompts, self.rollout.responses, strict=True)
        return [self.tokens([prompt], [response]) for prompt, response in pairs]

    def first_update(self) -> dict[str, float]:
        """Metrics of the first update after loading; taken once."""
        if self.update is None:
            self.update = self.trainer.run_update()
        return self.update

    def memory_gib(self) -> float:
        """About what the checks hold at most, activations left out."""
        every = sum(p.numel() * p.element_size() for p in self.trainer.networks.parameters())
        parts = self.trainer.updater.trained.values()
        trained = sum(p.numel() * p.element_size() for part in parts for p in part.values())
        return (every + 5 * trained) / 2**30


def check_model(
    model: str,
    reward: str | None = None,
    peft: int | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
) -> Report:
    """Measure every invariant that applies. model, reward: a run directory, a path or a Hub id; peft: rank of
    a LoRA policy, None trains all weights; device: "cpu" or "cuda", None takes what is there.

    Raises UserError for what cannot be loaded or does not go together.
    """
    from train.ppo.conformance_invariants import INVARIANTS

    quiet_libraries()
    subject = make_subject(model, reward, peft, device, dtype)
    results = []
    for invariant in INVARIANTS:
        try:
            deviation = invariant.measure(subject)
        except NotFiniteError:
            deviation = math.nan
        if deviation is not None:
            bound, reason = invariant.bound.of(dtype, subject.device.type)
            results.append(Result(invariant.name, deviation, bound, reason, invariant.meaning))
    kind = subject.device.type
    return Report(model, reward, peft, kind, dtype, subject.layout, subject.memory_gib(), results)


def make_subject(model: str, reward: str | None, peft: int | None, device: str | None, dtype: str) -> Subject:
    """Load everything. Raises UserError, see check_model."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: use float32, or bfloat16 (autocast over float32 weights)")
    accelerator = _accelerator(device, dtype)
    model_dir = download(resolve(model, "model")).resolve()
    reward_dir = None if reward is None else download(resolve(reward, "model")).resolve()
    if reward_dir is not None and fingerprint_tokenizer(reward_dir) != fingerprint_tokenizer(model_dir):
        raise UserError(
            f"--reward {reward}: has a tokenizer or chat template of its own, so it does not read the token "
            f"ids of {model}; give a reward model that was trained from the same base, or leave --reward out"
        )
    tokenizer = load_chat_tokenizer(model_dir)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: the tokenizer has no end token, without which no response can end")
    prompts = _prompts(tokenizer)
    config = PpoStageConfig(
        model=model,
        reward=reward,
        # Without a reward model the trainer is given `EvenTokens`; the configuration has to name something.
        rewards=RewardsConfig(
            length_penalty=None if reward else LengthPenalty(per_token=0.01, free_tokens=0)
        ),
        data="built-in prompts",
        total_episodes=8 * len(prompts),
        batch_size=len(prompts),
        num_ppo_epochs=EPOCHS,
        max_prompt_tokens=max(map(len, prompts)),
        max_new_tokens=NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        peft=None if peft is None else _lora(model_dir, peft),
        bf16=dtype == "bfloat16",
    )
    return Subject(config, model_dir, reward_dir, tokenizer, accelerator)


def _lora(model_dir: Path, rank: int) -> PeftSettings:
    """LoRA of this rank; where the model is an adapter that PPO continues, with that adapter's settings."""
    if not is_adapter(model_dir):
        return PeftSettings(r=rank, lora_alpha=2 * rank)
    file = model_dir / "adapter_config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    if own["r"] != rank:
        raise UserError(f"--peft {rank}: the model is an adapter of rank {own['r']}; give --peft {own['r']}")
    kept = {name: own[name] for name in ("lora_alpha", "use_rslora", "use_dora") if name in own}
    return PeftSettings(r=rank, **kept)


def _accelerator(device: str | None, dtype: str) -> Accelerator:
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or check the driver")
    AcceleratorState._reset_state()
    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if dtype == "bfloat16" else "no")


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    try:
        return encode_prompts(conversations, tokenizer, max_prompt_tokens=2**20)[0]
    except TemplateError as error:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template does not render one user turn ({error})"
        ) from error
