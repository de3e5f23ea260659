"""Target `triton-onnx`: a reward model or classifier as one ONNX graph for Triton's ONNX Runtime backend.

    1/model.onnx      input_ids, attention_mask: int64 [batch, tokens]
                      -> score: float32 [batch, 1], or logits: float32 [batch, labels]
    1/tokenizer/      the tokenizer and chat template that make the ids

A reward model's score is what training and evaluation read: the head at the last attended token, less the
calibration bias (posttrain.models.score_ids). Before anything is published the graph is run by onnxruntime on
batches of several shapes, padded on either side, and has to agree with torch within TOLERANCE.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError, UserError
from posttrain.models import is_adapter, load_reward_model, score_ids

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5
OPSET = 17
TOKENIZER = "tokenizer"
_SHAPES = ((1, 1), (1, 9), (3, 17), (5, 40))


def export_onnx(source: Path, version_dir: Path, seed: int) -> dict[str, Any]:
    """Write model.onnx and tokenizer/.

    Returns {"output": name, "size": values per row, "max_model_len": tokens, "max_difference": to torch,
    "calibration": of a reward model}. seed: of the token ids that are compared. Raises UserError where onnx
    or onnxruntime is missing or `source` is no classifier, PosttrainError when the graph does not compute
    what torch does.
    """
    _require_packages()
    from transformers import AutoTokenizer

    model, output, calibration = load_scoring_model(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(version_dir / TOKENIZER)
    scorer = make_scorer(model, calibration)
    path = version_dir / "model.onnx"
    size = _write_graph(scorer, output, path)
    longest = int(model.config.get_text_config().max_position_embeddings)
    largest = compare_with_torch(scorer, path, int(model.config.vocab_size), longest, seed)
    if not largest <= TOLERANCE:
        raise PosttrainError(
            f"{source}: the ONNX graph differs from torch by {largest:.2g}, allowed is {TOLERANCE:g}\n"
            "    this architecture does not export faithfully; use the target triton-python"
        )
    return {
        "output": output,
        "size": size,
        "max_model_len": longest,
        "max_difference": largest,
        "calibration": calibration,
    }


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"target triton-onnx: {error.name} is not installed\n    pip install 'posttrain[onnx]'"
        ) from error


def load_scoring_model(source: Path) -> tuple[Any, str, dict[str, Any] | None]:
    """The model in float32, the name of its output, and a reward model's calibration.

    A model with one label and a `score` head is a reward model; any other is a classifier, read by its own
    pooling. Raises UserError for a model that is neither.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not is_adapter(source):
        config = AutoConfig.from_pretrained(source)
        architectures = config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise UserError(
                f"{source}: is no reward model or classifier (architectures {architectures})\n"
                "    export a language model with the target triton-vllm or triton-python"
            )
        if config.num_labels > 1:
            model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
            return model, "logits", None
    model, calibration = load_reward_model(source)
    return model, "score", calibration


def make_scorer(model: Any, calibration: dict[str, Any] | None) -> torch.nn.Module:
    """What becomes the graph: (input_ids_BT, attention_mask_BT) -> scores_B1 or logits_BL."""
    import torch

    # Its mask is arithmetic; sdpa chooses between ways of masking while it is traced.
    model.set_attn_implementation("eager")

    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            if calibration is not None:
                return score_ids(self.model, calibration, input_ids, attention_mask)[:, None]
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    return Scorer().eval()


def _write_graph(scorer: torch.nn.Module, output: str, path: Path) -> int:
    """Trace the model; returns the values per row."""
    import torch

    ids_BT = torch.arange(2, 16).reshape(2, 7)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 5:] = 0
    axes = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of each Python branch; compare_with_torch says whether one mattered.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            scorer,
            (ids_BT, mask_BT),
            str(path),
            input_names=list(axes),
            output_names=[output],
            dynamic_axes={**axes, output: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
        return int(scorer(ids_BT, mask_BT).shape[1])


def compare_with_torch(
    scorer: torch.nn.Module, path: Path, vocab_size: int, longest: int, seed: int
) -> float:
    """The largest difference between the graph and torch, over batches of several shapes and paddings."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for rows, length in _SHAPES:
        length = min(length, longest)
        ids_BT = torch.randint(0, vocab_size, (rows, length), generator=generator)
        for side in ("right", "left"):
            mask_BT = torch.ones_like(ids_BT)
            for row in range(1, rows):
                cut = min(row * 2, length - 1)
                if side == "right":
                    mask_BT[row, length - cut :] = 0
                else:
                    mask_BT[row, :cut] = 0
            with torch.no_grad():
                expected = scorer(ids_BT, mask_BT).numpy()
            feed = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
            (found,) = session.run(None, feed)
            gap = np.abs(np.asarray(found) - expected).max()
            largest = max(largest, float(gap) if np.isfinite(gap) else float("inf"))
    return largest


def render_onnx_config(name: str, output: str, size: int, num_versions: int) -> str:
    """config.pbtxt: requests of the same length are batched by Triton."""
    return (
        f'name: "{name}"\n'
        'backend: "onnxruntime"\n'
        "max_batch_size: 32\n"
        "dynamic_batching { max_queue_delay_microseconds: 1000 }\n"
        f"version_policy {{ latest {{ num_versions: {num_versions} }} }}\n"
        "instance_group [ { count: 1 kind: KIND_AUTO } ]\n"
        'input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]\n'
        'input [ { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] } ]\n'
        f'output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {size} ] }} ]\n'
    )
