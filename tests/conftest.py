"""Fixtures every test folder shares: a two-layer Llama, its tokenizer, small dataset directories.

Everything is built here, from a fixed seed, in under two seconds and without a network. The fixtures are
session-scoped and must not be written to: a test that changes a directory copies it first.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each start a thread for every core wait for one another: ten times slower on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"
)
CHROMIUM_ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SENTENCES = (
    "Where is my order {code}? I am {name}.",
    "Can I return the {product} from order {code}?",
    "Hello {name}, your {product} in order {code} ships on Monday.",
    "Hello {name}, we refund order {code} today. Thank you for your patience.",
    "No. Look it up yourself.",
    "I need help with the {product}, please.",
    "You are the support desk of a small shop.",
    "user system assistant tool",
)
NAMES = ("Maria", "Omar", "Wei", "Ingrid", "Noah", "Elena", "Kofi", "Yuki")
PRODUCTS = ("kettle", "lamp", "blender", "tent", "camera", "mirror")
Message = dict[str, str]


def _facts(rng: random.Random) -> dict[str, str]:
    return {
        "name": rng.choice(NAMES),
        "product": rng.choice(PRODUCTS),
        "code": f"K{rng.randrange(100, 1000)}",
    }


def _question(facts: dict[str, str]) -> list[Message]:
    return [{"role": "user", "content": SENTENCES[0].format(**facts)}]


def _good(facts: dict[str, str]) -> str:
    return SENTENCES[2].format(**facts)


def _common(kind: str, index: int, group: str, meta: dict[str, Any]) -> dict[str, str]:
    return {"id": f"{kind}-{index}", "source": "fixture", "group": group, "meta": json.dumps(meta)}


def conversation_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Dialogues of one or two turns; every third opens with a system message."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        facts = _facts(rng)
        system = [{"role": "system", "content": SENTENCES[6]}] if index % 3 == 0 else []
        messages = [*system, *_question(facts), {"role": "assistant", "content": _good(facts)}]
        if index % 2:
            messages += [
                {"role": "user", "content": SENTENCES[1].format(**facts)},
                {"role": "assistant", "content": SENTENCES[3].format(**facts)},
            ]
        rows.append(_common("conversation", index, facts["code"], {"facts": facts}) | {"messages": messages})
    return rows


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of a helpful answer and a rude one, so that a reward model can tell them apart."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        facts = _facts(rng)
        meta = {"facts": facts, "gold_chosen": 0.9, "gold_rejected": 0.2, "flipped": False}
        rows.append(
            _common("preference", index, facts["code"], meta)
            | {
                "prompt": _question(facts),
                "chosen": [{"role": "assistant", "content": _good(facts)}],
                "rejected": [{"role": "assistant", "content": SENTENCES[4]}],
            }
        )
    return rows


def unpaired_preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Single answers: two of three helpful and labelled true, the third rude and labelled false."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        facts = _facts(rng)
        good = index % 3 != 0
        answer = _good(facts) if good else f"{SENTENCES[4]} {facts['name']}!"
        rows.append(
            _common("unpaired_preference", index, facts["code"], {"facts": facts})
            | {
                "prompt": _question(facts),
                "completion": [{"role": "assistant", "content": answer}],
                "label": good,
            }
        )
    return rows


def prompt_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """User turns without an answer."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        facts = _facts(rng)
        rows.append(_common("prompt", index, facts["code"], {"facts": facts}) | {"prompt": _question(facts)})
    return rows


def text_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Plain sentences."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        facts = _facts(rng)
        text = rng.choice(SENTENCES).format(**facts)
        rows.append(_common("text", index, facts["code"], {}) | {"text": text})
    return rows


ROWS = {
    "conversation": conversation_rows,
    "preference": preference_rows,
    "unpaired_preference": unpaired_preference_rows,
    "prompt": prompt_rows,
    "text": text_rows,
}


