"""Content hashes: of JSON values, files, directories, data sets and tokenizers. All are sha256 in hex."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.patterns import walk

_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")
# Files that a trainer leaves in a model directory and that hold dates or paths, not the model.
_NOT_CONTENT = ("training_args.bin", "README.md", ".gitattributes")


def hash_json(value: Any) -> str:
    """Hash of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of the bytes of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """Hash of a file, or of the names and contents of all files under a directory (hidden ones left out)."""
    if path.is_file():
        return hash_file(path)
    files = [file for file in content_files(path) if file.name not in _NOT_CONTENT]
    return hash_json({file.relative_to(path).as_posix(): hash_file(file) for file in files})


def content_files(directory: Path) -> list[Path]:
    """Every file under `directory` in a fixed order, those behind links too, hidden ones left out."""
    return sorted(walk(directory))


def hash_dataset(path: Path) -> str:
    """The content hash in dataset.json of a dataset directory, or the hash of the file or files."""
    card = path / "dataset.json"
    if card.is_file():
        declared = json.loads(card.read_text(encoding="utf-8")).get("content_hash")
        if isinstance(declared, str) and declared:
            return declared
    return hash_path(path)


def fingerprint_tokenizer(model_dir: Path) -> dict[str, str]:
    """{"tokenizer": hash, "chat_template": hash} of a model directory, read without transformers.

    Equal exactly when two models read and write the same ids for the same conversation. Truncation and
    padding state, which training changes in passing, does not count; special tokens do. An adapter
    directory without tokenizer files has those of its base model. Raises UserError when there is no
    tokenizer.
    """
    source = _tokenizer_source(model_dir)
    settings = _read_json(source / "tokenizer_config.json")
    special = {name: _token_text(settings.get(name)) for name in _SPECIAL_TOKENS}
    content: dict[str, Any] = {"special": {name: text for name, text in special.items() if text is not None}}
    if (source / "tokenizer.json").is_file():
        fast = _read_json(source / "tokenizer.json")
        content["tokenizer.json"] = {key: fast[key] for key in fast if key not in ("padding", "truncation")}
    else:
        content["files"] = {
            name: hash_file(source / name) for name in _TOKENIZER_FILES if (source / name).is_file()
        }
    return {"tokenizer": hash_json(content), "chat_template": hash_json(_chat_template(source, settings))}


def _tokenizer_source(model_dir: Path) -> Path:
    names = ("tokenizer.json", *_TOKENIZER_FILES)
    if any((model_dir / name).is_file() for name in names):
        return model_dir
    if (model_dir / "adapter_config.json").is_file():
        base = adapter_base(model_dir)
        if any((base / name).is_file() for name in names):
            return base
    raise UserError(f"{model_dir}: holds no tokenizer; save the tokenizer beside the model (save_pretrained)")


def adapter_base(adapter_dir: Path) -> Path:
    """The base model of a PEFT adapter directory.

    When `runs/P` was moved or copied elsewhere, the base is looked for in the stage directory beside
    the adapter's own. Raises UserError when it is in neither place.
    """
    declared = str(_read_json(adapter_dir / "adapter_config.json").get("base_model_name_or_path") or "")
    if not declared:
        raise UserError(f"{adapter_dir / 'adapter_config.json'}: base_model_name_or_path is missing")
    base = Path(declared)
    if base.is_dir():
        return base
    moved = adapter_dir.absolute().parent.parent / base.parent.name / base.name
    if base.is_absolute() and moved.is_dir():
        return moved
    raise UserError(
        f"{adapter_dir}: this adapter needs its base model {declared}, which is not there\n"
        "    restore it, or set base_model_name_or_path in adapter_config.json to where it is now"
    )


def _chat_template(source: Path, settings: dict[str, Any]) -> Any:
    separate = source / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    return settings.get("chat_template")


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
