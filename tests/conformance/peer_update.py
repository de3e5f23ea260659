"""One update of TRL 1.12.0's PPOTrainer on given responses, in a process of its own.

    python tests/conformance/peer_update.py FOLDER PEER_PATH

FOLDER holds policy/, reference/, value/ and reward/ (models), policy.pt (the policy's weights with adapter,
loaded over what the trainer made) and case.json: prompts, responses, arguments of PPOConfig, LoRA settings or
null. Writes FOLDER/peer.pt. Three functions of the peer's module are replaced from outside, none is changed:
generation gives the responses of the case, whitening is recorded and then done with the population variance,
values are recorded on their way.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

VERSION = "1.12.0"


def tokenizer(case: dict[str, Any]) -> Any:
    """Only its pad token, end token and padding side matter: prompts are token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = {case["pad"]: "<pad>", case["eos"]: "</s>"}
    vocabulary = {names.get(i, f"t{i}"): i for i in range(case["vocabulary"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="</s>")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def make_trainer(folder: Path, case: dict[str, Any], module: Any, callback: Any) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def load(kind: Any, name: str, **options: Any) -> Any:
        return kind.from_pretrained(folder / name, dtype=torch.float32, attention_dropout=0.0, **options)

    classifier = partial(load, AutoModelForSequenceClassification, num_labels=1)
    lora = case["lora"]
    trainer = module.PPOTrainer(
        args=module.PPOConfig(output_dir=str(folder / "output"), **case["arguments"]),
        processing_class=tokenizer(case),
        model=load(AutoModelForCausalLM, "policy"),
        ref_model=None if lora else load(AutoModelForCausalLM, "reference"),
        reward_model=classifier("reward"),
        value_model=classifier("value"),
        train_dataset=Dataset.from_dict({"input_ids": case["prompts"]}),
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, **lora) if lora else None,
        callbacks=[callback],
    )
    trainer.policy_model.load_state_dict(torch.load(folder / "policy.pt", weights_only=True))
    return trainer


def replace_functions(module: Any, trainer: Any, case: dict[str, Any], seen: dict[str, Any]) -> None:
    """Give the case's responses instead of sampling, and write down advantages and values."""
    import torch

    answers = {tuple(p): r for p, r in zip(case["prompts"], case["responses"], strict=True)}
    whiten, variance, reward = module.masked_whiten, module.masked_var, module.get_reward

    def generation(policy: Any, queries: Any, rows: int, pad: int, config: Any) -> tuple[Any, Any]:
        prompts = [tuple(token for token in row if token != pad) for row in queries.tolist()]
        seen["prompts"] = [list(prompt) for prompt in prompts]
        whole = torch.cat([queries, torch.tensor([answers[prompt] for prompt in prompts])], 1)
        logits = module.forward(policy, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    def whiten_by_population(values: Any, mask: Any, shift_mean: bool = True) -> Any:
        seen["raw_advantages"], seen["whitened"] = values, whiten(values, mask, shift_mean)
        module.masked_var = partial(variance, unbiased=False)
        result = whiten(values, mask, shift_mean)
        module.masked_var = variance
        seen["advantages"] = result
        return result

    def get_reward(model: Any, ids: Any, pad: int, context: int) -> Any:
        result = reward(model, ids, pad, context)
        if model is trainer.reward_model:
            seen["scores"] = result[1].clone()
        else:
            seen["values"] = result[0][:, context - 1 : -1].squeeze(-1)
        return result

    module.batch_generation, module.masked_whiten = generation, whiten_by_population
    module.get_reward = get_reward


def main() -> None:
    folder, peer = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    sys.path.insert(0, str(peer))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import trl
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer as module

    if trl.__version__ != VERSION:
        raise SystemExit(f"{trl.__file__} is TRL {trl.__version__}, the peer is {VERSION}")
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    seen: dict[str, Any] = {}

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.setdefault("metrics", {}).update(logs)

    trainer = make_trainer(folder, case, module, Log())
    replace_functions(module, trainer, case, seen)
    trainer.train()
    seen["returns"] = seen["raw_advantages"] + seen["values"]
    seen["policy"] = trainer.policy_model.state_dict()
    seen["value"] = trainer.value_model.state_dict()
    torch.save(seen, folder / "peer.pt")


if __name__ == "__main__":
    main()