def save_dataset(directory: Path, kind: str, train: Sequence[dict], evaluation: Sequence[dict]) -> Path:
    """Write a dataset directory (train.parquet, eval.parquet, dataset.json) and return it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns: dict[str, list[tuple[str, pa.DataType]]] = {
        "text": [("text", pa.string())],
        "conversation": [("messages", turns)],
        "preference": [("prompt", turns), ("chosen", turns), ("rejected", turns)],
        "unpaired_preference": [("prompt", turns), ("completion", turns), ("label", pa.bool_())],
        "prompt": [("prompt", turns)],
    }
    schema = pa.schema([(name, pa.string()) for name in ("id", "source", "group", "meta")] + columns[kind])
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for split, rows in (("train", train), ("eval", evaluation)):
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), directory / f"{split}.parquet")
        digest.update((directory / f"{split}.parquet").read_bytes())
    summary = {
        "kind": kind,
        "rows_in": len(train) + len(evaluation),
        "rows_out": {"train": len(train), "eval": len(evaluation)},
        "drops": {},
        "sources": [],
        "split": {"eval_fraction": len(evaluation) / max(len(train) + len(evaluation), 1), "by": "group"},
        "content_hash": digest.hexdigest(),
        "columns": schema.names,
    }
    (directory / "dataset.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


def train_tokenizer() -> Any:
    """A byte-level BPE of 384 entries with the ChatML template; end of turn and padding are distinct."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    bpe.train_from_iterator((text.format(**_facts(rng)) for text in SENTENCES for _ in range(8)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(tokenizer: Any, **overrides: Any) -> Any:
    """Two Llama layers of width 32, the token ids of `tokenizer`."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**(values | overrides))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The fixture tokenizer (PreTrainedTokenizerFast)."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A causal language model directory: random weights, tokenizer, template, generation config."""
    import torch
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tiny_tokenizer))
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    model.generation_config.pad_token_id = tiny_tokenizer.pad_token_id
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A sequence-classification directory with one label and reward_calibration.json (bias 0.25)."""
    import torch
    from transformers import LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("tiny") / "reward"
    torch.manual_seed(1)
    LlamaForSequenceClassification(llama_config(tiny_tokenizer, num_labels=1)).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    calibration = json.dumps({"bias": 0.25, "n": 8})
    (directory / "reward_calibration.json").write_text(calibration, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def write_dataset() -> Callable[[Path, str, Sequence[dict], Sequence[dict]], Path]:
    """save_dataset(directory, kind, train_rows, eval_rows), for tests that need rows of their own."""
    return save_dataset


@pytest.fixture(scope="session")
def make_rows() -> dict[str, Callable[[int, int], list[dict[str, Any]]]]:
    """Row generators by kind: make_rows["preference"](count, seed)."""
    return ROWS


def _dataset_fixture(factory: pytest.TempPathFactory, kind: str) -> Path:
    return save_dataset(factory.mktemp("data") / kind, kind, ROWS[kind](48, 0), ROWS[kind](16, 1))


@pytest.fixture(scope="session")
def conversation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 16 dialogues."""
    return _dataset_fixture(tmp_path_factory, "conversation")


@pytest.fixture(scope="session")
def preference_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 16 preference pairs."""
    return _dataset_fixture(tmp_path_factory, "preference")


@pytest.fixture(scope="session")
def labelled_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 16 single answers, two thirds of them labelled true."""
    return _dataset_fixture(tmp_path_factory, "unpaired_preference")


@pytest.fixture(scope="session")
def prompt_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 16 prompts."""
    return _dataset_fixture(tmp_path_factory, "prompt")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 16 plain texts."""
    return _dataset_fixture(tmp_path_factory, "text")


def random_adapter(
    directory: Path,
    base: Path,
    *,
    seed: int,
    r: int = 4,
    scale: float = 1.0,
    target_modules: str | list[str] = "all-linear",
) -> Path:
    """A LoRA adapter on `base` with random weights in both factors, those of B times `scale`."""
    import torch
    from peft import LoraConfig, get_peft_model

    from posttrain.models import load_causal_lm, load_tokenizer

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=target_modules,
        r=r,
        lora_alpha=2 * r,
        init_lora_weights=False,
    )
    adapted = get_peft_model(load_causal_lm(base), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight *= scale
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window, for one module: playwright holds the event loop meanwhile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield opened
        opened.close()
