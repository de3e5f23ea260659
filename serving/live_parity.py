"""Holds a live server to the golden set of an export: `posttrain parity RUN --url http://host:8000`.

Needs the export and the server, no original weights. Any Triton server with the vLLM backend's tensors will
do: the embedded one, the vLLM container, an export with the target triton-python.

    template    the exported chat template renders every conversation as training did
    tokenizer   the exported tokenizer reads it as the same ids; the tokens that end an answer are the same
    answers     greedy, streamed: every token, text, end and log-probability, and the prompt tokens read;
                once for each adapter served by name
    streaming   the same answer in one piece
    stopping    stop strings, max_tokens, no special token in a text
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models import load_tokenizer
from serving.client import TritonClient
from serving.columns import Comparison, table, tie_margin
from serving.golden import GoldenSet, read_golden
from serving.http_client import HttpClient
from serving.parity import LOGPROB_BOUNDS
from serving.parity_checks import (
    Check,
    LiveServer,
    check_answers,
    check_stopping,
    check_streaming,
    check_template,
    check_tokenizer,
    compare_served,
    greedy,
)
from serving.repository import WEIGHTS, read_export, version_dir


@dataclass(frozen=True)
class ParityResult:
    """All checks, and by lora_name the columns compared two at a time."""

    subject: str
    checks: list[Check]
    tables: dict[str, list[Comparison]]
    logprob_bound: float

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """What a person reads."""
        lines = [f"parity of {self.subject}"]
        for check in self.checks:
            lines.append(f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<10} {check.summary}")
            lines += [f"        {line}" for line in check.details]
        for name, comparisons in self.tables.items():
            lines += ["", *table(name or "without lora_name", comparisons, self.logprob_bound)]
        lines += ["", "the server answers as the trained model" if self.passed else "NOT the trained model"]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "logprob_bound": self.logprob_bound,
            "checks": [vars(check) for check in self.checks],
            "comparisons": {
                name: [c.as_json() | {"passed": c.passed(self.logprob_bound)} for c in comparisons]
                for name, comparisons in self.tables.items()
            },
        }


def check_parity(
    export_dir: Path,
    url: str,
    grpc_url: str | None = None,
    *,
    model: str | None = None,
    version: str | None = None,
    num_prompts: int | None = None,
    max_logprob_delta: float | None = None,
    tie: float | None = None,
    concurrency: int = 4,
    timeout_s: float = 120.0,
    say: Callable[[str], None] = lambda text: None,
) -> ParityResult:
    """Ask the server at `url` the golden prompts of an export and compare.

    Args:
        export_dir: run directory of an `export` stage.
        url, grpc_url: "http://host:8000" and, for streams over gRPC, "host:8001".
        model: the model's name on the server; default: the exported one's.
        version: of the export and on the server; default: the newest of the export.
        num_prompts: the first so many of the golden set; default: all.
        max_logprob_delta: bound in nats; default: 1e-3 in float32, 0.1 in half precision.
        tie: margin in nats up to which another token is a tie; default: 0 in float32, 0.1 in half precision,
            whose rounding decides between such tokens.
        say: gets a line about what is being done.

    Raises:
        UserError: no such export, version or golden set, or no server there.
        RequestFailedError: the server failed a request.
    """
    manifest = read_export(export_dir, version)
    folder = version_dir(export_dir, manifest)
    golden = read_golden(folder)
    if golden is None:
        raise UserError(
            f"{folder}: holds no golden set, so there is nothing to compare with\n"
            "    export a language model with golden_prompts of at least 1"
        )
    golden = first_prompts(golden, num_prompts)
    bound = LOGPROB_BOUNDS[golden.dtype] if max_logprob_delta is None else max_logprob_delta
    tie = tie_margin(golden.dtype) if tie is None else tie
    name = model or manifest["name"]
    http = HttpClient(url, name, manifest["version"], timeout_s)
    http.check_ready()
    grpc = None
    if grpc_url is not None:
        grpc = TritonClient(http.url, grpc_url, name, timeout_s, manifest["version"])
    server = LiveServer(http, grpc, concurrency)
    tokenizer = load_tokenizer(folder / WEIGHTS)
    checks = [check_template(golden, tokenizer), check_tokenizer(golden, tokenizer, folder / WEIGHTS)]
    tables: dict[str, list[Comparison]] = {}
    for lora_name in golden.served:
        say(f"asking {len(golden.prompts)} prompts{f' of adapter {lora_name}' if lora_name else ''}")
        sampling = greedy(golden.max_new_tokens, lora_name)
        answers = server.streamed([prompt["text"] for prompt in golden.prompts], sampling)
        tables[lora_name] = compare_served(golden, lora_name, answers, tie)
        found = [
            check_answers(golden, lora_name, answers, tables[lora_name], bound, tokenizer),
            check_streaming(server, golden, sampling, answers),
            check_stopping(server, golden, lora_name, answers, tokenizer),
        ]
        prefix = f"{lora_name}: " if lora_name else ""
        checks += [replace(check, summary=prefix + check.summary) for check in found]
    subject = f"{export_dir}, version {manifest['version']}, at {http.url}"
    return ParityResult(subject, checks, tables, bound)


def first_prompts(golden: GoldenSet, count: int | None) -> GoldenSet:
    """The golden set cut to its first `count` prompts."""
    if count is None:
        return golden
    served = {
        name: {column: answers[:count] for column, answers in columns.items()}
        for name, columns in golden.served.items()
    }
    base = golden.base and golden.base[:count]
    return replace(golden, prompts=golden.prompts[:count], served=served, base=base)
