"""A real tritonserver on this machine: the trained model's tokens, errors as errors, and a clean end.

Skipped where the Triton environment is not installed (`make triton-env`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from posttrain.errors import PosttrainError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stage import execute_stage
from serving.client import RequestFailedError, TritonClient, import_grpc, post_json
from serving.config import ExportConfig, ServeConfig
from serving.embedded import EmbeddedServer
from serving.parity import compare_all, reference_answer, render
from serving.prompts import select_prompts
from serving.repository import read_export, weights_dir
from tests.integration.conftest import triton_environment

ROOT = Path(__file__).parents[2]
NAME = "desk"
NEW_TOKENS = 24
GREEDY = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "logprobs": 0}


ENVIRONMENT = triton_environment()
pytestmark = pytest.mark.skipif(
    ENVIRONMENT is None, reason="no Triton environment; make one with `make triton-env`"
)


@pytest.fixture(scope="module")
def trained(ending_model_dir):
    return ending_model_dir


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory, trained):
    run_dir = tmp_path_factory.mktemp("runs") / "export"
    config = ExportConfig(model=str(trained), name=NAME, max_prompt_characters=600, max_output_tokens=200)
    execute_stage("export", config, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def repository(tmp_path_factory, export_dir):
    """The exported model and two broken ones beside it: a wrong stop token, and perturbed weights."""
    root = tmp_path_factory.mktemp("repository")
    for name in (NAME, "wrong_eos", "perturbed"):
        shutil.copytree(export_dir / "model_repository" / NAME, root / name)
        config = (root / name / "config.pbtxt").read_text()
        (root / name / "config.pbtxt").write_text(config.replace(f'name: "{NAME}"', f'name: "{name}"'))
        engine = (root / name / "1" / "model.json").read_text()
        (root / name / "1" / "model.json").write_text(engine.replace(f"/{NAME}/", f"/{name}/"))
    weights = root / "wrong_eos" / "1" / "weights"
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|im_start|>"),
        ("generation_config.json", "eos_token_id", 1),
        ("config.json", "eos_token_id", 1),
    ):
        content = json.loads((weights / name).read_text()) | {key: value}
        (weights / name).write_text(json.dumps(content))
    weights = root / "perturbed" / "1" / "weights"
    model = load_causal_lm(weights)
    with torch.no_grad():
        model.lm_head.weight[65] *= 2
    model.save_pretrained(weights)
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory, repository):
    log_file = tmp_path_factory.mktemp("log") / "triton.log"
    with EmbeddedServer(repository, NAME, ENVIRONMENT, log_file) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return TritonClient(server.http_url, server.grpc_url, NAME, timeout_s=60)


@pytest.fixture(scope="module")
def proof(trained, prompt_data):
    """prove(client, prompts=None) -> ParityReport of the server's answers to sixteen prompts."""
    model, tokenizer = load_causal_lm(trained), load_tokenizer(trained)
    asked = select_prompts(prompt_data, tokenizer, 16, 200)
    references = [reference_answer(model, tokenizer, messages, NEW_TOKENS) for messages in asked]
    ended = sum(reference.ids[-1] == tokenizer.eos_token_id for reference in references)
    assert ended > 0, "no answer ends by itself, so a wrong stop token could not be seen"

    def prove(client, renderer=tokenizer):
        prompts = [render(renderer, messages) for messages in asked]
        answers = client.generate(prompts, GREEDY, concurrency=8)
        return compare_all(model, references, prompts, answers, 1e-3)

    return prove


@pytest.fixture
def other_model(server, client):
    """load(name) -> client of another model of the same repository, unloaded afterwards."""
    grpc = import_grpc()
    control = grpc.InferenceServerClient(server.grpc_url)
    loaded = []

    def load(name):
        control.load_model(name)
        loaded.append(name)
        return TritonClient(server.http_url, server.grpc_url, name, timeout_s=60)

    yield load
    for name in loaded:
        control.unload_model(name)
    control.close()


PROMPT = "<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\n"


def _left_over(prefix: str) -> list[str]:
    found = [str(path) for path in Path("/dev/shm").glob(f"{prefix}*")]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(entry)] if prefix.encode() in entry.read_bytes() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_concurrent_requests_are_answered_as_the_trained_model_answers(client, proof, tiny_tokenizer):
    report = proof(client)
    assert report.passed, report.explain(tiny_tokenizer)


