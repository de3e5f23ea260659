"""scripts/prepare_model.py: a published model's tokenizer made fit to train with, its weights left alone."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.errors import UserError
from posttrain.models import load_tokenizer

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("prepare_model", ROOT / "scripts" / "prepare_model.py")
assert SPEC is not None and SPEC.loader is not None
SCRIPT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)
TEMPLATE = ROOT / "configs" / "chat_templates" / "mistral.jinja"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A base model as Mistral's is published: no pad token, no chat template."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    directory = tmp_path / "published"
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **size)).save_pretrained(directory)
    return directory


def test_the_tokenizer_can_be_trained_with_and_the_weights_are_the_same(published, tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(published)
    output = tmp_path / "models" / "org" / "model"
    SCRIPT.main(
        [str(published), "--output", str(output), "--pad-token", "<unk>", "--chat-template", str(TEMPLATE)]
    )
    tokenizer = load_tokenizer(output)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "</s>")
    assert tokenizer.chat_template == TEMPLATE.read_text(encoding="utf-8")
    before, after = (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (published, output)
    )
    assert before == after


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--pad-token", "<pad>"], "--pad-token <pad>: is not in the vocabulary"),
        (
            ["--pad-token", "</s>", "--chat-template", str(TEMPLATE)],
            "the pad token is the end-of-sequence token",
        ),
        (["--pad-token", "<unk>"], "has no chat template"),
    ],
)
def test_what_is_still_missing_is_said(published, tmp_path, capsys, options, text):
    with pytest.raises(SystemExit) as stopped:
        SCRIPT.main([str(published), "--output", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
