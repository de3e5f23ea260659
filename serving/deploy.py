"""How to run an export elsewhere: files for the newest version, written to RUN/deploy.

    triton-*    Dockerfile  docker-run.sh  kubernetes.yaml
    vllm        vllm-serve.sh  docker-run.sh
    kserve      Dockerfile  docker-run.sh  inference-service.yaml

and prometheus-rules.yaml, alert rules, for every target.

They are rendered, not run: where an export is made there need be neither Docker nor a cluster nor a GPU.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from posttrain.environment import package_versions
from serving.alerts import RULES, prometheus_rules
from serving.repository import ADAPTERS, REPOSITORY, WEIGHTS
from serving.targets import Layout

IMAGES = {
    "triton-vllm": "nvcr.io/nvidia/tritonserver:25.12-vllm-python-py3",
    "kserve": "nvcr.io/nvidia/tritonserver:25.12-vllm-python-py3",
    "triton-trtllm": "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3",
    "triton-python": "nvcr.io/nvidia/tritonserver:25.12-py3",
    "triton-onnx": "nvcr.io/nvidia/tritonserver:25.12-py3",
    "vllm": "vllm/vllm-openai:v0.11.0",
}
LLMAPI = "triton_backend/all_models/llmapi/tensorrt_llm"
DEFAULT_MOUNT = "/models"
_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
_LONGEST_NAME = 63


def write_deployment(folder: Path, layout: Layout) -> None:
    """Write the files of the layout's target."""
    target = layout.config.target
    scripts = {"docker-run.sh": docker_run(layout)}
    texts = {RULES: prometheus_rules(layout)}
    if target == "vllm":
        scripts["vllm-serve.sh"] = vllm_serve(layout)
    else:
        texts["Dockerfile"] = dockerfile(layout)
        manifests = inference_service(layout) if target == "kserve" else kubernetes(layout)
        name = "inference-service.yaml" if target == "kserve" else "kubernetes.yaml"
        texts[name] = yaml.safe_dump_all(manifests, sort_keys=False)
    for name, text in (texts | scripts).items():
        (folder / name).write_text(text, encoding="utf-8")


def is_built(layout: Layout) -> bool:
    """Whether the image of the target lacks what the model needs, so that one with it is built."""
    return layout.config.target in ("triton-python", "triton-trtllm")


def image_of(layout: Layout) -> str:
    """The container image, or what one is built from: the configured one, or the target's."""
    return layout.config.image or IMAGES[layout.config.target]


def mount_of(layout: Layout) -> str:
    """Where the container sees the repository."""
    return (layout.config.mount_path or DEFAULT_MOUNT).rstrip("/")


def resource_name(layout: Layout) -> str:
    """The model's name as a Kubernetes Service and Docker take names (RFC 1035 label).

    Lower case, dashes, a letter first, no dash last, at most 63 characters.
    """
    name = layout.config.name.lower().replace("_", "-")
    if not name[0].isalpha():
        name = f"m-{name}"
    return name[:_LONGEST_NAME].rstrip("-")


def built_tag(layout: Layout) -> str:
    """What the Dockerfile's image is called: the model and its newest version."""
    return f"{resource_name(layout)}:{layout.version}"


def needs_gpu(layout: Layout) -> int:
    """GPUs that one server asks for."""
    if layout.config.target in ("triton-python", "triton-onnx"):
        return 0
    return int(layout.config.engine_args.get("tensor_parallel_size", 1))


def server_command(layout: Layout) -> list[str]:
    """tritonserver and its arguments in the container."""
    return ["tritonserver", f"--model-repository={mount_of(layout)}", "--exit-timeout-secs=30"]


def dockerfile(layout: Layout) -> str:
    """An image that holds the repository; build it in RUN, with -f deploy/Dockerfile."""
    mount, name = mount_of(layout), layout.config.name
    lines = [f"# docker build -f deploy/Dockerfile -t {built_tag(layout)} .", f"FROM {image_of(layout)}"]
    if layout.config.target == "triton-python":
        versions = package_versions()
        # The package index has no local versions such as 2.9.0+cpu.
        wanted = [
            f"{package}=={versions[package].split('+')[0]}" for package in ("torch", "transformers", "peft")
        ]
        lines.append(f"RUN pip install --no-cache-dir {' '.join(wanted)}")
    lines.append(f"COPY {REPOSITORY} {mount}")
    if layout.config.target == "triton-trtllm":
        # model.py, helpers.py and config.pbtxt belong to the release of TensorRT-LLM in the image.
        lines += [
            "ARG TENSORRT_LLM_SOURCE=https://github.com/NVIDIA/TensorRT-LLM",
            "RUN version=$(python3 -c 'import tensorrt_llm as t; print(t.__version__)' | tail -1) && \\",
            '    git clone --quiet --depth 1 --branch "v$version" "$TENSORRT_LLM_SOURCE" /tmp/source && \\',
            f"    cp /tmp/source/{LLMAPI}/1/*.py {mount}/{name}/{layout.version}/ && \\",
            f"    sed 's/^name: .*/name: \"{name}\"/' /tmp/source/{LLMAPI}/config.pbtxt \\",
            f"        > {mount}/{name}/config.pbtxt && \\",
            "    rm -rf /tmp/source",
        ]
    lines.append(f"CMD {_json_list(server_command(layout))}")
    return "\n".join(lines) + "\n"


