"""The peer of `bench_serve.py` that runs in Triton: generate() on the batches of its dynamic batcher.

Copied into a model repository as 1/model.py of Triton's Python backend. Triton collects requests that wait,
at most max_queue_delay_microseconds for the first of them; a batch is padded on the left, every answer of it
is generated to the longest one asked for, and cut to its own length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from transformers import AutoModelForCausalLM, AutoTokenizer


class TritonPythonModel:
    """What tritonserver calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights that parameter `weights` of config.pbtxt names."""
        parameters = json.loads(args["model_config"])["parameters"]
        weights = Path(parameters["weights"]["string_value"])
        torch.set_num_threads(int(parameters["threads"]["string_value"]))
        dtype = getattr(torch, parameters["dtype"]["string_value"])
        self.model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(weights, padding_side="left")

    @torch.inference_mode()
    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch: prompts [B, 1] and lengths [B, 1] of each request, answered together."""
        prompts: list[str] = []
        wanted: list[int] = []
        sizes = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "prompt").as_numpy().reshape(-1)
            lengths = pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy().reshape(-1)
            prompts += [text.decode("utf-8") for text in texts]
            wanted += [int(length) for length in lengths]
            sizes.append(len(texts))
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        answers_BT = self.model.generate(**inputs, do_sample=False, max_new_tokens=max(wanted))
        width = inputs["input_ids"].shape[1]
        rows = [row[width : width + length] for row, length in zip(answers_BT, wanted, strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        counts = [len(row) for row in rows]
        responses, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            text = np.array([text.encode("utf-8") for text in texts[part]], dtype=np.object_)
            count = np.array(counts[part], dtype=np.int32)
            tensors = [
                pb_utils.Tensor("text", text.reshape(-1, 1)),
                pb_utils.Tensor("tokens", count.reshape(-1, 1)),
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start += size
        return responses
