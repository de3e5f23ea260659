"""Loading of trained models, and the one way in which a reward model is read.

train, eval and serving share it, so that a model is the same thing to all of them. torch, transformers and
peft are imported inside the functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.hashing import adapter_base

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "adapter_base",
    "adapter_weight_names",
    "check_score_head",
    "is_adapter",
    "is_calibrated",
    "load_causal_lm",
    "load_chat_tokenizer",
    "load_reward_model",
    "load_tokenizer",
    "read_calibration",
    "score_ids",
    "whole_dialogue",
]

_DTYPES = ("float32", "bfloat16", "float16")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CALIBRATION = "reward_calibration.json"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a PEFT adapter directory rather than a full model."""
    return (Path(path) / "adapter_config.json").is_file()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model directory, or that of an adapter's base model.

    Raises UserError when it has no chat template, no pad token, no end-of-sequence token, or when pad and
    end-of-sequence are one token: padding would then be learned, or pooled, as the end of the answer.
    """
    tokenizer = load_chat_tokenizer(path)
    source = tokenizer.name_or_path
    remedy = "set it in the tokenizer, save it there, and retrain what was trained with the old one"
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no end-of-sequence token\n    {remedy}")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{source}: the tokenizer has no pad token\n    {remedy}; it must differ from eos")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        token = tokenizer.eos_token
        raise UserError(f"{source}: the pad token is the end-of-sequence token ({token})\n    {remedy}")
    return tokenizer


def load_chat_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, but special tokens are not looked at: enough to render and encode whole dialogues.

    Raises UserError when it cannot be loaded or has no chat template.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    source = path
    if is_adapter(path) and not (path / "tokenizer_config.json").is_file():
        source = adapter_base(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"{source}: the tokenizer has no chat template\n    add chat_template.jinja to the directory"
        )
    return tokenizer


def load_causal_lm(path: Path, dtype: str = "float32") -> PreTrainedModel:
    """The language model in `path`, in evaluation mode on the CPU.

    A PEFT adapter directory gives its base model with the adapter merged in memory, checked for
    non-finite weights. dtype: "float32", "bfloat16" or "float16". Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    torch_dtype = _torch_dtype(dtype)
    if not is_adapter(path):
        return _from_pretrained(AutoModelForCausalLM, path, dtype=torch_dtype).eval()
    base = _from_pretrained(AutoModelForCausalLM, adapter_base(path), dtype=torch_dtype)
    return _merged(base, path, "CAUSAL_LM")


def load_reward_model(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The reward model in `path` (one score per sequence, float32, CPU) and its calibration {"bias": ...}.

    A PEFT adapter directory is merged in memory. Without reward_calibration.json the bias is 0. Raises
    UserError when the score head was not saved: its values would be random.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    path = Path(path)
    check_score_head(path)
    source = adapter_base(path) if is_adapter(path) else path
    model = _from_pretrained(AutoModelForSequenceClassification, source, dtype=torch.float32, num_labels=1)
    if is_adapter(path):
        model = _merged(model, path, "SEQ_CLS")
    return model.eval(), read_calibration(path)


def is_calibrated(path: Path) -> bool:
    """Whether the reward model in `path` comes from the reward stage, which writes a calibration file."""
    return (path / _CALIBRATION).is_file()


def read_calibration(path: Path) -> dict[str, Any]:
    """The calibration {"bias": ...} of the reward model in `path`; a bias of 0 where there is none."""
    if not is_calibrated(path):
        return {"bias": 0.0}
    return json.loads((path / _CALIBRATION).read_text(encoding="utf-8"))


def score_ids(
    model: PreTrainedModel | PeftModel,
    calibration: dict[str, Any],
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
) -> torch.Tensor:
    """Rewards_B: the score at the last attended token of each row, less the calibration bias.

    Padding may be on either side: positions come from the mask, and the place that is read does too
    (transformers' own pooling looks for the pad token, which fails when pad and end-of-sequence
    coincide). The model may be plain or still under PEFT. Gradients flow if they are enabled. The head is
    computed in the type of its weights, under autocast too.
    Raises ValueError when a row has no attended token.
    """
    import torch
    from peft import PeftModel

    classifier: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    mask_BT = attention_mask_BT.long()
    if bool((mask_BT.sum(dim=1) == 0).any()):
        raise ValueError("score_ids: a row has no attended token")
    position_ids_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    hidden_BTD = classifier.base_model(
        input_ids=input_ids_BT, attention_mask=mask_BT, position_ids=position_ids_BT, use_cache=False
    ).last_hidden_state
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (mask_BT * places_T).argmax(dim=1)
    rows_B = torch.arange(mask_BT.shape[0], device=mask_BT.device)
    # Under PEFT the head is there twice: as it was loaded, and as it is trained.
    head = [p for name, p in classifier.score.named_parameters() if "original_module" not in name]
    head_dtype = head[0].dtype
    with torch.autocast(input_ids_BT.device.type, enabled=False):
        scores_B1 = classifier.score(hidden_BTD[rows_B, last_B].to(head_dtype))
    return scores_B1.squeeze(-1) - float(calibration["bias"])


def whole_dialogue(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A finished dialogue as a reward model reads it: the chat template's text, up to the end token.

    Some templates (Qwen2.5's) write a line break after the end token, which the policy never samples and
    at which no score may be read. Raises jinja2's TemplateError where the template refuses the dialogue.
    """
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    bare = text.rstrip()
    return bare if bare.endswith(str(tokenizer.eos_token)) else text


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    if dtype not in _DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(_DTYPES)}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _from_pretrained(auto_class: Any, path: Path, **arguments: Any) -> PreTrainedModel:
    try:
        return auto_class.from_pretrained(path, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be loaded as a model ({_first_line(error)})") from error


def _merged(base: PreTrainedModel, path: Path, task: str) -> PreTrainedModel:
    from peft import PeftModel

    declared = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if declared != task:
        kind = {"CAUSAL_LM": "a language model", "SEQ_CLS": "a reward model"}[task]
        raise UserError(f"{path}: the adapter was trained for task {declared}, so it is not {kind} ({task})")
    merged = PeftModel.from_pretrained(base, str(path)).merge_and_unload(safe_merge=True)
    return merged.eval()


def check_score_head(path: Path) -> None:
    """Raise UserError unless a reward model's files hold the weight of its score head."""
    if is_adapter(path):
        names = adapter_weight_names(path)
    else:
        names = _weight_names(
            path, ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        )
    if any("score" in name.split(".") for name in names):
        return
    raise UserError(
        f"{path}: holds no score head, so it is not a trained reward model\n"
        "    train it with the reward stage; with PEFT the task type must be SEQ_CLS "
        "and `score` in modules_to_save"
    )


def adapter_weight_names(path: Path) -> list[str]:
    """The names of the tensors in an adapter directory, read without the tensors. Raises UserError."""
    return _weight_names(path, _ADAPTER_WEIGHTS)


def _weight_names(path: Path, candidates: tuple[str, ...]) -> list[str]:
    for name in candidates:
        file = path / name
        if not file.is_file():
            continue
        if file.suffix == ".json":
            return list(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as weights:
                return list(weights.keys())
        import torch

        return list(torch.load(file, map_location="cpu", weights_only=True))
    raise UserError(f"{path}: holds no weights (looked for {', '.join(candidates)})")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
