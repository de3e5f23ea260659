"""The chat templates that ship: what is asked, answered and scored are the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.models import whole_dialogue
from train.encode import IGNORED, label_conversations

TEMPLATES = sorted((Path(__file__).parents[2] / "configs" / "chat_templates").glob("*.jinja"))
TOKENS = {  # end token and the other special tokens of the models that each is meant for
    "chatml": ("<|im_end|>", ["<|im_start|>"], None),
    "llama3": ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>"),
    "mistral": ("</s>", ["[INST]", "[/INST]"], "<s>"),
}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven, of course."},
]


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens and the template of one of them."""
    end, others, begin = TOKENS[request.param.stem]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=end,
        bos_token=begin,
        pad_token="<pad>",
        additional_special_tokens=others,
        chat_template=request.param.read_text(encoding="utf-8"),
    )


def test_the_answers_and_their_end_carry_the_loss(tokenizer):
    [encoded] = label_conversations(tokenizer, [DIALOGUE])
    kept = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    answers = [part.strip() for part in text.split(str(tokenizer.eos_token))]
    assert answers == ["Four.", "Seven, of course.", ""]


@pytest.mark.parametrize("turns", [2, 4])
def test_a_prompt_is_how_the_dialogue_begins(tokenizer, turns):
    prompt = tokenizer.apply_chat_template(DIALOGUE[:turns], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(DIALOGUE[: turns + 1], tokenize=False)
    assert whole.startswith(prompt)
    assert whole.removeprefix(prompt).strip() == f"{DIALOGUE[turns]['content']}{tokenizer.eos_token}"


def test_a_dialogue_begins_once_and_ends_where_the_score_is_read(tokenizer):
    text = whole_dialogue(tokenizer, DIALOGUE)
    assert text.endswith(str(tokenizer.eos_token))
    assert text.count(str(tokenizer.bos_token)) == (1 if tokenizer.bos_token else 0)
    assert "Be brief." in text and "Two and two?" in text
