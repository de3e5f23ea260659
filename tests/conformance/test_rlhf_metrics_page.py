"""docs/ppo.md explains every metric that a run writes."""

from __future__ import annotations

import re
from pathlib import Path

from ppo_tiny import ppo_config, ppo_trainer

from train.ppo.held_out import HeldOutEvaluation
from train.ppo.reward_config import RewardsConfig
from train.ppo.reward_mix import Rewards

PAGE = Path(__file__).parents[2] / "docs" / "ppo.md"


def test_every_metric_of_a_run_is_explained() -> None:
    """Names, with sources of rewards as `reward/<source>`; and none is explained that is not there."""
    trainer = ppo_trainer(ppo_config(kl_in="loss", kl_estimator="k2"))
    row = trainer.run_update()
    rewards = Rewards(RewardsConfig(), trainer.rewards.models, [], "cpu")
    row |= HeldOutEvaluation(trainer, rewards, trainer.prompts[:4])()
    written = {re.sub(r"^(reward|held_out)/.*", r"\1/<source>", name) for name in row}
    section = PAGE.read_text(encoding="utf-8").partition("\n### Metrics\n")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == written
