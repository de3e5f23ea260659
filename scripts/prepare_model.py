"""A Hub model made ready to train: a pad token, an end-of-turn token and a chat template where it lacks them.

    python scripts/prepare_model.py mistralai/Mistral-7B-v0.3 --output models/mistralai/Mistral-7B-v0.3 \
        --pad-token '<unk>' --chat-template configs/chat_templates/mistral.jinja

Base models have no chat template, and the tokenizers of Llama 3 and Mistral no pad token: posttrain refuses
to train on either (docs/preflight.md). This downloads the model (or copies a local directory) to --output and
changes its tokenizer only. The tokens must be in the vocabulary already, so that no embedding is resized and
the weights stay as published. Run again, it downloads nothing that is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from posttrain.errors import PosttrainError, UserError
from posttrain.models import load_tokenizer

OTHER_FORMATS = ["original/*", "consolidated*", "*.pth", "*.gguf", "onnx/*", "runs/*"]
"""The same weights again, in files that transformers does not read."""


def prepare(
    source: str, output: Path, pad_token: str | None, eos_token: str | None, chat_template: Path | None
) -> None:
    """Write the model with its tokenizer changed. None leaves what is there.

    Raises UserError for a token that is not in the vocabulary, and where something is still missing to train.
    """
    if not Path(source).is_dir():
        snapshot_download(source, local_dir=output, ignore_patterns=OTHER_FORMATS)
    elif Path(source).resolve() != output.resolve():
        shutil.copytree(source, output, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(output)
    for name, token in (("pad_token", pad_token), ("eos_token", eos_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise UserError(
                f"--{name.replace('_', '-')} {token}: is not in the vocabulary of {source}\n"
                "    choose a token that is, so that the embedding keeps its size"
            )
        setattr(tokenizer, name, token)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(output)
    load_tokenizer(output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id, or a local model directory.")
    parser.add_argument("--output", type=Path, required=True, help="Where the model is written.")
    parser.add_argument("--pad-token", help="Pad token; must differ from the end token.")
    parser.add_argument("--eos-token", help="The token that ends a turn in the chat template.")
    parser.add_argument("--chat-template", type=Path, help="A Jinja file, with generation markers.")
    asked = parser.parse_args(arguments)
    try:
        prepare(asked.model, asked.output, asked.pad_token, asked.eos_token, asked.chat_template)
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
