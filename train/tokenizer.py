"""Build a byte-level BPE tokenizer with a ChatML-like template from a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first %}{{ '\\n' }}{% endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif -%}"
)
"""ChatML, but for the newline after the last turn: a rendered conversation ends with the end-of-turn token,
which is the token a policy ends its answer with. What a reward model is trained on and what PPO scores end
alike."""


def build_tokenizer(
    texts: Sequence[str], vocab_size: int, max_length: int, keep_whole: str | None = None
) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Args:
        texts: the corpus.
        vocab_size: of the BPE, special tokens and the 256 bytes included.
        max_length: the model's longest sequence, in tokens.
        keep_whole: regular expression; each distinct match becomes one token together with the space before
            it.

    Returns:
        A tokenizer with distinct pad and end-of-turn (EOS) tokens, no BOS, and `CHAT_TEMPLATE`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if keep_whole is not None:
        whole = _matches(texts, keep_whole)
        tokenizer.add_tokens([AddedToken(" " + text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _matches(texts: Iterable[str], pattern: str) -> list[str]:
    compiled = re.compile(pattern)
    return sorted({match for text in texts for match in compiled.findall(text)})
