"""Data, tokenizer and model of `bench_sft.py`, made once and read by every run.

    python scripts/bench_sft_world.py FOLDER        (FOLDER/settings.json is there)

Makes `data/` (our curate stage), `peer/` (the same rows as prompt and completion, in the same order, as TRL
reads them) and `model/` (random weights; its tokenizer is trained on the training rows).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from bench_sft_common import Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_up(rows: int) -> str:
    """Question and answer lines of 1 to 6 steps of arithmetic, in the form of GSM8K's file."""
    rng = random.Random(0)
    lines = []
    for index in range(rows):
        parts = [rng.randint(2, 90) for _ in range(rng.randint(2, 7))]
        question = f"Customer {index} buys " + " and then ".join(f"{part} lamps" for part in parts)
        steps = [f"{sum(parts[:i])} + {parts[i]} = {sum(parts[: i + 1])}." for i in range(1, len(parts))]
        answer = "\n".join(steps) + f"\n#### {sum(parts)}"
        lines.append(json.dumps({"question": f"{question}. How many lamps are that?", "answer": answer}))
    return "\n".join(lines) + "\n"


def curate(settings: Settings, folder: Path) -> None:
    """The data set directory `folder / "data"`: of GSM8K's file, or of made-up rows where none is given."""
    from data_prep.config import CurateConfig
    from posttrain.stage import execute_stage

    path = Path(settings.data)
    if not settings.data:
        path = folder / "made-up.jsonl"
        path.write_text(make_up(400), encoding="utf-8")
    source = {"path": str(path), "columns": {"prompt": "question", "completion": "answer"}}
    # Few rows to evaluate on: our stage evaluates at its end, TRL's script does not, and neither is timed.
    split = {"eval_fraction": settings.eval_fraction}
    config = CurateConfig.model_validate({"kind": "conversation", "sources": [source], "split": split})
    execute_stage("curate", config, folder / "data")


def write_peer_data(data: Path, folder: Path) -> None:
    """Prompt and completion of each training row; TRL then takes the loss on the completion, as we do."""
    from data_prep.dataset import read_split

    folder.mkdir(parents=True, exist_ok=True)
    rows = read_split(data, "train", "conversation")["messages"]
    lines = [json.dumps({"prompt": row[:-1], "completion": row[-1:]}) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_model(settings: Settings, data: Path, folder: Path) -> dict[str, Any]:
    """Save the model and its tokenizer; returns what the report says of them."""
    from data_prep.dataset import read_split
    from train.base import build_model
    from train.base_config import BaseConfig
    from train.encode import IGNORED, encode_conversations
    from train.tokenizer import build_tokenizer

    rows = read_split(data, "train", "conversation")
    texts = [turn["content"] for messages in rows["messages"] for turn in messages]
    tokenizer = build_tokenizer(texts, settings.vocabulary, settings.positions)
    architecture = {
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.positions,
    }
    config = BaseConfig.model_validate({"data": "data", "seed": settings.seed, "architecture": architecture})
    model = build_model(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoded = encode_conversations(tokenizer, list(rows["messages"]), list(rows["id"]))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "rows": len(encoded),
        "tokens": sum(len(row.input_ids) for row in encoded),
        "supervised_tokens": sum(label != IGNORED for row in encoded for label in row.labels),
        "longest": max(len(row.input_ids) for row in encoded),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    settings = Settings.read(folder / "settings.json")
    curate(settings, folder)
    write_peer_data(folder / "data", folder / "peer")
    facts = make_model(settings, folder / "data", folder / "model")
    (folder / "world.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