def test_a_wrong_stop_token_is_caught(other_model, proof, tiny_tokenizer):
    report = proof(other_model("wrong_eos"))
    assert not report.passed
    assert report.identical < 16
    assert "first difference at token" in report.explain(tiny_tokenizer)


def test_weights_that_differ_in_one_row_are_caught(other_model, proof, tiny_tokenizer):
    report = proof(other_model("perturbed"))
    assert not report.passed
    assert "weights or precision are not the trained ones" in report.explain(tiny_tokenizer)


def test_a_wrong_chat_template_is_caught(client, proof, export_dir, tiny_tokenizer):
    other = load_tokenizer(weights_dir(export_dir, read_export(export_dir)))
    other.chat_template = other.chat_template.replace("'\\n' + ", "").replace("assistant\\n", "assistant")
    report = proof(client, other)
    assert report.identical == 0
    assert "renders another prompt" in report.explain(tiny_tokenizer)


def test_http_and_grpc_agree_and_the_prompt_is_prepended_only_if_asked(client, server):
    streamed = client.generate([PROMPT], GREEDY)[0]
    answer = client.generate_http(PROMPT, GREEDY)
    assert answer["text_output"] == streamed.text
    assert answer["finish_reason"] == streamed.finish_reason
    assert answer["num_output_tokens"] == len(streamed.token_ids)
    url = f"http://{server.http_url}/v2/models/{NAME}/generate"
    plain = {"text_input": PROMPT, "temperature": 0, "max_tokens": NEW_TOKENS}
    status, text = post_json(url, plain, 60)
    assert (status, json.loads(text)["text_output"]) == (200, PROMPT + streamed.text)


def test_a_seed_is_repeatable_and_seeds_differ(client):
    def sample(seed):
        return client.generate([PROMPT], {"temperature": 1.0, "max_tokens": 16, "seed": seed, "logprobs": 0})[
            0
        ]

    assert sample(3).token_ids == sample(3).token_ids != sample(4).token_ids


def test_several_answers_of_one_request_come_in_one_response(client, server):
    outputs = ("finish_reason", "logprobs", "cumulative_logprob", "num_output_tokens")

    def ask(**sampling):
        parameters = {"temperature": 1.0, "max_tokens": 12, "logprobs": 0} | sampling
        body = {"text_input": PROMPT, "sampling_parameters": json.dumps(parameters)}
        body |= {f"return_{output}": True for output in (*outputs, "num_input_tokens")}
        status, text = post_json(f"http://{server.http_url}/v2/models/{NAME}/generate", body, 60)
        assert status == 200, text
        return json.loads(text)

    alone = [ask(seed=3 + number) for number in range(3)]
    together = ask(seed=3, n=3)
    for output in ("text_output", "finish_reason", "num_output_tokens"):
        assert together[output] == [answer[output] for answer in alone]
    assert together["cumulative_logprob"] == pytest.approx([each["cumulative_logprob"] for each in alone])
    drawn = [[next(iter(position)) for position in json.loads(each["logprobs"])] for each in alone]
    assert [[next(iter(p)) for p in json.loads(each)] for each in together["logprobs"]] == drawn
    assert together["num_input_tokens"] == alone[0]["num_input_tokens"]
    with pytest.raises(RequestFailedError, match="n must be 1 when streaming"):
        client.generate([PROMPT], GREEDY | {"n": 2})


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", GREEDY, "text_input is empty"),
        ("x" * 601, GREEDY, "601 characters, at most 600"),
        ("é " * 290, GREEDY, "no room for an answer"),
        (PROMPT, {"max_tokens": 201}, "max_tokens must be an integer from 1 to 200"),
        (PROMPT, {"temperature": -1}, "temperature must be a number"),
        (PROMPT, {"n": 17}, "n must be an integer from 1 to 16"),
        (PROMPT, {"temprature": 1}, "unknown sampling parameters: temprature"),
    ],
)
def test_bad_requests_get_errors_on_both_ways_in(client, prompt, sampling, message):
    with pytest.raises(RequestFailedError, match=message):
        client.generate([prompt], sampling)
    with pytest.raises(RequestFailedError, match=f"HTTP 400: .*{message}"):
        client.generate_http(prompt, sampling)
    assert client.generate([PROMPT], GREEDY)[0].token_ids


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text_input": None},
        {"text_input": 5},
        {"text_input": ["a", "b"]},
        {"text_input": PROMPT, "sampling_parameters": "{"},
        {"text_input": PROMPT, "sampling_parameters": "[]"},
        {"text_input": PROMPT, "stream": "yes"},
        {"text_input": PROMPT, "stream": True, "exclude_input_in_output": False},
        {"text_input": PROMPT, "image": ["x"]},
        {"text_input": PROMPT, "embedding_request": "{}"},
        b"not json",
        b'{"text_input": "\xff"}',
    ],
)
def test_malformed_bodies_get_errors_and_the_server_lives_on(client, server, body):
    status, text = post_json(f"http://{server.http_url}/v2/models/{NAME}/generate", body, 60)
    assert status >= 400, text
    assert "error" in text
    assert client.generate([PROMPT], GREEDY)[0].token_ids


