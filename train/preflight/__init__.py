"""The preflight of the training stages: data, models, settings and machine, before a weight is loaded.

docs/preflight.md lists the checks with their thresholds and remedies; each file here is one concern.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.preflight import Findings
from train.base_config import BaseConfig
from train.config import KtoConfig, PretrainConfig, SftConfig
from train.online_config import OnlineConfig
from train.peft_setup import quiet_libraries
from train.ppo.config import PpoStageConfig
from train.preflight.answers import check_kto
from train.preflight.base import check_base
from train.preflight.dialogues import check_sft
from train.preflight.pairs import PairsConfig, check_pairs
from train.preflight.ppo import check_online, check_ppo
from train.preflight.synthesize import check_synthesize
from train.preflight.texts import check_pretrain
from train.synthesis.config import SynthesizeConfig


def check(
    config: BaseConfig
    | PretrainConfig
    | SftConfig
    | PairsConfig
    | OnlineConfig
    | PpoStageConfig
    | SynthesizeConfig,
    paths: Mapping[str, Path],
    run_dir: Path,
) -> Findings:
    """Everything that speaks against starting this stage, as far as its inputs are in `paths`."""
    quiet_libraries()
    if isinstance(config, BaseConfig):
        return check_base(config, paths, run_dir)
    if isinstance(config, PretrainConfig):
        return check_pretrain(config, paths, run_dir)
    if isinstance(config, SftConfig):
        return check_sft(config, paths, run_dir)
    if isinstance(config, PpoStageConfig):
        return check_ppo(config, paths, run_dir)
    if isinstance(config, SynthesizeConfig):
        return check_synthesize(config, paths)
    if isinstance(config, OnlineConfig):
        return check_online(config, paths, run_dir)
    if isinstance(config, KtoConfig):
        return check_kto(config, paths, run_dir)
    return check_pairs(config, paths, run_dir)
