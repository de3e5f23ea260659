"""Finished runs of the eval stage, made from scores: what `compare` and `gate` read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import bootstrap_interval
from posttrain.rundir import SCHEMA_VERSION, describe_outputs


def write_eval_run(
    run_dir: Path,
    gold: dict[str, Sequence[float]],
    *,
    stage: str = "eval",
    words: Sequence[str] = (),
    parents: Sequence[dict[str, Any]] = (),
    first_id: int = 0,
    texts: dict[int, str] | None = None,
) -> Path:
    """gold: scores by model, one per prompt. Every second prompt is of source b; finished: gold > 0.5."""
    run_dir.mkdir(parents=True)
    count = len(next(iter(gold.values())))
    lines = []
    for i in range(count):
        answers = {
            name: {
                "text": (texts or {}).get(i, f"{name} says {i}"),
                "finished": bool(scores[i] > 0.5),
                "tokens": 3 + i % 4,
                "gold": float(scores[i]),
                "rm": float(-scores[i]),
                "gold_parts": {"polite": float(scores[i])},
            }
            for name, scores in gold.items()
        }
        lines.append(
            {
                "id": f"p{i + first_id}",
                "source": "ab"[i % 2],
                "meta": {"kind": "refund" if i % 3 else "delay", "facts": {"x": 1}},
                "prompt": [{"role": "user", "content": f"Question {i + first_id}?" + " more" * (i % 7)}],
                "answers": answers,
            }
        )
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {
        name: {
            "gold": bootstrap_interval(np.array(scores), samples=200).as_dict(),
            "perplexity": {"text": {"perplexity": 12.5}},
        }
        for name, scores in gold.items()
    }
    (run_dir / "eval.json").write_text(
        json.dumps({"schema_version": 1, "models": models, "reward_model": None})
    )
    outputs = describe_outputs(run_dir)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "name": run_dir.name,
        "status": "complete",
        "inputs_hash": "",
        "outputs_hash": outputs.pop("hash"),
        "outputs": outputs,
        "parents": list(parents),
        "metrics": {f"gold/{name}": models[name]["gold"]["value"] for name in gold},
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def finish_again(run_dir: Path) -> Path:
    """Write the manifest anew over files that were changed, as if the stage had made them so."""
    file = run_dir / "manifest.json"
    manifest = json.loads(file.read_text())
    outputs = describe_outputs(run_dir)
    manifest |= {"outputs_hash": outputs.pop("hash"), "outputs": outputs}
    file.write_text(json.dumps(manifest))
    return run_dir
