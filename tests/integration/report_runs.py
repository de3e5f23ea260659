"""A pipeline directory with plausible numbers in every file, made in milliseconds, for the report's tests."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tiny import rubric, world
from eval.config import EvalConfig
from eval.generation import Generation
from eval.policy_report import Answers
from eval.results import build_results, summary
from eval.rm_report import PairScores, Settings, out_of_distribution_report, reward_report

PARENTS = {
    "corpus": [],
    "demos": [],
    "prefs": [],
    "prompts": [],
    "base": ["corpus"],
    "sft": ["base", "demos"],
    "sft-merged": ["sft"],
    "reward": ["sft-merged", "prefs"],
    "dpo": ["sft-merged", "prefs"],
    "ppo": ["sft-merged", "reward", "prompts"],
    "eval": ["sft-merged", "dpo", "ppo", "reward", "prompts", "prefs"],
    "ppo-merged": ["ppo"],
    "export": ["ppo-merged"],
}
KINDS = {"corpus": "curate", "demos": "curate", "prefs": "curate", "prompts": "curate"}
KINDS |= {"sft-merged": "merge", "ppo-merged": "merge"}
PHASES = {
    "ppo": {"load": 1.5, "train": 92.0, "save": 0.4},
    "eval": {"generate.sft": 5.0, "generate.ppo": 5.2, "kl": 3.0},
}
CONFIG = EvalConfig(
    models={"sft": "a", "dpo": "b", "ppo": "c"},
    reward="r",
    prompts="p",
    preferences="q",
    gold="support_desk",
    kl_target={"ppo": 12.0},
    min_rm_accuracy=0.85,
    min_win_rate=0.65,
    require_gain=True,
    bootstrap_samples=200,
)


@lru_cache
def evaluation(seed: int, prompts: int = 60) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """eval.json and samples.jsonl, from real rubric scores of generated answers."""
    rng = np.random.default_rng(seed)
    records = list(world.generate("preference", 4 * prompts, seed=seed))[:prompts]
    answers = {}
    for name, good in (("sft", 0.3), ("dpo", 0.75), ("ppo", 0.9)):
        generations, totals, parts = [], [], []
        for record in records:
            row, meta = record.content_columns(), json.loads(record.meta)
            better = "chosen" if meta["gold_chosen"] >= meta["gold_rejected"] else "rejected"
            side = better if rng.random() < good else {"chosen": "rejected", "rejected": "chosen"}[better]
            finished = bool(rng.random() < 0.97)
            score = rubric.score(row[side][-1]["content"], meta["facts"], finished)
            generations.append(Generation([1], list(range(20)), row[side][-1]["content"], finished))
            totals.append(score.total)
            parts.append(score.parts)
        gold = np.array(totals)
        kl = {"sft": 0.0, "dpo": 6.0, "ppo": 9.0}[name] * rng.gamma(4, 0.25, prompts)
        answers[name] = Answers(
            generations,
            gold,
            {part: np.array([p[part] for p in parts]) for part in parts[0]},
            4 * gold - 2 + rng.normal(0, 0.4, prompts),
            {"k1": kl, "k3": kl * 0.97},
            {
                "conversations": {
                    "perplexity": 2.4,
                    "bits_per_byte": 0.41,
                    "tokens": 5120,
                    "rows": 60,
                    "rows_cut": 0,
                }
            },
        )
    quality = rng.normal(1.2, 1.3, 300)
    pairs = PairScores(
        quality,
        np.zeros(300),
        ["thank you for waiting"] * 300,
        ["whatever, look it up"] * 300,
        [f"p{i}" for i in range(300)],
        [f"g{i % 9}" for i in range(300)],
        np.where(rng.random(300) < 0.1, 0.2, 0.8),
        np.full(300, 0.5),
    )
    settings = Settings(samples=200)
    reward = reward_report(replace(pairs, subsets=["phone", "mail", "mail"] * 100), settings)
    reward["out_of_distribution"] = out_of_distribution_report(
        replace(pairs, chosen=-quality), reward, settings
    )
    keys = [record.id for record in records]
    counts = {"available": prompts, "too_long": 0, "used": prompts}
    results = build_results(CONFIG, answers, keys, counts, reward)
    samples = []
    for i, record in enumerate(records):
        each = {
            name: {
                "text": a.generations[i].text,
                "finished": a.generations[i].finished,
                "tokens": 20,
                "gold": float(a.gold[i]),
                "rm": float(a.rm[i]),
                "gold_parts": {part: float(values[i]) for part, values in a.gold_parts.items()},
                "kl_k1": float(a.kl["k1"][i]),
            }
            for name, a in answers.items()
        }
        samples.append({"id": record.id, "prompt": record.content_columns()["prompt"], "answers": each})
    return results, samples


def curve(kind: str, seed: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a training stage."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, 81):
        decay, noise = math.exp(-step / 25), 0.05 * rng.normal()
        if kind == "base":
            rows.append(
                {"step": step, "loss": 1.5 + 4 * decay + noise, "learning_rate": 0.004 * (1 - step / 80)}
            )
        elif kind == "sft":
            rows.append(
                {
                    "step": step,
                    "loss": 0.6 + decay + noise,
                    "grad_norm": 1 + noise,
                    "mean_token_accuracy": 0.8,
                }
            )
            if step % 20 == 0:
                rows.append({"step": step, "eval_loss": 0.65 + decay})
        elif kind == "reward":
            rows.append(
                {"step": step, "loss": 0.3 + 0.4 * decay + noise, "accuracy": 0.9 - 0.4 * decay + noise}
            )
            rows[-1]["margin"] = 2 - 2 * decay
        elif kind == "dpo":
            rows.append({"step": step, "loss": 0.3 + 0.4 * decay + noise, "rewards/margins": 3 - 3 * decay})
            rows[-1] |= {
                "rewards/accuracies": 0.9 - 0.4 * decay,
                "rewards/chosen": 0.4,
                "rewards/rejected": -1.0,
            }
        elif kind == "ppo":
            kl = 9 * (1 - decay) + 5 * noise
            rows.append({"step": step, "score": 1.8 - 2.2 * decay + 3 * noise, "kl": kl, "kl_k3": 0.97 * kl})
            rows[-1] |= {
                "rlhf_reward": 1.3 - 2 * decay,
                "entropy": 0.4 + 0.5 * decay,
                "eos_rate": 1 - 0.1 * decay,
            }
            rows[-1] |= {
                "response_length": 22 + 4 * decay,
                "kl_coef": 0.05,
                "approxkl": 0.01,
                "clipfrac": 0.1,
            }
    return [{"time": 0.0, **row} for row in rows]


def write_pipeline(directory: Path, seed: int = 0, name: str = "tiny") -> Path:
    """Every stage of PARENTS, complete, with curves, an evaluation and a parity proof."""
    directory.mkdir(parents=True)
    (directory / "pipeline.json").write_text(
        json.dumps({"name": name, "stages": list(PARENTS)}), encoding="utf-8"
    )
    results, samples = evaluation(seed)
    for stage, parents in PARENTS.items():
        folder = directory / stage
        folder.mkdir()
        kind = KINDS.get(stage, stage)
        timings = PHASES.get(stage, {"import": 0.8, "train": 6.0 + len(stage), "save": 0.3})
        manifest = {
            "schema_version": 1,
            "stage": kind,
            "name": stage,
            "status": "complete",
            "outputs_hash": f"{abs(hash_text(stage)):016x}",
            "outputs": {},
            "parents": [
                {"field": p, "ref": f"runs/{p}", "stage": KINDS.get(p, p), "run": p, "content_hash": "ab"}
                for p in parents
            ],
            "code": {"version": "0.1.0", "git": "0123456789abcdef", "dirty": False},
            "packages": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
            "hardware": {"platform": "Linux", "cpus": 2, "gpus": [], "memory_bytes": 8 * 2**30},
            "timings": timings | {"total": sum(timings.values()) + 0.9},
            "metrics": summary(results) if stage == "eval" else {"rows": 4000, "seconds_per_step": 0.0123},
            "finished": "2026-01-02T03:04:05+00:00",
        }
        if stage == "ppo":
            manifest["metrics"] = {"score": 1.8, "kl": 9.0, "kl_target": 12.0, "kl_under_target": True}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (folder / "config.yaml").write_text(f"stage: {kind}\nseed: {seed}\n", encoding="utf-8")
        rows = curve(kind, seed)
        if rows:
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"
            )
    (directory / "eval" / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    (directory / "eval" / "samples.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8"
    )
    parity = {"passed": True, "prompts": 32, "identical": 32, "max_logprob_difference": 2.1e-6}
    (directory / "export" / "parity.json").write_text(json.dumps(parity), encoding="utf-8")
    return directory


def hash_text(content: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(content.encode().ljust(8, b"\x5a")[:8], "little")
