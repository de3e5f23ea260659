"""Model, export and requests of `bench_serve.py`, made once and used by every side.

    python scripts/bench_serve_world.py FOLDER [--tokenizer DIR | --export RUN]

FOLDER/settings.json is there. Makes `model/` and `export/` (random weights, exported by our own stage) unless
an export is given, and `requests.json`: texts of the support-desk world, cut to their lengths.

The random model never ends an answer, so that lengths are the ones asked for on every side, also where a
server has no `ignore_eos`: the head's rows are zero for special tokens, for ids that the tokenizer does not
have, and for tokens that are no whole character (which no server can send by itself). Their logit is then 0,
and the largest of thousands of random ones is above it: greedy decoding never takes them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_serve_common import LONG_TOKENS, MODEL, Request, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
REQUESTS = 512
"""Different requests; a longer run begins again with the first."""


def texts(rows: int) -> list[str]:
    """What is said in dialogues of the tiny world."""
    from data_prep.tiny.world import generate

    return [turn.content for record in generate("conversation", rows, 0) for turn in record.messages]


def make_model(settings: Settings, tokenizer: Any, folder: Path) -> int:
    """Save the random model and its tokenizer; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=max(settings.vocabulary, len(tokenizer)),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    special = set(tokenizer.all_special_ids)
    drawn = [
        index
        for index in range(len(tokenizer))
        if index not in special and "\ufffd" not in (text := tokenizer.decode([index])) and text
    ]
    with torch.no_grad():
        kept_V = torch.zeros(config.vocab_size, 1)
        kept_V[drawn] = 1.0
        model.lm_head.weight.mul_(kept_V)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_export(settings: Settings, tokenizer_dir: Path | None, folder: Path) -> dict[str, Any]:
    """`model/` and `export/` in `folder`; returns what the report says of them."""
    from posttrain.models import load_tokenizer
    from posttrain.stage import execute_stage
    from serving.config import ExportConfig
    from train.tokenizer import build_tokenizer

    if tokenizer_dir is None:
        tokenizer = build_tokenizer(texts(400), settings.vocabulary, settings.positions)
    else:
        tokenizer = load_tokenizer(tokenizer_dir)
    parameters = make_model(settings, tokenizer, folder / "model")
    config = ExportConfig(model=str(folder / "model"), name=MODEL, golden_prompts=0)
    execute_stage("export", config, folder / "export")
    return {"parameters": parameters, "tokenizer": len(tokenizer)}


def make_requests(settings: Settings, weights: Path, room: int) -> list[Request]:
    """Requests in a fixed order. room: longest sequence of the model, in tokens."""
    from posttrain.models import load_tokenizer

    tokenizer = load_tokenizer(weights)
    rng = random.Random(settings.seed)
    words = " ".join(texts(400)).split()
    longest = room - max(settings.answer_max, LONG_TOKENS) - 1
    if longest < settings.prompt_min:
        raise SystemExit(f"{weights}: the model's {room} tokens have no room for these lengths")
    requests = []
    for _ in range(REQUESTS):
        wanted = rng.randint(settings.prompt_min, min(settings.prompt_max, longest))
        start = rng.randrange(len(words))
        taken = (words * 2)[start : start + wanted]
        while len(tokenizer(" ".join(taken))["input_ids"]) > wanted and len(taken) > 1:
            taken.pop()
        prompt = " ".join(taken)
        length = len(tokenizer(prompt)["input_ids"])
        requests.append(Request(prompt, length, rng.randint(settings.answer_min, settings.answer_max)))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--export", type=Path)
    options = parser.parse_args()
    from serving.repository import check_servable, read_export, weights_dir

    folder: Path = options.folder
    settings = Settings.read(folder / "settings.json")
    facts: dict[str, Any] = {"parameters": None, "tokenizer": None}
    if options.export is None:
        facts = make_export(settings, options.tokenizer, folder)
    export = options.export or folder / "export"
    manifest = read_export(export)
    check_servable(manifest)
    weights = weights_dir(export, manifest)
    requests = make_requests(settings, weights, manifest["max_model_len"])
    rows = [asdict(request) for request in requests]
    (folder / "requests.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    facts |= {"export": str(export.resolve()), "name": manifest["name"], "weights": str(weights.resolve())}
    facts |= {"max_model_len": manifest["max_model_len"], "limits": manifest["limits"]}
    facts |= {"dtype": manifest["dtype"], "given": options.export is not None}
    (folder / "world.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