def test_closing_a_stream_early_cancels_and_others_go_on(client):
    long = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "logprobs": 0}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(client.generate, [PROMPT], long)
        stream = client.stream(PROMPT, long)
        assert next(stream).token_ids
        stream.close()
        assert len(other.result(60)[0].token_ids) == 100


def test_the_stage_proves_the_export_and_leaves_nothing_running(tmp_path, export_dir, prompt_data):
    config = ServeConfig(
        export=str(export_dir),
        prompts=str(prompt_data),
        num_prompts=12,
        max_new_tokens=NEW_TOKENS,
        triton_env=str(ENVIRONMENT),
    )
    ours = f"posttrain-{os.getpid()}-"
    before = set(_left_over(ours))
    result = execute_stage("serve", config, tmp_path / "serve")
    metrics = result.manifest["metrics"]
    assert metrics["parity"] == "12/12"
    assert metrics["max_logprob_delta"] < 1e-4
    parity = json.loads((tmp_path / "serve" / "parity.json").read_text())
    assert parity["passed"]
    assert len(parity["comparisons"]) == 12
    assert parity["golden"]["passed"]
    assert metrics["golden_passed"]
    samples = [json.loads(line) for line in (tmp_path / "serve" / "samples.jsonl").read_text().splitlines()]
    assert [sample["token_ids"] for sample in samples] == [c["served_ids"] for c in parity["comparisons"]]
    assert "Signal (15) received" in (tmp_path / "serve" / "triton.log").read_text()
    assert set(_left_over(ours)) <= before
    assert execute_stage("serve", config, tmp_path / "serve").status == "skipped"


def test_the_stage_fails_readably_when_it_is_another_model(tmp_path, export_dir, prompt_data, tiny_model_dir):
    config = ServeConfig(
        export=str(export_dir),
        prompts=str(prompt_data),
        reference=str(tiny_model_dir),
        num_prompts=4,
        max_new_tokens=NEW_TOKENS,
        triton_env=str(ENVIRONMENT),
    )
    with pytest.raises(PosttrainError, match="log-probabilities differ") as caught:
        execute_stage("serve", config, tmp_path / "serve")
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "serve" / "parity.json").read_text())["passed"] is False


def test_a_model_that_cannot_be_loaded_is_reported_with_the_log(tmp_path, repository):
    shutil.copytree(repository / NAME, tmp_path / "repository" / NAME)
    (tmp_path / "repository" / NAME / "1" / "weights" / "model.safetensors").write_bytes(b"")
    server = EmbeddedServer(tmp_path / "repository", NAME, ENVIRONMENT, tmp_path / "triton.log")
    with pytest.raises(PosttrainError, match="ended before it was ready(.|\n)*triton.log"):
        server.start()
    assert _left_over(server.shm_prefix) == []


def test_nothing_is_left_after_the_parent_gets_sigterm(tmp_path, repository):
    """The supervisor holds the parent's stdout: its end is the end of everything."""
    code = (
        "import sys, time; from pathlib import Path; from serving.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer(Path(sys.argv[1]), {NAME!r}, Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "with server: print(server.shm_prefix, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(repository), str(ENVIRONMENT), str(tmp_path / "triton.log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    prefix = parent.stdout.readline().strip()
    assert _left_over(prefix)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGTERM
    assert _left_over(prefix) == []
