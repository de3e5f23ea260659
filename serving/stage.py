"""Stage `serve`: serve an export with the embedded Triton and prove that it answers as the trained model.

    posttrain run configs/tiny/pipeline.yaml --only serve

    RUN/parity.json       every prompt both ways: tokens, texts, log-probability differences; and the
                          result of `posttrain parity`, the export's golden set asked of the same server
    RUN/samples.jsonl     what was asked and what the server answered
    RUN/triton.log        the server's own log

Fails (exit 1) with a readable difference when one prompt is answered otherwise.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import PosttrainError, UserError
from posttrain.inputs import resolve
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.rundir import atomic_write_json, atomic_write_text
from serving.client import Generation, TritonClient, import_grpc
from serving.config import ServeConfig
from serving.embedded import EmbeddedServer, find_environment
from serving.live_parity import ParityResult, check_parity
from serving.parity import (
    LOGPROB_BOUNDS,
    Reference,
    as_served,
    compare_all,
    reference_answer,
    render,
)
from serving.prompts import Messages, select_prompts
from serving.repository import REPOSITORY, check_servable, read_export, weights_dir


def run(config: ServeConfig, context: StageContext) -> dict[str, Any]:
    """Serve, ask, compare; returns {"parity": "32/32", ..., latencies in seconds}."""
    environment = find_environment(config.triton_env)
    import_grpc()
    export_dir = context.path("export")
    manifest = read_export(export_dir)
    check_servable(manifest)
    source = reference_path(config, context, manifest)
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, dtype=manifest["dtype"])
    longest_prompt = prompt_room(config, manifest)
    asked = select_prompts(context.path("prompts"), tokenizer, config.num_prompts, longest_prompt)
    references: list[Reference] = []
    with (
        context.phase("reference"),
        as_served(model),
        context.progress("reference answers", len(asked)) as bar,
    ):
        for messages in asked:
            references.append(reference_answer(model, tokenizer, messages, config.max_new_tokens))
            bar.advance()

    exported = load_tokenizer(weights_dir(export_dir, manifest))
    prompts = [render(exported, messages) for messages in asked]
    start_s, http_text, answers, golden = ask(config, context, export_dir, manifest, environment, prompts)

    bound = config.max_logprob_delta or LOGPROB_BOUNDS[manifest["dtype"]]
    report = compare_all(model, references, prompts, answers, bound)
    found = {"golden": golden.as_json()} if golden is not None else {}
    atomic_write_json(context.run_dir / "parity.json", report.to_json() | found)
    write_samples(context.run_dir / "samples.jsonl", asked, prompts, answers)
    if not report.passed:
        raise PosttrainError(f"{export_dir}: {report.explain(tokenizer)}")
    if http_text != answers[0].text:
        raise PosttrainError(
            f"{export_dir}: the HTTP answer differs from the streamed one\n    HTTP     {http_text!r}\n"
            f"    streamed {answers[0].text!r}"
        )
    context.console.print(report.explain(tokenizer), highlight=False)
    if golden is not None:
        text = "\n".join(golden.lines())
        if not golden.passed:
            raise PosttrainError(f"{export_dir}: {text}")
        context.console.print(text, highlight=False, markup=False, soft_wrap=True)
    return {
        "parity": f"{report.identical}/{len(report.comparisons)}",
        "max_logprob_delta": report.max_logprob_delta,
        "http_equals_stream": True,
        **({"golden_passed": golden.passed} if golden is not None else {}),
        "start_s": round(start_s, 2),
        **latencies(answers, context.timings["requests"]),
    }


def ask(
    config: ServeConfig,
    context: StageContext,
    export_dir: Path,
    manifest: dict[str, Any],
    environment: Path,
    prompts: Sequence[str],
) -> tuple[float, str, list[Generation], ParityResult | None]:
    """Start, ask, stop: seconds to start, the first prompt's answer over HTTP, all answers over gRPC, and how
    the golden set of the export came out, where it has one.
    """
    name = manifest["name"]
    sampling = {"temperature": 0.0, "max_tokens": config.max_new_tokens, "logprobs": 0}
    started = time.perf_counter()
    with context.phase("start"), context.progress("starting Triton", None) as waiting:
        server = EmbeddedServer(
            export_dir / REPOSITORY,
            name,
            environment,
            context.run_dir / "triton.log",
            start_timeout_s=config.start_timeout_s,
            on_wait=lambda seconds: waiting.update(f"{seconds:.0f} s"),
        )
        server.start()
    start_s = time.perf_counter() - started
    context.console.print(
        f"Triton is ready after {start_s:.1f} s at http://{server.http_url}", highlight=False
    )
    try:
        client = TritonClient(server.http_url, server.grpc_url, name, config.request_timeout_s)
        http_text = client.generate_http(prompts[0], sampling)["text_output"]
        with context.phase("requests"), context.progress("server answers", len(prompts)) as bar:
            answers = client.generate(prompts, sampling, concurrency=config.concurrency, on_done=bar.advance)
        golden = None
        if manifest["golden"] is not None:
            with context.phase("golden"):
                golden = check_parity(
                    export_dir,
                    f"http://{server.http_url}",
                    server.grpc_url,
                    max_logprob_delta=config.max_logprob_delta,
                    concurrency=config.concurrency,
                    timeout_s=config.request_timeout_s,
                )
    finally:
        with context.phase("stop"):
            server.stop()
    return start_s, http_text, answers, golden


def reference_path(config: ServeConfig, context: StageContext, manifest: dict[str, Any]) -> Path:
    """Folder of the trained model: `reference`, or the export's source, which must not have changed since.

    Raises UserError when the source is gone or is not what was exported.
    """
    if config.reference is not None:
        return context.path("reference")
    source = manifest["source"]
    candidates = [context.path("export") / source["relative_path"], Path(source["path"])]
    for candidate in candidates:
        if candidate.is_dir():
            break
    else:
        raise UserError(
            f"{source['path']}: the exported model is no longer there, so there is nothing to compare with\n"
            "    set `reference` to the trained model"
        )
    if resolve(str(candidate), "model").content_hash != source["content_hash"]:
        raise UserError(
            f"{candidate}: has changed since it was exported (content hash {source['content_hash'][:12]})\n"
            "    export it again, or set `reference` to the model that was exported"
        )
    return candidate


def prompt_room(config: ServeConfig, manifest: dict[str, Any]) -> int:
    """Most tokens a prompt may have. Raises UserError when the export allows no answers that long."""
    limit = min(manifest["limits"]["max_output_tokens"], manifest["max_model_len"] - 1)
    if config.max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens}, but the export allows at most {limit} tokens\n"
            "    lower max_new_tokens, or export with a larger max_output_tokens and max_model_len"
        )
    return manifest["max_model_len"] - config.max_new_tokens


def write_samples(
    path: Path, asked: Sequence[Messages], prompts: Sequence[str], answers: Sequence[Generation]
) -> None:
    """One JSON object a line: the conversation, the text sent, and the answer."""
    rows = [
        {"messages": messages, "prompt": prompt, **asdict(answer)}
        for messages, prompt, answer in zip(asked, prompts, answers, strict=True)
    ]
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def latencies(answers: Sequence[Generation], wall_s: float) -> dict[str, float]:
    """Seconds to the first token and to the end, and tokens per second over all requests."""
    first, total = [a.first_token_s for a in answers], [a.total_s for a in answers]
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "first_token_p50_s": round(percentile(first, 0.50), 4),
        "latency_p50_s": round(percentile(total, 0.50), 4),
        "latency_p95_s": round(percentile(total, 0.95), 4),
        "tokens_per_s": round(tokens / wall_s, 1) if wall_s > 0 else 0.0,
    }


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(fraction * len(ordered)) - 1, 0)]
