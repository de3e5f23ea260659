"""Loading models and reading rewards: the guards, merged adapters, and independence of padding and batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
)

from posttrain.errors import UserError
from posttrain.models import is_adapter, load_causal_lm, load_reward_model, load_tokenizer, score_ids

IDS = [[1, 40, 50, 60, 2], [1, 70, 2], [1, 33, 44, 55, 66, 77, 88, 2]]


def make_adapter(
    base: Path, target: Path, task: TaskType, saved_modules: list[str] | None = None
) -> PeftModel:
    """An adapter of `base` with random weights, saved to `target`; returned unmerged."""
    torch.manual_seed(3)
    auto = AutoModelForCausalLM if task == TaskType.CAUSAL_LM else AutoModelForSequenceClassification
    arguments: dict[str, Any] = {} if task == TaskType.CAUSAL_LM else {"num_labels": 1}
    model = auto.from_pretrained(base, dtype=torch.float32, **arguments)
    config = LoraConfig(
        r=4, task_type=task, target_modules=["q_proj", "v_proj"], modules_to_save=saved_modules
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(target)
    return adapted.eval()


def padded(rows: list[list[int]], width: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT, mask_BT = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[index, place], mask_BT[index, place] = torch.tensor(row), 1
    return ids_BT, mask_BT


def edit(directory: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model directory with another tokenizer_config.json; None removes a key."""
    shutil.copytree(directory, target)
    path = target / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return target


def test_tokenizer_of_a_model_and_of_an_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model_dir, tmp_path / "adapter", TaskType.CAUSAL_LM)
    assert not is_adapter(tiny_model_dir)
    assert is_adapter(tmp_path / "adapter")
    for directory in (tiny_model_dir, tmp_path / "adapter"):
        tokenizer = load_tokenizer(directory)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_unusable_tokenizers_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pad token"):
        load_tokenizer(edit(tiny_model_dir, tmp_path / "a", pad_token=None))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(edit(tiny_model_dir, tmp_path / "b", eos_token=None))
    with pytest.raises(UserError, match=r"the pad token is the end-of-sequence token \(<\|im_end\|>\)"):
        load_tokenizer(edit(tiny_model_dir, tmp_path / "c", pad_token="<|im_end|>"))
    bare = edit(tiny_model_dir, tmp_path / "d", chat_template=None)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(bare)
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "e")


def test_merged_language_model_equals_its_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapted = make_adapter(tiny_model_dir, tmp_path / "adapter", TaskType.CAUSAL_LM)
    merged, base = load_causal_lm(tmp_path / "adapter"), load_causal_lm(tiny_model_dir)
    ids_BT, mask_BT = padded(IDS, 8, "right")
    with torch.no_grad():
        expected, found, plain = (
            model(input_ids=ids_BT, attention_mask=mask_BT).logits for model in (adapted, merged, base)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (plain - expected).abs().max() > 1e-2
    assert not isinstance(merged, PeftModel)
    assert not merged.training
    assert load_causal_lm(tmp_path / "adapter", "bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        load_causal_lm(tiny_model_dir, "int8")


def test_scores_do_not_depend_on_padding_or_batch(tiny_reward_dir: Path) -> None:
    model, calibration = load_reward_model(tiny_reward_dir)
    assert calibration["bias"] == 0.25
    with torch.no_grad():
        alone = torch.cat([score_ids(model, calibration, *padded([row], len(row), "right")) for row in IDS])
        for side in ("right", "left"):
            for width in (8, 13):
                found = score_ids(model, calibration, *padded(IDS, width, side))
                torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
    assert (alone[0] - alone[1]).abs() > 1e-3


def test_positions_come_from_the_mask() -> None:
    # Llama's rotary positions are relative and would hide a mistake; GPT-2's are absolute.
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 100, "num_labels": 1}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, initializer_range=0.3)).eval()
    with torch.no_grad():
        right, left = (score_ids(model, {"bias": 0.0}, *padded(IDS, 12, side)) for side in ("right", "left"))
    torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


def test_score_is_the_head_at_the_last_real_token_less_the_bias(tiny_reward_dir: Path) -> None:
    model, _ = load_reward_model(tiny_reward_dir)
    with torch.no_grad():
        raw = model(input_ids=torch.tensor([IDS[0]])).logits[0, 0]
        found = score_ids(model, {"bias": 2.0}, *padded(IDS[:1], 9, "left"))
    torch.testing.assert_close(found[0], raw - 2.0, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="no attended token"):
        score_ids(
            model, {"bias": 0.0}, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
        )


def test_reward_adapter_keeps_its_head_and_scores_the_same_merged(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapted = make_adapter(tiny_model_dir, tmp_path / "rm", TaskType.SEQ_CLS, ["score"])
    merged, calibration = load_reward_model(tmp_path / "rm")
    assert calibration == {"bias": 0.0}
    batch = padded(IDS, 10, "left")
    with torch.no_grad():
        expected, found = (score_ids(model, calibration, *batch) for model in (adapted, merged))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_reward_model_without_a_trained_head_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no score head"):
        load_reward_model(tiny_model_dir)
    make_adapter(tiny_model_dir, tmp_path / "policy", TaskType.CAUSAL_LM)
    with pytest.raises(UserError, match=r"holds no score head.*\n.*SEQ_CLS and `score` in modules_to_save"):
        load_reward_model(tmp_path / "policy")
    make_adapter(tiny_model_dir, tmp_path / "rm", TaskType.SEQ_CLS, ["score"])
    with pytest.raises(UserError, match="trained for task SEQ_CLS, so it is not a language model"):
        load_causal_lm(tmp_path / "rm")
