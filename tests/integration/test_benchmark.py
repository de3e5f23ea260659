"""The benchmark stage on a two-layer model and on an endpoint that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import Response, completion, serving
from rich.console import Console

from eval.generators.base import Continuation, Prompt, Settings
from eval.generators.local import LocalModel
from eval.judging.replies import ReplyStore
from eval.perplexity import perplexity
from eval.tasks.config import BenchmarkConfig, check
from posttrain.errors import RequeueError, UserError
from posttrain.stage import execute_stage


def execute(run_dir: Path, targets: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    config = BenchmarkConfig.model_validate({"targets": targets, "tasks": tasks, "bootstrap_samples": 200})
    assert check(config, "benchmark") == []
    execute_stage("benchmark", config, run_dir, console=Console(quiet=True))
    return json.loads((run_dir / "benchmark.json").read_text())["targets"]


def prompts(count: int, sample: int = 0) -> list[Prompt]:
    """Of very different lengths, so that batches pad."""
    texts = [f"Where is order {i}? " * (1 + i % 5) for i in range(count)]
    return [Prompt(text, [{"role": "user", "content": text}], text, sample) for text in texts]


def local(tmp_path: Path, model: Path, name: str, batch_size: int) -> LocalModel:
    store = ReplyStore(tmp_path / f"{name}.sqlite")
    return LocalModel(name, model, "hash", store, batch_size=batch_size, dtype="float32")


def test_answers_do_not_depend_on_batch_order_or_subset(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings, asked = Settings(12, 1.0, seed=3), prompts(11)
    one = local(tmp_path, tiny_model_dir, "one", 1).generate(asked, settings)
    many = local(tmp_path, tiny_model_dir, "many", 7).generate(asked[::-1], settings)[::-1]
    assert one == many
    assert local(tmp_path, tiny_model_dir, "some", 4).generate(asked[5:8], settings) == one[5:8]
    assert len({output.text for output in one}) > 1
    other = local(tmp_path, tiny_model_dir, "other", 7)
    assert other.generate(prompts(11, sample=1), settings) != one
    assert other.generate(asked, Settings(12, 1.0, seed=4)) != one


def test_a_second_run_computes_nothing_and_a_cut_one_only_the_rest(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    settings = Settings(4, 1.0, 0)
    first = local(tmp_path, tiny_model_dir, "m", 4)
    some = first.generate(prompts(5), settings)
    again = local(tmp_path, tiny_model_dir, "m", 4)
    every = again.generate(prompts(9), settings)
    assert (again.usage.computed, again.usage.cached) == (4, 5)
    assert every[:5] == some


def test_likelihoods_are_those_of_the_perplexity_module(tmp_path: Path, tiny_model_dir: Path) -> None:
    from eval.generation import encode_prompt
    from eval.perplexity import ScoredRow

    model = local(tmp_path, tiny_model_dir, "m", 3)
    asked = [Continuation(p.messages, f"It is {i} o'clock") for i, p in enumerate(prompts(7))]
    found = model.loglikelihood(asked)
    for one, likelihood in zip(asked, found, strict=True):
        head = encode_prompt(model.tokenizer, one.messages)
        tail = model.tokenizer(one.text, add_special_tokens=False)["input_ids"]
        row = ScoredRow(head + tail, [False] * len(head) + [True] * len(tail), 1, False)
        alone = perplexity(model.model, [row], pad_id=model.tokenizer.pad_token_id)
        assert likelihood.logprob == pytest.approx(-alone.nll, abs=1e-4)
        assert likelihood.tokens == len(tail) == alone.tokens


def test_every_kind_of_task_on_the_tiny_model(
    tmp_path: Path,
    tiny_model_dir: Path,
    conversation_data: Path,
    preference_data: Path,
    prompt_data: Path,
) -> None:
    gsm8k = tmp_path / "gsm8k.jsonl"
    long = {"question": "too long " * 200, "answer": "#### 1"}
    gsm8k.write_text(
        "".join(json.dumps(r) + "\n" for r in [{"question": "1 + 1?", "answer": "#### 2"}, long])
    )
    tasks = {
        "ppl": {"kind": "perplexity", "dataset": str(conversation_data)},
        "prefs": {"kind": "multiple_choice", "dataset": str(preference_data)},
        "replies": {"kind": "overlap", "dataset": str(conversation_data), "max_new_tokens": 8, "limit": 6},
        "safety": {"kind": "safety", "dataset": str(prompt_data), "max_new_tokens": 8, "limit": 6},
        "gsm8k": {"kind": "gsm8k", "data": str(gsm8k), "max_new_tokens": 8},
    }
    target = {"tiny": {"kind": "model", "model": str(tiny_model_dir), "batch_size": 4}}
    found = execute(tmp_path / "run", target, tasks)["tiny"]["tasks"]
    assert set(found["ppl"]["scores"]) == {"perplexity", "bits_per_byte"}
    assert set(found["prefs"]["scores"]) == {"acc", "acc_norm"}
    assert {"rouge1", "bleu", "chrf", "distinct_1"} <= set(found["replies"]["scores"])
    assert set(found["safety"]["scores"]) == {"refusal", "pii_leak"}
    assert found["gsm8k"]["counts"]["not_answered"] == 1
    assert found["gsm8k"]["scores"]["accuracy"]["n"] == 1
    assert {one["contamination"]["status"] for one in found.values()} == {"unknown"}
    for one in found.values():
        for score in one["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]


def test_the_perplexity_task_gives_the_number_of_the_eval_stage(
    tmp_path: Path, tiny_model_dir: Path, text_data: Path
) -> None:
    from eval.held_out import load_scored_rows

    target = {"tiny": {"kind": "model", "model": str(tiny_model_dir), "batch_size": 5}}
    found = execute(tmp_path / "run", target, {"p": {"kind": "perplexity", "dataset": str(text_data)}})
    model = local(tmp_path, tiny_model_dir, "m", 4)
    rows = load_scored_rows(text_data, "text", model.tokenizer, wanted=99, max_tokens=256, seed=0)
    alone = perplexity(model.model, rows, pad_id=model.tokenizer.pad_token_id).as_dict()
    scores = found["tiny"]["tasks"]["p"]["scores"]
    for metric in ("perplexity", "bits_per_byte"):
        assert scores[metric]["value"] == pytest.approx(alone[metric], rel=1e-5)


def questions(tmp_path: Path, count: int = 8) -> dict[str, Any]:
    rows = [{"question": f"Say {i}", "answer": str(i)} for i in range(count)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"echo": {"kind": "exact_match", "data": str(path)}}


def echo(body: dict[str, Any]) -> Response:
    return completion(body["messages"][-1]["content"].removeprefix("Say "))


def endpoint(base_url: str, **more: Any) -> dict[str, Any]:
    settings = {"kind": "endpoint", "base_url": base_url, "model": "m", "backoff_s": 0.01, "concurrency": 1}
    return {"api": settings | more}


def test_an_endpoint_that_fails_now_and_then_is_asked_again(tmp_path: Path) -> None:
    troubles = [Response(429, "{}", {"Retry-After": "0"}), Response(500, "oops"), Response(200, "{not json")]

    def script(n: int, body: dict[str, Any]) -> Response:
        return troubles[n] if n < len(troubles) else echo(body)

    with serving(script) as server:
        found = execute(tmp_path / "run", endpoint(server.base_url), questions(tmp_path))["api"]
    assert found["tasks"]["echo"]["scores"]["exact_match"]["value"] == 1.0
    assert found["usage"]["retries"] == {"429": 1, "500": 1, "malformed": 1}
    assert {body["max_tokens"] for body in server.bodies} == {256}
    assert all((body["temperature"], body["seed"]) == (0.0, 0) for body in server.bodies)


def test_an_endpoint_that_goes_away_is_resumed_without_asking_twice(tmp_path: Path) -> None:
    away = True

    def script(n: int, body: dict[str, Any]) -> Response:
        return Response(503, "down") if away and n >= 3 else echo(body)

    with serving(script) as server:
        target, tasks = endpoint(server.base_url, attempts=1, give_up_after=2), questions(tmp_path)
        with pytest.raises(RequeueError, match="3 of 8 answers of api because the endpoint did not"):
            execute(tmp_path / "run", target, tasks)
        assert len(server.bodies) == 5
        away = False
        found = execute(tmp_path / "run", target, tasks)["api"]
        assert len(server.bodies) == 5 + 5
    assert found["tasks"]["echo"]["scores"]["exact_match"]["n"] == 8
    assert (found["usage"]["computed"], found["usage"]["cached"]) == (5, 3)


def test_a_prompt_that_the_endpoint_rejects_is_no_wrong_answer(tmp_path: Path) -> None:
    def script(n: int, body: dict[str, Any]) -> Response:
        if body["messages"][-1]["content"] == "Say 3":
            return Response(400, '{"error": {"message": "too long"}}')
        return echo(body)

    with serving(script) as server:
        found = execute(tmp_path / "run", endpoint(server.base_url), questions(tmp_path))["api"]
    assert found["tasks"]["echo"]["counts"]["not_answered"] == 1
    score = found["tasks"]["echo"]["scores"]["exact_match"]
    assert (score["value"], score["n"]) == (1.0, 7)


def test_a_key_comes_from_the_environment_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCHMARK_KEY", "sk-secret-123")
    with serving(lambda n, body: echo(body)) as server:
        target = endpoint(server.base_url, key_env="BENCHMARK_KEY")
        execute(tmp_path / "run", target, questions(tmp_path))
        assert set(server.keys) == {"Bearer sk-secret-123"}
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in files if b"sk-secret-123" in file.read_bytes()]
    with serving(lambda n, body: Response(401, "{}")) as server, pytest.raises(UserError, match="key_env"):
        execute(tmp_path / "other", endpoint(server.base_url), questions(tmp_path))
