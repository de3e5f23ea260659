"""One PPO step of TRL 1.12.0, the last release that had PPO, and one of ours on the same rollout.

The peer is not a dependency: `python scripts/bench_ppo.py` installs it into build/trl-1.12.0, or
POSTTRAIN_TRL_PPO names the folder; without it these tests are skipped. It runs in a process of its own
(peer_update.py), on the same weights, prompts and responses.

Where the two differ by intent, and what the cases here do about it:
- The peer adds the score one position after the last token where there is room, and its value loss counts
  that position. Here all responses are as long as the cap, some with the end token as their last one, some
  without: there is no room, and both read the score into the last token.
- The peer averages losses per micro-batch and then over micro-batches, ours per mini-batch; with responses of
  one length these are the same.
- The peer whitens advantages with the unbiased variance, ours with that of the population. Its own function
  is asked for the population variance for the step that is compared; that its usual result is ours times
  sqrt((n - 1) / n) is checked beside it.
- Its old log-probabilities come from generation, ours from the trainer's forward pass; given responses come
  without any, so that the peer is handed the logits of its own forward pass.
- Its value network and reward model have no calibration bias; ours is set to 0.
- It turns dropout layers off, but attention_dropout of a configuration stays on in training: 0 in its models.
- It takes a pad id inside a response for padding; the responses contain none.
- On the last batch of its data loader accelerate ends every accumulation, and it steps per micro-batch; its
  data set has twice as many prompts as the batch, and the update that is compared is on the first batch.
- It does not clip gradients; max_grad_norm is null. It divides logits by temperature + 1e-7.

Measured: weights agree to 5e-7 after four passes in float32; the bounds are 1e-5.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_tiny import (
    EOS,
    LAYOUTS,
    LORA,
    PAD,
    VOCABULARY,
    causal_lm,
    ppo_config,
    ppo_trainer,
    prompts,
    reward_model,
)
from torch import Tensor

from train.ppo.engines.base import Samples
from train.ppo.experience import Experience
from train.ppo.timing import Stopwatch
from train.ppo.trainer import PpoTrainer

ROOT = Path(__file__).parents[2]
PEER = Path(os.environ.get("POSTTRAIN_TRL_PPO", ROOT / "build" / "trl-1.12.0"))
TOLERANCE = 1e-5
BATCH, LENGTH, RATE = 8, 10, 5e-4

pytestmark = pytest.mark.skipif(
    not (PEER / "trl" / "experimental" / "ppo").is_dir(),
    reason=f"TRL 1.12.0 is not in {PEER}: python scripts/bench_ppo.py installs it (or set POSTTRAIN_TRL_PPO)",
)


def responses() -> list[list[int]]:
    """As long as the cap, without pad and without an early end; every other one ends with the end token."""
    rng = random.Random(1)
    rows = [[rng.randrange(2, VOCABULARY) for _ in range(LENGTH)] for _ in range(2 * BATCH)]
    for row in rows[::2]:
        row[-1] = EOS
    return rows


class GivenResponses:
    """A rollout engine that has the answers already."""

    uses_uniforms = True

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers = answers

    def __call__(self, policy: Any, asked: list[list[int]], uniforms_BN: Tensor) -> Samples:
        rows = [self.answers[tuple(prompt)] for prompt in asked]
        return Samples(rows, [[-1.0] * len(row) for row in rows])

    def sync(self, policy: Any) -> None:
        pass

    def close(self) -> None:
        pass


def our_trainer(layout: str, settings: dict[str, Any]) -> PpoTrainer:
    """A trainer whose policy has moved away from the reference, so that there is a KL."""
    answers = {tuple(p): r for p, r in zip(prompts(2 * BATCH), responses(), strict=True)}
    config = ppo_config(
        batch_size=BATCH,
        total_episodes=BATCH,
        micro_batch_size=4,
        max_new_tokens=LENGTH,
        learning_rate=RATE,
        missing_eos={"mode": "penalty", "value": -1.0},
        **settings,
        **LAYOUTS[layout],
    )
    trainer = ppo_trainer(config, engine=GivenResponses(answers))
    networks = trainer.networks
    assert networks.reward_head is not None
    networks.value_head.bias.zero_()
    networks.reward_head.bias.zero_()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in trainer.updater.trained["policy"].items():
            scale = 0.2 if "lora_B" in name else 0.02
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return trainer


def write_case(folder: Path, trainer: PpoTrainer, layout: str, settings: dict[str, Any]) -> None:
    """The models and the rollout, for the peer to load."""
    for name in ("policy", "reference"):
        causal_lm().save_pretrained(folder / name)
    for name in ("value", "reward"):
        reward_model().save_pretrained(folder / name)
    torch.save(trainer.networks.policy_model.state_dict(), folder / "policy.pt")
    arguments = {
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": BATCH // 4,
        "local_rollout_forward_batch_size": BATCH,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "total_episodes": BATCH,
        "response_length": LENGTH,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "temperature": 1.0,
        "learning_rate": RATE,
        "adam_epsilon": 1e-5,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    lora = {**LORA, "target_modules": "all-linear"} if layout == "lora" else None
    case = {"prompts": prompts(2 * BATCH), "responses": responses(), "arguments": arguments, "lora": lora}
    case |= {"pad": PAD, "eos": EOS, "vocabulary": VOCABULARY}
    (folder / "case.json").write_text(json.dumps(case), encoding="utf-8")


def peer_step(folder: Path) -> dict[str, Any]:
    """What the peer made of the case in `folder`."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).parent / "peer_update.py"), str(folder), str(PEER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "peer.pt", weights_only=True)