def docker_run(layout: Layout) -> str:
    """A script that serves the repository from where it is."""
    gpus = "--gpus all " if layout.config.target == "vllm" or needs_gpu(layout) else ""
    vllm = layout.config.target == "vllm"
    numbers = [8000] if vllm else list(_PORTS.values())
    ports = " ".join(f"-p 127.0.0.1:{number}:{number}" for number in numbers)
    lines = ["#!/bin/sh", "# Run in the export's directory."]
    if not vllm:
        lines[-1] += " The metrics are on port 8002."
    lines += [
        "# The server asks for no key, so only this machine reaches it. For others put posttrain gateway",
        "# in front; to publish a port itself, take 127.0.0.1: away, in a network you trust.",
    ]
    if is_built(layout):
        tag = built_tag(layout)
        lines += ["set -e", f"docker build -f deploy/Dockerfile -t {tag} ."]
        lines.append(f"exec docker run --rm {gpus}--shm-size 2g {ports} {tag}")
    else:
        command = vllm_arguments(layout) if vllm else server_command(layout)
        lines += [
            f"exec docker run --rm {gpus}--shm-size 2g {ports} \\",
            f'    -v "$PWD/{REPOSITORY}:{mount_of(layout)}:ro" \\',
            f"    {image_of(layout)} \\",
            f"    {shlex.join(command)}",
        ]
    return "\n".join(lines) + "\n"


def vllm_arguments(layout: Layout) -> list[str]:
    """Arguments of `vllm serve`; the image's entry point is that command."""
    config, base = layout.config, layout.mount or f"{REPOSITORY}/{layout.config.name}/{layout.version}/"
    arguments = [base + WEIGHTS, "--served-model-name", config.name, "--dtype", config.dtype]
    arguments += ["--max-model-len", str(layout.max_model_len)]
    arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    # vLLM would otherwise take sampling defaults from generation_config.json.
    arguments += ["--generation-config", "vllm"]
    if layout.max_lora_rank is not None:
        arguments += ["--enable-lora", "--max-lora-rank", str(layout.max_lora_rank)]
        arguments += ["--max-loras", str(len(config.adapters)), "--lora-modules"]
        arguments += [f"{name}={base}{ADAPTERS}/{name}" for name in config.adapters]
    for key, value in config.engine_args.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is False:
            arguments.append("--no-" + flag.removeprefix("--"))
        elif isinstance(value, (dict, list)):
            arguments += [flag, json.dumps(value)]
        elif value is not None:
            arguments += [flag, str(value)]
    return arguments


def vllm_serve(layout: Layout) -> str:
    """A script for a machine with vLLM installed, where the repository is at its mount path."""
    arguments = shlex.join(["vllm", "serve", *vllm_arguments(layout), "--host", "127.0.0.1"])
    return f'#!/bin/sh\n# The repository must be at {mount_of(layout)}.\nexec {arguments} "$@"\n'


def kubernetes(layout: Layout) -> list[dict[str, Any]]:
    """A Deployment and a Service; the repository is in the built image, or on a volume claim of its name."""
    name = resource_name(layout)
    labels = {"app.kubernetes.io/name": name}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _pod(layout, name, "server")},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "selector": labels,
                "ports": [
                    {"name": port, "port": number, "targetPort": port} for port, number in _PORTS.items()
                ],
            },
        },
    ]


def inference_service(layout: Layout) -> list[dict[str, Any]]:
    """KServe's InferenceService: Triton's image as a custom predictor, the repository on a volume claim."""
    name = resource_name(layout)
    pod = _pod(layout, name, "kserve-container")
    # KServe routes to one port only, and names it by protocol.
    pod["containers"][0]["ports"] = [{"name": "http1", "containerPort": 8000, "protocol": "TCP"}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        pod["containers"][0][probe]["httpGet"]["port"] = 8000
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": name},
            "spec": {"predictor": {"minReplicas": 1, **pod}},
        }
    ]


def _pod(layout: Layout, claim: str, container: str) -> dict[str, Any]:
    def probe(path: str, failures: int) -> dict[str, Any]:
        check = {"path": path, "port": "http"}
        return {"httpGet": check, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": failures}

    built = is_built(layout)
    mounts, volumes = [], []
    if not built:
        mounts = [{"name": "models", "mountPath": mount_of(layout), "readOnly": True}]
        volumes = [{"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}]
    gpus = needs_gpu(layout)
    resources = {"limits": {"nvidia.com/gpu": gpus}} if gpus else {"requests": {"cpu": "2", "memory": "4Gi"}}
    return {
        "terminationGracePeriodSeconds": 60,
        "containers": [
            {
                "name": container,
                "image": built_tag(layout) if built else image_of(layout),
                "command": server_command(layout)[:1],
                "args": server_command(layout)[1:],
                "ports": [{"name": port, "containerPort": number} for port, number in _PORTS.items()],
                "startupProbe": probe("/v2/health/ready", 180),
                "readinessProbe": probe("/v2/health/ready", 3),
                "livenessProbe": probe("/v2/health/live", 6),
                "resources": resources,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}],
    }


def _json_list(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
