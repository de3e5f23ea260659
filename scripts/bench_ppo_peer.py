"""TRL 1.12.0's PPO on the models of `bench_ppo.py`, in a process of its own.

    python scripts/bench_ppo_peer.py FOLDER SEED RESULT.json --path build/trl-1.12.0

Phases are timed from outside, by wrapping the functions that the peer's training loop calls; nothing it
computes is changed. Configured for speed: the whole rollout is generated at once, no gradient checkpointing,
no sample generations, no saving, no reporting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_ppo_common import PeakMemory, Settings, now, prepare_process

VERSION = "1.12.0"


class Phases:
    """Seconds per phase of each update, and the moments at which an update's parts begin and end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.update_began: float | None = None
        self.began = now(device)
        self.lengths: list[int] = []
        self.rows: list[dict[str, float]] = []

    def wrap(self, function: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        """`function`, its time added to the phase that `phase(*args)` names."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            name = phase(*args)
            start = now(self.device)
            if name.startswith("update") and self.update_began is None:
                self.update_began = start
            result = function(*args, **kwargs)
            self.seconds[name] += now(self.device) - start
            return result

        return timed

    def end_update(self, metrics: dict[str, float]) -> None:
        """Close one update: what came after the first training forward is its update phase."""
        end = now(self.device)
        assert self.update_began is not None
        self.seconds["update"] = end - self.update_began
        self.rows.append(
            {f"seconds_{name}": value for name, value in self.seconds.items()}
            | {"seconds": end - self.began, "response_length": sum(self.lengths) / len(self.lengths)}
            | metrics
        )
        self.seconds.clear()
        self.lengths.clear()
        self.update_began, self.began = None, end


def watch(module: Any, trainer: Any, phases: Phases) -> None:
    """Wrap the functions of the peer's module and of its accelerator and optimizer."""
    import torch

    def forward_phase(*_: Any) -> str:
        return "update/forward" if torch.is_grad_enabled() else "reference"

    def reward_phase(model: Any, *_: Any) -> str:
        return "scoring/reward" if model is trainer.reward_model else "scoring/value"

    truncate = module.truncate_response

    def truncate_and_count(stop_id: int, pad_id: int, responses: Any) -> Any:
        kept = truncate(stop_id, pad_id, responses)
        phases.lengths.extend((kept != pad_id).sum(-1).tolist())
        return kept

    def logprob_phase(*_: Any) -> str:
        return "update/logprobs" if torch.is_grad_enabled() else "scoring/logprobs"

    module.truncate_response = truncate_and_count
    module.batch_generation = phases.wrap(module.batch_generation, lambda *_: "rollout")
    module.forward = phases.wrap(module.forward, forward_phase)
    module.get_reward = phases.wrap(module.get_reward, reward_phase)
    module.selective_log_softmax = phases.wrap(module.selective_log_softmax, logprob_phase)
    trainer.accelerator.backward = phases.wrap(trainer.accelerator.backward, lambda *_: "update/backward")
    trainer.optimizer.step = phases.wrap(trainer.optimizer.step, lambda *_: "update/optimizer")


def make_trainer(settings: Settings, folder: Path, seed: int, module: Any, callback: Any) -> Any:
    """The peer's trainer on the saved models."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    bf16 = settings.dtype == "bfloat16"
    frozen = torch.bfloat16 if bf16 else torch.float32
    shared = settings.layout == "shared"
    arguments = module.PPOConfig(
        output_dir=str(folder / "peer"),
        bf16=bf16,
        fp16=False,
        use_cpu=settings.device == "cpu",
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        local_rollout_forward_batch_size=settings.peer_rollout_batch_size,
        num_ppo_epochs=settings.num_ppo_epochs,
        num_mini_batches=1,
        total_episodes=settings.episodes,
        response_length=settings.response_length,
        stop_token="eos",
        missing_eos_penalty=settings.missing_eos_penalty,
        temperature=1.0,
        kl_coef=settings.kl_coef,
        kl_estimator="k1",
        whiten_rewards=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        adam_epsilon=1e-5,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    classifier = AutoModelForSequenceClassification.from_pretrained
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return module.PPOTrainer(
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        ref_model=None if shared else AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=frozen),
        reward_model=classifier(folder / "reward", dtype=frozen, num_labels=1),
        value_model=classifier(folder / "reward", dtype=torch.float32, num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, **settings.lora) if shared else None,
        callbacks=[callback],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("result", type=Path)
    parser.add_argument("--path", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings.read(options.folder / "settings.json")
    sys.path.insert(0, str(options.path.resolve()))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if settings.dtype == "bfloat16":
        # The peer's Accelerator reads its precision here alone; `bf16` in the arguments does not reach it.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import trl
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer as module

    if trl.__version__ != VERSION:
        raise SystemExit(f"{trl.__file__} is TRL {trl.__version__}, the peer is {VERSION}")
    prepare_process(settings)
    phases = Phases(settings.device)

    class Watcher(TrainerCallback):
        metrics: dict[str, float] = {}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.metrics = {
                "rlhf_reward": logs["objective/rlhf_reward"],
                "kl": logs["objective/kl"],
                "loss_value": logs["loss/value_avg"],
            }

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            phases.end_update(self.metrics)

    memory = PeakMemory(settings.device)
    trainer = make_trainer(settings, options.folder, options.seed, module, Watcher())
    watch(module, trainer, phases)
    phases.began = now(settings.device)
    trainer.train()
    options.result.write_text(
        json.dumps({"updates": phases.rows, "memory": memory.read(), "version": trl.__version__}),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