def compare_rollout(experience: Experience, peer: dict[str, Any]) -> None:
    """Scores, values, advantages and returns; the peer's rows are in an order of its own."""
    place = {tuple(prompt): row for row, prompt in enumerate(peer["prompts"])}
    rows = [place[tuple(prompt)] for prompt in experience.rollout.prompts]
    pairs = {
        "scores": experience.scores_B,
        "values": experience.values_BR,
        "returns": experience.returns_BR,
        "advantages": experience.advantages_BR,
    }
    for name, ours in pairs.items():
        deviation = (ours - peer[name][rows]).abs().max().item()
        assert deviation < TOLERANCE, (name, deviation)
    count = experience.mask_BR.sum().item()
    unbiased = experience.advantages_BR * ((count - 1) / count) ** 0.5
    torch.testing.assert_close(unbiased, peer["whitened"][rows], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("full", {"kl_coef": 0.2}),
        ("full", {"kl_coef": 0.2, "kl_estimator": "k3", "gamma": 0.97, "lam": 0.9, "vf_coef": 0.5}),
        ("full", {"kl_coef": 0.05, "cliprange": 0.03, "cliprange_value": 0.03}),
        ("lora", {"kl_coef": 0.2}),
    ],
    ids=["paper", "k3-gamma-lambda", "narrow-clipping", "lora"],
)
def test_one_update_equals_trl(tmp_path: Path, layout: str, settings: dict[str, Any]) -> None:
    trainer = our_trainer(layout, settings)
    write_case(tmp_path, trainer, layout, settings)
    before = {name: p.detach().clone() for name, p in trainer.networks.named_parameters()}
    peer = peer_step(tmp_path)
    trainer.prompts = peer["prompts"]
    experience = trainer.collect(trainer.generate(), Stopwatch(torch.device("cpu")))
    ours = trainer.run_update()
    compare_rollout(experience, peer)
    names = {
        "loss_policy": "loss/policy_avg",
        "loss_value": "loss/value_avg",
        "approxkl": "policy/approxkl_avg",
        "clipfrac": "policy/clipfrac_avg",
        "vf_clipfrac": "val/clipfrac_avg",
        "ratio": "val/ratio",
        "kl" if trainer.config.kl_estimator == "k1" else "kl_k3": "objective/kl",
        "learning_rate": "lr",
    }
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(peer["metrics"][theirs], abs=TOLERANCE, rel=TOLERANCE), name
    assert ours["kl_k3"] > 0.01, "a policy that is its reference would test no KL"
    if "cliprange" in settings:
        assert ours["clipfrac"] > 0.05
        assert ours["vf_clipfrac"] > 0.05
    networks = trainer.networks
    for model, theirs in ((networks.policy_model, "policy"), (networks.value_trunk.plain, "value")):
        state = model.state_dict()
        assert state.keys() == peer[theirs].keys()
        for name, weight in state.items():
            torch.testing.assert_close(weight, peer[theirs][name], rtol=0, atol=TOLERANCE)
    moved = [(p - before[name]).abs().max().item() for name, p in networks.named_parameters()]
    assert max(moved) > 100 * TOLERANCE, "a step that small would agree with anything"
