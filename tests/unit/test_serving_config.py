"""Export and serve configurations, config.pbtxt, and the JSON that older containers read."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from pydantic import ValidationError

from posttrain.errors import UserError
from posttrain.portable import portable_config, portable_tokenizer_config
from serving.config import ExportConfig, ServeConfig, check_export, check_serve
from serving.contract import INPUTS, OUTPUTS, render_config
from serving.embedded import EmbeddedServer, find_environment
from serving.portable import without_added_tokens
from serving.ports import free_ports, reserve
from serving.targets import Layout
from serving.weights import context_length


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "a b", "-first", "x" * 65, "dotted.name"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValidationError, match="name"):
        ExportConfig(model="m", name=name)


def test_problems_of_an_export_are_reported_together():
    config = ExportConfig(
        model="m", mount_path="models", engine_args={"dtype": "auto"}, max_model_len=64, max_output_tokens=65
    )
    problems = check_export(config, "x.yaml: stages.export")
    assert [problem.where for problem in problems] == [
        "x.yaml: stages.export.mount_path",
        "x.yaml: stages.export.engine_args.dtype",
        "x.yaml: stages.export.max_output_tokens",
    ]
    assert check_export(ExportConfig(model="m"), "x") == []


def test_what_a_target_cannot_do_is_a_problem():
    config = ExportConfig(model="m", target="triton-trtllm", adapters={"a": "x"}, mount_path=None)
    problems = check_export(config, "x")
    assert [problem.where for problem in problems] == ["x.mount_path", "x.adapters"]
    assert "triton-vllm" in problems[1].remedy


def test_engine_arguments_name_the_path_inside_the_container():
    config = ExportConfig(model="m", name="desk", mount_path="/srv/models/", engine_args={"max_num_seqs": 8})
    assert Layout(config, "2", 512, None).engine_arguments() == {
        "model": "/srv/models/desk/2/weights",
        "dtype": "float32",
        "max_model_len": 512,
        "gpu_memory_utilization": 0.9,
        "max_num_seqs": 8,
    }
    relative = Layout(ExportConfig(model="m", mount_path=None), "1", 8, None)
    assert relative.engine_arguments()["model"] == "weights"


def test_engine_arguments_of_several_adapters():
    config = ExportConfig(model="m", adapters={"a": "x", "b": "y"})
    arguments = Layout(config, "1", 64, 16).engine_arguments()
    assert arguments["enable_lora"] == "true"
    assert (arguments["max_lora_rank"], arguments["max_loras"]) == (16, 2)


def test_context_length_is_bounded_by_the_model():
    assert context_length(ExportConfig(model="m"), 256) == 256
    assert context_length(ExportConfig(model="m", max_model_len=128), 256) == 128
    with pytest.raises(UserError, match="257.*256"):
        context_length(ExportConfig(model="m", max_model_len=257), 256)


def test_a_missing_triton_environment_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_TRITON_ENV", raising=False)
    config = ServeConfig(export="e", prompts="p", triton_env=str(tmp_path / "none"))
    (problem,) = check_serve(config, "x.yaml: stages.serve")
    assert problem.where == "x.yaml: stages.serve.triton_env"
    assert str(tmp_path / "none") in problem.message
    assert "make triton-env" in problem.remedy


def test_the_variable_overrides_the_configured_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_TRITON_ENV", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere.*does not exist"):
        find_environment(".venv-triton")
    (tmp_path / "elsewhere" / "bin").mkdir(parents=True)
    (tmp_path / "elsewhere" / "bin" / "python3").touch()
    with pytest.raises(UserError, match="elsewhere.*holds no tritonserver"):
        find_environment(".venv-triton")


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = EmbeddedServer(tmp_path, "m", tmp_path, tmp_path / "log", http_port=port)
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: the port cannot be used"):
            server.start()
    assert not (tmp_path / "log").exists()


def test_a_port_is_reserved_before_anything_listens_on_it():
    """Two servers that start at once: the second would take the first one's answers for its own."""
    url = f"127.0.0.1:{free_ports(1)[0]}"
    with reserve(url), pytest.raises(UserError, match=f"{url}: another server is about to use the port"):
        reserve(url)
    reserve(url).close()


def test_config_pbtxt_spells_out_every_tensor():
    text = render_config("desk", {"max_queue": "7"})
    for expected in (
        'name: "desk"',
        'backend: "vllm"',
        "max_batch_size: 0",
        "decoupled: true",
        "KIND_MODEL",
        'parameters { key: "max_queue" value { string_value: "7" } }',
        'input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]',
        'input [ { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true } ]',
        'output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]',
        'output [ { name: "num_input_tokens" data_type: TYPE_UINT32 dims: [ 1 ] } ]',
    ):
        assert expected in text
    assert text.count("input [") == len(INPUTS) == 11
    assert text.count("output [") == len(OUTPUTS) == 6


def test_rotary_parameters_get_their_older_form():
    plain = portable_config(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"}
    )
    assert (plain["rope_theta"], plain["rope_scaling"], plain["torch_dtype"]) == (5e5, None, "bfloat16")
    assert plain["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    scaled = portable_config({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}})
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    by_layer = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert portable_config(by_layer) == by_layer


def test_tokenizer_settings_get_their_older_form():
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "extra_special_tokens": ["<a>"],
        "eos_token": "<e>",
    }
    assert portable_tokenizer_config(settings, "T") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "<e>",
        "chat_template": "T",
    }
    other = portable_tokenizer_config({"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {}}, "T")
    assert other["tokenizer_class"] == "Qwen2Tokenizer"
    assert other["extra_special_tokens"] == {}


def test_only_the_token_adding_step_of_a_post_processor_goes():
    bytes_step, adding_step = {"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": []}
    sequence = {"type": "Sequence", "processors": [bytes_step, adding_step]}
    kept = without_added_tokens({"post_processor": sequence})["post_processor"]
    assert kept == {"type": "Sequence", "processors": [bytes_step]}
    assert without_added_tokens({"post_processor": adding_step})["post_processor"] is None
    assert without_added_tokens({"post_processor": None})["post_processor"] is None


def test_configuration_and_export_import_without_torch():
    code = "import sys, serving.config, serving.embedded, serving.client, serving.export, serving.stage; "
    code += "print([name for name in ('torch', 'transformers', 'tritonclient') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
