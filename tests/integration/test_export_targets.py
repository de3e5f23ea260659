"""The other targets of the export: what is in them, and that an ONNX graph computes what torch does."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess

import pytest
import torch
import yaml

from posttrain.errors import UserError
from posttrain.models import load_reward_model, score_ids
from posttrain.stage import execute_stage
from serving.config import ExportConfig
from serving.repository import check_servable, read_export, version_dir
from tests.conftest import llama_config, random_adapter
from tests.integration.conftest import file_names

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="pip install 'posttrain[onnx]'",
)


@pytest.fixture
def export(tmp_path):
    """export(target, model, **fields) -> the run directory."""

    def run(target, model, **fields):
        values = {"name": "desk", "target": target, "model": str(model), "golden_prompts": 0} | fields
        run_dir = tmp_path / "export"
        execute_stage("export", ExportConfig(**values), run_dir)
        return run_dir

    return run


def _session(run_dir):
    import onnxruntime

    path = version_dir(run_dir, read_export(run_dir)) / "model.onnx"
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@needs_onnx
def test_an_onnx_reward_model_scores_as_torch_does(export, tiny_reward_dir, tiny_tokenizer):
    run_dir = export("triton-onnx", tiny_reward_dir)
    model, calibration = load_reward_model(tiny_reward_dir)
    assert calibration["bias"] == 0.25
    texts = ["Where is my order K100?", "No.", "Hello Maria, your kettle in order K100 ships on Monday. " * 4]
    for side in ("left", "right"):
        batch = tiny_tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            expected = score_ids(model, calibration, ids, mask)
        (scores,) = _session(run_dir).run(
            ["score"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )
        assert scores.shape == (3, 1)
        assert torch.allclose(torch.tensor(scores[:, 0]), expected, atol=1e-5, rtol=0)
    manifest = read_export(run_dir)
    assert manifest["onnx"]["max_difference"] <= 1e-5
    config = (run_dir / "model_repository" / "desk" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert 'output [ { name: "score" data_type: TYPE_FP32 dims: [ 1 ] } ]' in config
    assert (version_dir(run_dir, manifest) / "tokenizer" / "chat_template.jinja").is_file()


@needs_onnx
def test_an_onnx_classifier_gives_its_logits(export, tmp_path, tiny_tokenizer):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    model = LlamaForSequenceClassification(llama_config(tiny_tokenizer, num_labels=4)).eval()
    model.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer.save_pretrained(tmp_path / "classifier")
    run_dir = export("triton-onnx", tmp_path / "classifier")
    batch = tiny_tokenizer(["No.", "Where is my order K100?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    feed = {key: batch[key].numpy() for key in ("input_ids", "attention_mask")}
    (logits,) = _session(run_dir).run(["logits"], feed)
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5, rtol=0)


@needs_onnx
def test_a_language_model_is_no_classifier(export, tiny_model_dir):
    with pytest.raises(UserError, match="is no reward model or classifier"):
        export("triton-onnx", tiny_model_dir)


@needs_onnx
def test_a_graph_that_differs_is_found(export, tiny_reward_dir, tmp_path):
    """The comparison that guards the export sees a score that is off by two parts in 100,000."""
    from serving.onnx_graph import compare_with_torch, make_scorer

    run_dir = export("triton-onnx", tiny_reward_dir)
    path = version_dir(run_dir, read_export(run_dir)) / "model.onnx"
    model, calibration = load_reward_model(tiny_reward_dir)
    assert compare_with_torch(make_scorer(model, calibration), path, 300, 256, 0) <= 1e-5
    moved = {"bias": calibration["bias"] + 2e-5}
    assert compare_with_torch(make_scorer(model, moved), path, 300, 256, 0) > 1e-5


BACKEND_MODULES = (
    "__init__",
    "adapters",
    "attention",
    "batching",
    "detokenise",
    "drawing",
    "engine",
    "packed",
    "responses",
    "sampling",
    "sequences",
    "support",
    "turns",
)


def test_the_python_target_brings_the_code_it_needs(export, tiny_model_dir):
    run_dir = export("triton-python", tiny_model_dir)
    names = {name for name in file_names(run_dir / "model_repository" / "desk") if "weights" not in name}
    assert names == {
        "config.pbtxt",
        "1/model.json",
        "1/model.py",
        "1/serving/__init__.py",
        "1/serving/backends/__init__.py",
        *(f"1/serving/backends/vllm/{name}.py" for name in BACKEND_MODULES),
    }
    config = (run_dir / "model_repository" / "desk" / "config.pbtxt").read_text()
    assert 'backend: "python"' in config
    assert "KIND_AUTO" in config
    (run_dir / "model_repository/desk/1/__pycache__").mkdir()
    (run_dir / "model_repository/desk/1/__pycache__/model.cpython-311.pyc").touch()
    assert read_export(run_dir)["target"] == "triton-python"
    assert "pip install --no-cache-dir torch==" in (run_dir / "deploy" / "Dockerfile").read_text()


def test_the_trtllm_target_has_the_layout_of_the_llm_api(export, tiny_model_dir):
    run_dir = export("triton-trtllm", tiny_model_dir, engine_args={"tensor_parallel_size": 2})
    names = {name for name in file_names(run_dir / "model_repository") if "weights" not in name}
    assert names == {"desk/1/model.yaml"}
    with pytest.raises(UserError, match="the embedded server does not serve the target triton-trtllm"):
        check_servable(read_export(run_dir))
    arguments = yaml.safe_load((run_dir / "model_repository/desk/1/model.yaml").read_text())
    assert arguments["model"] == "/models/desk/1/weights"
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["max_seq_len"] == 256
    assert arguments["triton_config"]["decoupled"] is True
    dockerfile = (run_dir / "deploy" / "Dockerfile").read_text()
    assert "trtllm-python-py3" in dockerfile
    assert "/models/desk/1/" in dockerfile


@pytest.mark.parametrize("target", ["triton-python", "triton-trtllm"])
def test_a_built_image_is_what_the_pod_runs_and_nothing_hides_its_models(export, tiny_model_dir, target):
    run_dir = export(target, tiny_model_dir, image="registry.local/triton:1", name="7B_chat")
    deployment, service = _resources(run_dir, "kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "m-7b-chat:1"
    assert [mount["name"] for mount in container["volumeMounts"]] == ["shm"]
    assert [volume["name"] for volume in pod["volumes"]] == ["shm"]
    assert service["metadata"]["name"] == "m-7b-chat"
    dockerfile = (run_dir / "deploy" / "Dockerfile").read_text()
    assert "-t m-7b-chat:1 ." in dockerfile.splitlines()[0]
    assert dockerfile.splitlines()[1] == "FROM registry.local/triton:1"
    script = (run_dir / "deploy" / "docker-run.sh").read_text()
    assert "docker build -f deploy/Dockerfile -t m-7b-chat:1 ." in script
    assert script.splitlines()[-1].endswith(" m-7b-chat:1")


def test_the_vllm_target_is_a_command(export, tiny_model_dir, tmp_path):
    adapters = {"kind": str(random_adapter(tmp_path / "kind", tiny_model_dir, seed=5))}
    run_dir = export("vllm", tiny_model_dir, adapters=adapters, engine_args={"enforce_eager": True})
    script = (run_dir / "deploy" / "vllm-serve.sh").read_text()
    command = shlex.split(script.splitlines()[-1].replace("exec ", ""))
    assert command[:3] == ["vllm", "serve", "/models/desk/1/weights"]
    assert command[command.index("--served-model-name") + 1] == "desk"
    assert command[command.index("--lora-modules") + 1] == "kind=/models/desk/1/adapters/kind"
    assert "--enforce-eager" in command
    assert not (run_dir / "model_repository" / "desk" / "config.pbtxt").exists()


def _resources(run_dir, name):
    return list(yaml.safe_load_all((run_dir / "deploy" / name).read_text()))


def test_deployment_files_of_the_default_target(export, tiny_model_dir):
    run_dir = export("triton-vllm", tiny_model_dir, image="registry.local/triton:1", mount_path="/srv/models")
    assert file_names(run_dir / "deploy") == {
        "Dockerfile",
        "docker-run.sh",
        "kubernetes.yaml",
        "prometheus-rules.yaml",
    }
    deployment, service = _resources(run_dir, "kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry.local/triton:1"
    assert container["args"][0] == "--model-repository=/srv/models"
    assert container["volumeMounts"][0]["mountPath"] == "/srv/models"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {
        port["name"] for port in container["ports"]
    }
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert "COPY model_repository /srv/models" in (run_dir / "deploy/Dockerfile").read_text()


def test_the_docker_script_runs_the_image_with_the_repository_mounted(export, tiny_model_dir, tmp_path):
    """The script is run with a `docker` that says what it was given."""
    run_dir = export("triton-vllm", tiny_model_dir)
    stub = tmp_path / "bin" / "docker"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["sh", "deploy/docker-run.sh"],
        cwd=run_dir,
        env={"PATH": f"{stub.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = done.stdout.splitlines()
    assert f"{run_dir}/model_repository:/models:ro" in given
    published = [given[index + 1] for index, word in enumerate(given) if word == "-p"]
    assert published == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]
    assert given[-4:] == [
        "nvcr.io/nvidia/tritonserver:25.12-vllm-python-py3",
        "tritonserver",
        "--model-repository=/models",
        "--exit-timeout-secs=30",
    ]


def test_the_kserve_target_is_an_inference_service_of_the_same_repository(export, tiny_model_dir):
    run_dir = export("kserve", tiny_model_dir)
    (service,) = _resources(run_dir, "inference-service.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container"
    assert len(container["ports"]) == 1
    engine = json.loads((run_dir / "model_repository/desk/1/model.json").read_text())
    assert engine["model"].startswith(container["volumeMounts"][0]["mountPath"] + "/desk/1/")
    assert 'backend: "vllm"' in (run_dir / "model_repository/desk/config.pbtxt").read_text()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
@pytest.mark.parametrize("target", ["triton-python", "triton-trtllm", "vllm", "kserve"])
def test_every_script_is_one_the_shell_can_read(export, tiny_model_dir, target):
    run_dir = export(target, tiny_model_dir)
    scripts = sorted((run_dir / "deploy").glob("*.sh"))
    assert scripts
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)
