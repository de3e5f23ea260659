"""`posttrain parity` against a real tritonserver: faithful exports pass, each broken one is caught and named.

The broken exports are broken as a faulty exporter would break them: their manifests fit their files, and the
server serves those very files. Only the golden answers of the trained model tell. Skipped where the Triton
environment is not installed (`make triton-env`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain.models import load_causal_lm
from posttrain.stage import execute_stage
from serving.client import import_grpc
from serving.config import ExportConfig
from serving.embedded import EmbeddedServer
from serving.repository import describe_files, read_export, read_index, version_dir, weights_dir, write_index
from tests.conftest import random_adapter
from tests.integration.conftest import command, triton_environment

ROOT = Path(__file__).parents[2]
ADAPTERS = ("formal", "brief")


ENVIRONMENT = triton_environment()
pytestmark = pytest.mark.skipif(
    ENVIRONMENT is None, reason="no Triton environment; make one with `make triton-env`"
)


@pytest.fixture(scope="module")
def base(ending_model_dir):
    return ending_model_dir


@pytest.fixture(scope="module")
def exports(tmp_path_factory, base, prompt_data):
    """name -> export directory: an adapter merged, two unmerged, the Python backend; and broken ones."""
    root = tmp_path_factory.mktemp("exports")
    adapters = {
        name: str(random_adapter(root / "adapters" / name, base, seed=seed, scale=0.05))
        for seed, name in enumerate(ADAPTERS)
    }
    fields = {"golden_prompts": 12, "golden_tokens": 24, "prompts": str(prompt_data), "max_output_tokens": 64}
    made = {
        "merged": {"model": adapters["formal"]},
        "several": {"model": str(base), "adapters": adapters},
        "python": {"model": str(base), "target": "triton-python"},
    }
    for name, own in made.items():
        execute_stage("export", ExportConfig(name=name, **fields, **own), root / name)
    for name in ("template", "eos", "half"):
        _break(root, "merged", name)
    _break(root, "merged", "unmerged", base=base)
    _break(root, "several", "swapped")
    return {path.name: path for path in root.iterdir() if path.name != "adapters"}


def _break(root: Path, source: str, name: str, base: Path | None = None) -> None:
    """Copy an export under another name, damage it, and make its manifest fit."""
    run_dir = root / name
    shutil.copytree(root / source, run_dir)
    (run_dir / "model_repository" / source).rename(run_dir / "model_repository" / name)
    folder = run_dir / "model_repository" / name
    for file in (folder / "config.pbtxt", folder / "1" / "model.json", folder / "1" / "multi_lora.json"):
        if file.is_file():
            text = file.read_text().replace(f"/{source}/", f"/{name}/")
            file.write_text(text.replace(f'name: "{source}"', f'name: "{name}"'))
    weights = folder / "1" / "weights"
    if name == "template":
        template = (weights / "chat_template.jinja").read_text()
        assert "assistant\\n" in template
        wrong = template.replace("assistant\\n", "assistant ")
        (weights / "chat_template.jinja").write_text(wrong)
        settings = json.loads((weights / "tokenizer_config.json").read_text()) | {"chat_template": wrong}
        (weights / "tokenizer_config.json").write_text(json.dumps(settings))
    elif name == "eos":
        for file, key, value in (
            ("tokenizer_config.json", "eos_token", "<|im_start|>"),
            ("generation_config.json", "eos_token_id", 1),
            ("config.json", "eos_token_id", 1),
        ):
            (weights / file).write_text(json.dumps(json.loads((weights / file).read_text()) | {key: value}))
    elif name == "unmerged":
        load_causal_lm(base).save_pretrained(weights)
    elif name == "half":
        load_causal_lm(weights, dtype="bfloat16").save_pretrained(weights)
        engine = json.loads((folder / "1" / "model.json").read_text()) | {"dtype": "bfloat16"}
        (folder / "1" / "model.json").write_text(json.dumps(engine))
    elif name == "swapped":
        first, second = ADAPTERS
        paths = json.loads((folder / "1" / "multi_lora.json").read_text())
        swapped = {first: paths[second], second: paths[first]}
        (folder / "1" / "multi_lora.json").write_text(json.dumps(swapped))
    manifest = read_index(run_dir)["versions"]["1"] | {"name": name}
    manifest["files"] = {f"{name}/1/{path}": entry for path, entry in describe_files(folder / "1").items()}
    write_index(run_dir, {"1": manifest})
    read_export(run_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory, exports):
    root = tmp_path_factory.mktemp("served")
    for name, run_dir in exports.items():
        shutil.copytree(run_dir / "model_repository" / name, root / name)
    with EmbeddedServer(root, "merged", ENVIRONMENT, root.parent / "triton.log") as running:
        yield running


@pytest.fixture
def parity(server, exports):
    """parity(name, *options) loads that export's model unless another is named, and runs the command."""
    control = import_grpc().InferenceServerClient(server.grpc_url)
    loaded = []

    def run(name, *options):
        if "--model" not in options and name != "merged":
            control.load_model(name)
            loaded.append(name)
        return command("parity", exports[name], "--url", f"http://{server.http_url}", *options)

    yield run
    for name in loaded:
        control.unload_model(name)
    control.close()


