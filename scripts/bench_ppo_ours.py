"""posttrain's PPO on the models of `bench_ppo.py`, in a process of its own; then the floor of its update.

    python scripts/bench_ppo_ours.py FOLDER SEED RESULT.json [--profile]

Started by `bench_ppo.py`, which makes FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_ppo_common import (
    EOS,
    PAD,
    PeakMemory,
    Settings,
    flops,
    now,
    prepare_process,
    products_seconds,
    trained_products,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_trainer(settings: Settings, folder: Path, seed: int) -> Any:
    """Our trainer on the saved models: the one place that knows its constructor."""
    from accelerate import Accelerator

    from train.ppo.config import PpoStageConfig
    from train.ppo.engines.hf import HfSampler
    from train.ppo.layouts import load_networks, make_ready
    from train.ppo.reward_config import RewardsConfig
    from train.ppo.reward_mix import Rewards
    from train.ppo.reward_sources import NetworkReward
    from train.ppo.trainer import PpoTrainer

    shared = settings.layout == "shared"
    config = PpoStageConfig(
        model=str(folder / "policy"),
        reward=str(folder / ("reward_adapter" if shared else "reward")),
        data="prompts",
        seed=seed,
        layout=settings.layout,
        peft=settings.lora if shared else None,
        total_episodes=settings.episodes,
        batch_size=settings.batch_size,
        # As many tokens at a time as the peer, which pads every response to the cap.
        micro_batch_tokens=settings.micro_batch_size * (settings.prompt_max + settings.response_length),
        num_ppo_epochs=settings.num_ppo_epochs,
        max_prompt_tokens=settings.prompt_max,
        max_new_tokens=settings.response_length,
        missing_eos={"mode": "penalty", "value": -settings.missing_eos_penalty},
        kl_coef=settings.kl_coef,
        learning_rate=settings.learning_rate,
        max_grad_norm=None,
        bf16=settings.dtype == "bfloat16",
    )
    accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision="bf16" if config.bf16 else "no")
    networks, _ = load_networks(config, Path(config.model), Path(config.reward or ""))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    make_ready(networks, config, accelerator.device, prompts, PAD)
    reward = NetworkReward(networks, config.micro_batch_tokens, PAD)
    return PpoTrainer(
        config,
        accelerator,
        networks,
        Rewards(RewardsConfig(), [reward], [], accelerator.device),
        HfSampler(EOS, PAD, max_rows=settings.batch_size),
        prompts,
        eos_id=EOS,
        pad_id=PAD,
    )


def run_update(trainer: Any, device: str) -> dict[str, float]:
    """One update's metrics, `seconds` by our own clock."""
    start = now(device)
    metrics = trainer.run_update()
    phases = {name: value for name, value in metrics.items() if name.startswith("seconds_")}
    kept = ("response_length", "rlhf_reward", "kl", "loss_value", "mfu")
    return phases | {name: metrics[name] for name in kept} | {"seconds": now(device) - start}


def update_floor(settings: Settings, prompts: list[list[int]], response_length: float) -> dict[str, float]:
    """The update's linear layers alone, on real tokens only: seconds and FLOPs of one update's K passes.

    The policy's and the value network's backbones see prompts and responses, the language-model head the
    responses. A chunk of padding, attention itself, losses and the optimizer are all left out.
    """
    import torch

    from train.ppo.throughput import matmul_throughput

    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    lora = settings.layout == "shared"
    backbone, head = trained_products(settings, lora)
    passes = settings.num_ppo_epochs * settings.batch_size
    prompt_length = sum(map(len, prompts)) / len(prompts)
    tokens, response_tokens = passes * (prompt_length + response_length), passes * response_length
    return {
        "seconds": products_seconds(backbone * 2, tokens, settings)
        + products_seconds(head, response_tokens, settings),
        "flops": flops(backbone * 2, tokens) + flops(head, response_tokens),
        "matmul_flops_per_second": matmul_throughput(torch.device(settings.device), dtype),
    }


def profile(trainer: Any, device: str) -> str:
    """One more update under torch's profiler: the operators by their own time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities) as recorded:
        trainer.run_update()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("result", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    settings = Settings.read(options.folder / "settings.json")
    prepare_process(settings)
    import posttrain
    import train.ppo.trainer  # noqa: F401  (before memory is measured)

    memory = PeakMemory(settings.device)
    trainer = make_trainer(settings, options.folder, options.seed)
    rows = [run_update(trainer, settings.device) for _ in range(settings.warmup + settings.updates)]
    used = memory.read()
    measured = rows[settings.warmup :]
    length = sum(row["response_length"] for row in measured) / len(measured)
    result = {
        "updates": rows,
        "memory": used,
        "version": posttrain.__version__,
        "floor": update_floor(settings, trainer.prompts, length),
    }
    if options.profile:
        result["profile"] = profile(trainer, settings.device)
    options.result.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
