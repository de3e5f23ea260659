"""Triton model of the stand-in: requests in, responses out; the work is the engine's.

Loaded by tritonserver as the python-based backend "vllm", and by its python backend as the model.py of an
export with the target triton-python. It keeps the tensors, defaults and errors of Triton's vLLM backend for
text generation, adapters by name included; images and embeddings are refused with an error.

Where the weights are: vLLM opens `model` of 1/model.json as a path of its container,
<mount_path>/<name>/<version>/weights. Here the repository is mounted elsewhere, so a path that ends in this
model's <name>/<version>/... is taken relative to this version's folder; so is a relative path.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.backends.vllm.engine import Engine, Limits, useful_threads
from serving.backends.vllm.responses import Responder, send_error
from serving.backends.vllm.sampling import RequestError, parse

FLAGS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


class TritonPythonModel:
    """What tritonserver calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights named in model.json and start the engine."""
        version_dir = Path(pb_utils.get_model_dir())
        engine_args = json.loads((version_dir / "model.json").read_text(encoding="utf-8"))
        weights = locate(engine_args["model"], version_dir)
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, engine_args["dtype"]))
        adapters = load_adapters(model, engine_args, version_dir)
        model.to(device_of(args))
        torch.set_num_threads(useful_threads(model))
        parameters = json.loads(args["model_config"])["parameters"]
        self.limits = Limits(
            max_model_len=engine_args["max_model_len"],
            max_prompt_characters=int(parameters["max_prompt_characters"]["string_value"]),
            max_output_tokens=int(parameters["max_output_tokens"]["string_value"]),
            max_queue=int(parameters["max_queue"]["string_value"]),
        )
        self.engine = Engine(model, AutoTokenizer.from_pretrained(weights), self.limits, adapters)

    def execute(self, requests: list[Any]) -> None:
        """Queue each request; answers leave through its response sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                prompt, stream, prepend, flags, parameters = read_request(request)
                params = parse(parameters, self.limits.max_output_tokens)
                if stream and params.n > 1:
                    raise RequestError("n must be 1 when streaming")
                responder = Responder(sender, stream, prompt if prepend else "", flags, params.n)
                self.engine.submit(prompt, params, *responder.sinks)
            except RequestError as error:
                send_error(sender, str(error), error.unavailable)

    def finalize(self) -> None:
        """Answer what is being answered, then stop."""
        self.engine.close()


def device_of(args: dict[str, str]) -> str:
    """The GPU of an instance of KIND_GPU; the CPU for all others."""
    return f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"


def load_adapters(model: Any, engine_args: dict[str, Any], version_dir: Path) -> Any:
    """The Adapters of multi_lora.json, None unless model.json enables them."""
    if str(engine_args.get("enable_lora", False)).lower() != "true":
        return None
    # peft takes seconds to import, and most models have no adapters.
    from serving.backends.vllm.adapters import Adapters

    paths = json.loads((version_dir / "multi_lora.json").read_text(encoding="utf-8"))
    return Adapters(model, {name: locate(path, version_dir) for name, path in paths.items()})


def locate(model: str, version_dir: Path) -> Path:
    """Folder of the weights for `model` of model.json; see the module's description."""
    parts = PurePosixPath(model).parts
    mounted = (version_dir.parent.name, version_dir.name)
    for at in range(len(parts) - 2):
        if parts[at : at + 2] == mounted and version_dir.joinpath(*parts[at + 2 :]).is_dir():
            return version_dir.joinpath(*parts[at + 2 :])
    return version_dir / model


def read_request(request: Any) -> tuple[str, bool, bool, set[str], str]:
    """Prompt, stream, whether the prompt opens the answer, the outputs wanted, and the parameters' JSON.

    Raises:
        RequestError: a tensor is missing, has no element, or asks for what is not served here.
    """
    for name in ("image", "embedding_request"):
        if pb_utils.get_input_tensor_by_name(request, name) is not None:
            raise RequestError(f"{name} is not supported by the embedded server")
    prompt = _text(request, "text_input")
    if prompt is None:
        raise RequestError("text_input is missing")
    stream = bool(_scalar(request, "stream"))
    exclude = _scalar(request, "exclude_input_in_output")
    if stream and exclude is not None and not exclude:
        raise RequestError("exclude_input_in_output=false is not allowed when streaming")
    prepend = not stream and not exclude
    flags = {name for name in FLAGS if _scalar(request, name)}
    parameters = _text(request, "sampling_parameters")
    return prompt, stream, prepend, flags, request.parameters() if parameters is None else parameters


def _scalar(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise RequestError(f"{name} must hold one element, got {len(values)}")
    return values[0]


def _text(request: Any, name: str) -> str | None:
    value = _scalar(request, name)
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not valid UTF-8: {error}") from error