def test_a_merged_adapter_is_served_as_it_was_trained(parity, server):
    done = parity("merged", "--grpc", server.grpc_url)
    assert done.exit_code == 0, done.output
    assert "12/12 conversations rendered as in training" in done.output
    table = [line.split() for line in done.output.splitlines() if " = " in line]
    assert [row[:4] for row in table] == [
        ["adapter", "=", "merged", "12/12"],
        ["merged", "=", "served", "12/12"],
        ["adapter", "=", "served", "12/12"],
    ]
    assert all(float(row[4]) < 1e-3 for row in table)


def test_two_adapters_and_their_base_are_served_as_they_were_trained(parity):
    done = parity("several", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["comparisons"]) == {"", *ADAPTERS}
    assert all(row["identical"] == 12 for rows in result["comparisons"].values() for row in rows)
    answers = [check for check in result["checks"] if check["name"] == "answers"]
    assert all(int(check["summary"].split("; ")[1].split()[0]) > 0 for check in answers[:1])


def test_the_python_backend_serves_it_without_vllm(parity, exports):
    done = parity("python")
    assert done.exit_code == 0, done.output
    config = (exports["python"] / "model_repository" / "python" / "config.pbtxt").read_text()
    assert 'backend: "python"' in config


def test_a_wrong_template_is_caught(parity):
    done = parity("template", "--model", "merged")
    assert done.exit_code == 1
    assert "FAILED  template   0/12 conversations rendered as in training" in done.output
    assert "assistant\\n" in done.output


def test_a_wrong_end_of_turn_is_caught(parity):
    done = parity("eos")
    assert done.exit_code == 1
    assert "answers end at [(1, '<|im_start|>')], the trained model's at [(2, '<|im_end|>')]" in done.output
    assert "FAILED  answers" in done.output
    assert "first difference at token" in done.output


def test_an_adapter_that_was_not_merged_is_caught(parity):
    done = parity("unmerged", "--prompts", "4")
    assert done.exit_code == 1
    assert "4/4 answers are those of the base model without the adapter" in done.output
    assert "adapter prefers its own token there by" in done.output


def test_another_precision_is_caught(parity):
    done = parity("half", "--prompts", "4", "--json")
    assert done.exit_code == 1
    served = json.loads(done.stdout)["comparisons"][""][2]
    assert 1e-3 < served["max_logprob_delta"] < 1
    details = [line for check in json.loads(done.stdout)["checks"] for line in check["details"]]
    assert any("weights or precision are not the same" in line for line in details)


def test_swapped_adapters_are_caught(parity):
    done = parity("swapped", "--prompts", "4")
    assert done.exit_code == 1
    first, second = ADAPTERS
    assert f"4/4 answers are those of adapter {second}" in done.output
    assert f"4/4 answers are those of adapter {first}" in done.output


def test_no_server_no_model_and_no_golden_set_are_the_users_to_correct(server, exports, tmp_path, base):
    nowhere = command("parity", exports["merged"], "--url", "http://127.0.0.1:1")
    assert nowhere.exit_code == 2
    assert "no server answers there" in nowhere.stderr
    unknown = command("parity", exports["merged"], "--url", f"http://{server.http_url}", "--model", "none")
    assert unknown.exit_code == 2
    assert "this model version is not ready" in unknown.stderr
    execute_stage("export", ExportConfig(model=str(base), golden_prompts=0), tmp_path / "bare")
    bare = command("parity", tmp_path / "bare", "--url", f"http://{server.http_url}")
    assert bare.exit_code == 2
    assert "holds no golden set" in bare.stderr


def test_a_changed_file_is_refused_before_anything_is_asked(tmp_path, exports, server):
    shutil.copytree(exports["merged"], tmp_path / "export")
    manifest = read_export(tmp_path / "export")
    (version_dir(tmp_path / "export", manifest) / "golden.json").write_text("{}")
    done = command("parity", tmp_path / "export", "--url", f"http://{server.http_url}")
    assert done.exit_code == 2
    assert "golden.json: is not what was exported" in done.stderr
    assert weights_dir(tmp_path / "export", manifest).is_dir()
