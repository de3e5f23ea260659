"""What each target writes into a version folder beside the weights.

triton-vllm, kserve    model.json            engine arguments of vLLM, read by Triton's vLLM backend
vllm                   model.json            the same, for the record; deploy/ has the command
triton-python          model.json, model.py  and what it imports: transformers on Triton's Python backend
triton-trtllm          model.yaml            arguments of TensorRT-LLM's LLM API
triton-onnx            model.onnx            serving/onnx_graph.py
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.config import ExportConfig
from serving.contract import render_config
from serving.onnx_graph import render_onnx_config
from serving.repository import WEIGHTS
from serving.weights import write_json

_BACKEND = Path(__file__).resolve().parent / "backends" / "vllm"
_BACKEND_MODULES = sorted(path.name for path in _BACKEND.glob("*.py") if path.name != "model.py")


@dataclass(frozen=True)
class Layout:
    """Where a version is and what it may be asked for.

    max_lora_rank: None without adapters. scores: name and size of an ONNX graph's output, None for others.
    """

    config: ExportConfig
    version: str
    max_model_len: int
    max_lora_rank: int | None
    scores: tuple[str, int] | None = None

    @property
    def mount(self) -> str:
        """The version folder as the container sees it, with a final slash; "" for relative paths."""
        if self.config.mount_path is None:
            return ""
        return f"{self.config.mount_path.rstrip('/')}/{self.config.name}/{self.version}/"

    @property
    def max_output_tokens(self) -> int:
        """Most tokens of one answer."""
        return min(self.config.max_output_tokens, self.max_model_len)

    @property
    def limits(self) -> dict[str, int]:
        """The caps that the embedded server enforces."""
        return {
            "max_prompt_characters": self.config.max_prompt_characters,
            "max_output_tokens": self.max_output_tokens,
            "max_queue": self.config.max_queue,
        }

    def engine_arguments(self) -> dict[str, Any]:
        """model.json: keyword arguments of vLLM's AsyncEngineArgs."""
        lora: dict[str, Any] = {}
        if self.max_lora_rank is not None:
            # A string, because Triton's vLLM backend asks for .lower() == "true".
            lora = {"enable_lora": "true", "max_lora_rank": self.max_lora_rank}
            lora["max_loras"] = len(self.config.adapters)
        return {
            "model": self.mount + WEIGHTS,
            "dtype": self.config.dtype,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            **lora,
            **self.config.engine_args,
        }

    def config_pbtxt(self) -> str | None:
        """Text of config.pbtxt; None for a target that has none of its own."""
        config = self.config
        if config.target in ("vllm", "triton-trtllm"):
            return None
        if self.scores is not None:
            return render_onnx_config(config.name, *self.scores, config.num_versions)
        limits = {name: str(value) for name, value in self.limits.items()}
        python = config.target == "triton-python"
        return render_config(
            config.name,
            limits,
            backend="python" if python else "vllm",
            kind="KIND_AUTO" if python else "KIND_MODEL",
            num_versions=config.num_versions,
        )


def write_target(version_dir: Path, layout: Layout) -> None:
    """Write the files of the target that stand beside the weights."""
    target = layout.config.target
    if target == "triton-onnx":
        return
    if target == "triton-trtllm":
        text = yaml.safe_dump(trtllm_arguments(layout), sort_keys=False)
        (version_dir / "model.yaml").write_text(text, encoding="utf-8")
        return
    write_json(version_dir / "model.json", layout.engine_arguments())
    if target == "triton-python":
        write_python_backend(version_dir)


def trtllm_arguments(layout: Layout) -> dict[str, Any]:
    """model.yaml: keyword arguments of tensorrt_llm.LLM, and what Triton is told in its place."""
    return {
        "model": layout.mount + WEIGHTS,
        "backend": "pytorch",
        "dtype": layout.config.dtype,
        "max_seq_len": layout.max_model_len,
        "kv_cache_config": {"free_gpu_memory_fraction": layout.config.gpu_memory_utilization},
        **layout.config.engine_args,
        "triton_config": {"max_batch_size": 0, "decoupled": True},
    }


def write_python_backend(version_dir: Path) -> None:
    """model.py and the modules it imports; the version folder is on the path of Triton's Python backend."""
    shutil.copyfile(_BACKEND / "model.py", version_dir / "model.py")
    package = version_dir / "serving" / "backends" / "vllm"
    package.mkdir(parents=True)
    for name in _BACKEND_MODULES:
        shutil.copyfile(_BACKEND / name, package / name)
    for folder in (package.parent, package.parent.parent):
        (folder / "__init__.py").write_text(f'"""{folder.name}: modules of model.py."""\n', encoding="utf-8")
