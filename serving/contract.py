"""Inputs and outputs of Triton's vLLM backend (release 25.12), and the config.pbtxt that spells them out.

Triton would complete a shorter config by asking the backend; with auto-complete off (which saves the embedded
server one model load) everything must be written down, and then both servers read the same file.
Source: github.com/triton-inference-server/vllm_backend, README and docs/additional_outputs.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class TensorSpec(NamedTuple):
    """One tensor of the model: `dims` as config.pbtxt wants them (-1: any length)."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


INPUTS = (
    TensorSpec("text_input", "TYPE_STRING", (1,)),
    TensorSpec("image", "TYPE_STRING", (-1,), optional=True),
    TensorSpec("stream", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("sampling_parameters", "TYPE_STRING", (1,), optional=True),
    TensorSpec("exclude_input_in_output", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("return_finish_reason", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("return_cumulative_logprob", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("return_logprobs", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("return_num_input_tokens", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("return_num_output_tokens", "TYPE_BOOL", (1,), optional=True),
    TensorSpec("embedding_request", "TYPE_STRING", (1,), optional=True),
)
OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", (-1,)),
    TensorSpec("finish_reason", "TYPE_STRING", (-1,)),
    TensorSpec("cumulative_logprob", "TYPE_FP32", (-1,)),
    TensorSpec("logprobs", "TYPE_STRING", (-1,)),
    TensorSpec("num_input_tokens", "TYPE_UINT32", (1,)),
    TensorSpec("num_output_tokens", "TYPE_UINT32", (-1,)),
)


def render_config(
    name: str,
    parameters: Mapping[str, str],
    *,
    backend: str = "vllm",
    kind: str = "KIND_MODEL",
    num_versions: int = 1,
) -> str:
    """Text of config.pbtxt.

    Args:
        name: the model's name, equal to its folder's.
        parameters: strings for the backend. The embedded one reads its caps from them; vLLM's ignores them.
        backend, kind: of Triton; the Python backend has the same tensors as vLLM's.
        num_versions: how many of the newest versions are loaded.
    """
    lines = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"version_policy {{ latest {{ num_versions: {num_versions} }} }}",
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
    ]
    lines += [_tensor("input", spec) for spec in INPUTS]
    lines += [_tensor("output", spec) for spec in OUTPUTS]
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    return "\n".join(lines) + "\n"


def _tensor(kind: str, spec: TensorSpec) -> str:
    dims = ", ".join(str(size) for size in spec.dims)
    optional = " optional: true" if spec.optional else ""
    return f'{kind} [ {{ name: "{spec.name}" data_type: {spec.data_type} dims: [ {dims} ]{optional} }} ]'
