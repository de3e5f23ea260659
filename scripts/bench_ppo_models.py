"""The models, prompts and tokenizer of `bench_ppo.py`: random weights, made once, loaded by both sides.

    python scripts/bench_ppo_models.py FOLDER        (FOLDER/settings.json is there)

Makes `policy/` (with a tokenizer), `reward/` (a classifier with one output), `reward_adapter/` (the same
function as a LoRA adapter and a score head on the policy's backbone) and `prompts.json`.

A random model never ends a response. Here channel 0 of the residual stream is one constant, which no layer
writes to, and the end token's row of the output matrix reads nothing else: its logit is nearly the same at
every position, and its size is solved for so that responses average half the cap.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from bench_ppo_common import EOS, FIRST_TOKEN, PAD, Settings
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CONSTANT = 1.0
ROWS = 8


def model_config(settings: Settings) -> Any:
    values: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": settings.prompt_max + settings.response_length,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[settings.family](**values)


def make_prompts(settings: Settings) -> list[list[int]]:
    rng = random.Random(settings.seed)
    lengths = [rng.randint(settings.prompt_min, settings.prompt_max) for _ in range(settings.episodes)]
    return [[rng.randrange(FIRST_TOKEN, settings.vocabulary) for _ in range(n)] for n in lengths]


@torch.no_grad()
def make_policy(settings: Settings) -> PreTrainedModel:
    """A random causal language model whose responses average half the cap."""
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(model_config(settings)).eval()
    model.get_input_embeddings().weight[:, 0] = CONSTANT
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[0] = 0
    head = model.get_output_embeddings().weight
    head[EOS] = 0
    head[EOS, 0] = solve_end_weight(model.to(settings.device), settings)
    return model


def solve_end_weight(model: PreTrainedModel, settings: Settings) -> float:
    """The end token's weight on the constant channel that makes the expected length half the cap.

    By bisection on random continuations, which is what a random model writes: E[length] is the sum over t of
    the probability that none of the t - 1 tokens before was the end.
    """
    ids_BT = torch.randint(
        FIRST_TOKEN,
        settings.vocabulary,
        (ROWS, settings.prompt_max + settings.response_length),
        device=settings.device,
    )
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    hidden_BRD = hidden_BTD[:, settings.prompt_max - 1 : -1]
    constant_BR = hidden_BRD[..., 0]
    others_BR = torch.stack(
        [torch.logsumexp(model.get_output_embeddings()(row)[:, FIRST_TOKEN:], -1) for row in hidden_BRD]
    )
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        survival_BR = torch.sigmoid(others_BR - middle * constant_BR).cumprod(-1)
        length = 1 + survival_BR[:, :-1].sum(-1).mean().item()
        low, high = (middle, high) if length > settings.response_length / 2 else (low, middle)
    return middle


def make_reward_model(settings: Settings, policy: PreTrainedModel, folder: Path) -> None:
    """Save `reward_adapter/` and, merged, `reward/`: the same scores from either."""
    torch.manual_seed(settings.seed + 1)
    base = AutoModelForSequenceClassification.from_config(model_config_with_head(settings))
    base.base_model.load_state_dict(policy.base_model.state_dict())
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["score"], **settings.lora)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            if "score" in name:
                parameter.normal_(std=(settings.hidden + 1) ** -0.5)
                parameter[:, 0] = 0
    model.peft_config["default"].base_model_name_or_path = str((folder / "policy").resolve())
    model.save_pretrained(str(folder / "reward_adapter"))
    fresh = AutoModelForSequenceClassification.from_config(model_config_with_head(settings))
    fresh.base_model.load_state_dict(policy.base_model.state_dict())
    merged = PeftModel.from_pretrained(fresh, str(folder / "reward_adapter")).merge_and_unload()
    merged.save_pretrained(str(folder / "reward"))


def model_config_with_head(settings: Settings) -> Any:
    config = model_config(settings)
    config.num_labels = 1
    return config


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Only its pad and end tokens matter: prompts are token ids."""
    vocabulary = {"<pad>": PAD, "</s>": EOS} | {f"t{i}": i for i in range(FIRST_TOKEN, settings.vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="</s>")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def main() -> None:
    folder = Path(sys.argv[1])
    settings = Settings.read(folder / "settings.json")
    torch.set_num_threads(settings.threads)
    policy = make_policy(settings).cpu()
    policy.save_pretrained(str(folder / "policy"))
    make_tokenizer(settings).save_pretrained(str(folder / "policy"))
    make_reward_model(settings, policy, folder)
    (folder / "prompts.json").write_text(json.dumps(make_prompts(settings)), encoding="utf-8")
    sizes = {"parameters": sum(p.numel() for p in policy.parameters())}
    (folder / "models.json").write_text(json.dumps(sizes), encoding="utf-8")


if __name__ == "__main__":
    main()
