"""The checks of `posttrain parity`: each asks a live server, or reads the export, and compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.client import Generation, TritonClient, collect
from serving.columns import Answered, Comparison, compare_columns, explain
from serving.golden import Answer, GoldenSet
from serving.http_client import HttpClient
from serving.parity import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSTREAMED = 8
HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Check:
    """One thing that was checked; details are lines for a reader."""

    name: str
    passed: bool
    summary: str
    details: list[str]


class LiveServer:
    """Asks one model of one server, over HTTP, or over gRPC for what is streamed."""

    def __init__(self, http: HttpClient, grpc: TritonClient | None, concurrency: int) -> None:
        self.http = http
        self.grpc = grpc
        self.concurrency = concurrency

    def streamed(self, prompts: Sequence[str], sampling: dict[str, Any]) -> list[Generation]:
        """Answers in the order of the prompts, several at a time. Raises RequestFailedError."""
        source = self.grpc or self.http

        def one(prompt: str) -> Generation:
            return collect(source.stream(prompt, sampling), self.http.url)

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, prompts))

    def whole(self, prompts: Sequence[str], sampling: dict[str, Any]) -> list[Generation]:
        """The same, each in one response."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda prompt: self.http.generate(prompt, sampling), prompts))


def greedy(max_tokens: int, lora_name: str) -> dict[str, Any]:
    """Sampling parameters of a golden answer."""
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 0}
    return sampling | ({"lora_name": lora_name} if lora_name else {})


def check_template(golden: GoldenSet, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Whether the exported chat template renders the golden conversations as training did."""
    rendered = [render(tokenizer, prompt["messages"]) for prompt in golden.prompts]
    wrong = [i for i, prompt in enumerate(golden.prompts) if rendered[i] != prompt["text"]]
    details = []
    for index in wrong[:1]:
        expected = golden.prompts[index]["text"]
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, rendered[index], strict=False)) if a != b),
            min(len(expected), len(rendered[index])),
        )
        window = slice(max(at - 20, 0), at + 40)
        details = [
            f"prompt {index} differs at character {at}:",
            f"    trained   {expected[window]!r}",
            f"    exported  {rendered[index][window]!r}",
        ]
    total = len(golden.prompts)
    return Check(
        "template", not wrong, f"{total - len(wrong)}/{total} conversations rendered as in training", details
    )


def check_tokenizer(golden: GoldenSet, tokenizer: PreTrainedTokenizerBase, weights: Path) -> Check:
    """Whether the exported tokenizer reads the golden texts, and ends answers, as training did."""
    details = []
    wrong = [
        index
        for index, prompt in enumerate(golden.prompts)
        if tokenizer(prompt["text"])["input_ids"] != prompt["token_ids"]
    ]
    if wrong:
        index = wrong[0]
        ids = tokenizer(golden.prompts[index]["text"])["input_ids"]
        expected = golden.prompts[index]["token_ids"]
        details.append(
            f"prompt {index} is read as {len(ids)} tokens {ids[:6]}..., "
            f"in training {len(expected)} {expected[:6]}..."
        )
    stops = exported_stops(tokenizer, weights)
    if stops != golden.stop_token_ids:
        shown = [f"{[(i, tokenizer.decode([i])) for i in ids]}" for ids in (golden.stop_token_ids, stops)]
        details.append(f"answers end at {shown[1]}, the trained model's at {shown[0]}")
    total = len(golden.prompts)
    summary = f"{total - len(wrong)}/{total} prompts read as in training; {len(stops)} tokens end an answer"
    return Check("tokenizer", not details, summary, details)


def exported_stops(tokenizer: PreTrainedTokenizerBase, weights: Path) -> list[int]:
    """Tokens at which a server of these files ends an answer: EOS and those of generation_config.json."""
    path = weights / "generation_config.json"
    configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


def compare_served(
    golden: GoldenSet, lora_name: str, answers: Sequence[Generation], tie: float
) -> list[Comparison]:
    """The three-way table of one adapter: reference = written, written = served, reference = served."""
    (first, reference), (second, written) = golden.served[lora_name].items()
    return [
        compare_columns(first, reference, second, written, tie=tie),
        compare_columns(second, written, "served", answers, tie=tie, top=reference),
        compare_columns(first, reference, "served", answers, tie=tie),
    ]


def check_answers(
    golden: GoldenSet,
    lora_name: str,
    answers: Sequence[Generation],
    comparisons: Sequence[Comparison],
    bound: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Check:
    """Tokens, log-probabilities, prompt lengths, texts and ends of the served answers."""
    columns = golden.served[lora_name]
    reference = next(iter(columns.values()))
    answered: dict[str, Sequence[Answered]] = {**columns, "served": answers}
    details: list[str] = []
    for comparison in comparisons:
        if comparison.passed(bound):
            continue
        if comparison is comparisons[1] and not comparisons[2].passed(bound):
            continue  # The same differences, seen from the other column.
        details += explain(
            comparison,
            answered[comparison.left],
            answered[comparison.right],
            lambda token: tokenizer.decode([token]),
        )
        if comparison.max_logprob_delta is None or comparison.max_logprob_delta > bound:
            shown = "not finite" if comparison.max_logprob_delta is None else comparison.max_logprob_delta
            details.append(
                f"log-probabilities of {comparison.left} and {comparison.right} differ by {shown} nats, "
                f"allowed are {bound:g}: weights or precision are not the same"
            )
    details += _other_differences(golden, reference, answers)
    if details:
        details += _whose(golden, lora_name, answers, comparisons[2].identical)
    ended = sum(answer.finish_reason == "stop" for answer in reference)
    served = comparisons[2]
    summary = f"{served.identical}/{served.prompts} greedy answers, token by token; {ended} end by themselves"
    return Check("answers", not details, summary, details)


def _other_differences(
    golden: GoldenSet, reference: Sequence[Answer], answers: Sequence[Generation]
) -> list[str]:
    lines = []
    for index, (expected, answer) in enumerate(zip(reference, answers, strict=True)):
        count = len(golden.prompts[index]["token_ids"])
        if answer.num_input_tokens != count:
            lines.append(
                f"prompt {index}: the server read {answer.num_input_tokens} tokens, training {count}"
            )
        if answer.token_ids != expected.token_ids:
            continue
        if answer.finish_reason != expected.finish_reason:
            lines.append(
                f"prompt {index}: the answer ended for the reason {answer.finish_reason!r}, "
                f"not {expected.finish_reason!r}"
            )
        if answer.text.rstrip(HALF_CHARACTER) != expected.text.rstrip(HALF_CHARACTER):
            lines.append(
                f"prompt {index}: the same tokens are written {answer.text!r}, not {expected.text!r}"
            )
    return lines[:UNSTREAMED]


def _whose(golden: GoldenSet, lora_name: str, answers: Sequence[Generation], identical: int) -> list[str]:
    """Names the model whose answers these are, if they fit another one of the golden set better."""
    candidates: dict[str, Sequence[Answer]] = {
        f"adapter {name}" if name else "the model without lora_name": next(iter(columns.values()))
        for name, columns in golden.served.items()
        if name != lora_name
    }
    if golden.base is not None:
        candidates["the base model without the adapter"] = golden.base
    counts = {
        name: sum(a.token_ids == b.token_ids for a, b in zip(column, answers, strict=True))
        for name, column in candidates.items()
    }
    best = max(counts, key=lambda name: counts[name], default=None)
    if best is None or counts[best] <= identical:
        return []
    return [f"{counts[best]}/{len(answers)} answers are those of {best}"]


def check_streaming(
    server: LiveServer, golden: GoldenSet, sampling: dict[str, Any], streamed: Sequence[Generation]
) -> Check:
    """Whether an answer in one piece is the streamed one: text, tokens, log-probabilities and end."""
    prompts = [prompt["text"] for prompt in golden.prompts[:UNSTREAMED]]
    details = []
    for index, (whole, pieces) in enumerate(zip(server.whole(prompts, sampling), streamed, strict=False)):
        for what, one, other in (
            ("text", whole.text, pieces.text),
            ("tokens", whole.token_ids, pieces.token_ids),
            ("end", whole.finish_reason, pieces.finish_reason),
        ):
            if one != other:
                details.append(f"prompt {index}: {what} in one piece {one!r}, streamed {other!r}")
    summary = f"{len(prompts)} answers in one piece equal the streamed ones"
    return Check("streaming", not details, summary, details[:UNSTREAMED])


def check_stopping(
    server: LiveServer,
    golden: GoldenSet,
    lora_name: str,
    answers: Sequence[Generation],
    tokenizer: PreTrainedTokenizerBase,
) -> Check:
    """A stop string, max_tokens, and that no special token shows in a text."""
    details = []
    longest = max(range(len(answers)), key=lambda index: len(answers[index].text))
    prompt, answer = golden.prompts[longest]["text"], answers[longest]
    stop = stop_string(answer.text)
    if stop is not None:
        sampling = greedy(golden.max_new_tokens, lora_name) | {"stop": [stop]}
        (cut,) = server.streamed([prompt], sampling)
        wanted = answer.text[: answer.text.index(stop)]
        if (cut.text, cut.finish_reason) != (wanted, "stop"):
            details.append(f"stop={stop!r}: {cut.text!r} ({cut.finish_reason}), expected {wanted!r} (stop)")
    count = max(len(answer.token_ids) // 2, 1)
    (short,) = server.streamed([prompt], greedy(count, lora_name))
    if short.token_ids != answer.token_ids[:count]:
        details.append(f"max_tokens={count}: {short.token_ids}, expected {answer.token_ids[:count]}")
    elif count < len(answer.token_ids) and short.finish_reason != "length":
        details.append(f"max_tokens={count}: ended for the reason {short.finish_reason!r}, not 'length'")
    special = [token for token in tokenizer.all_special_tokens if any(token in a.text for a in answers)]
    if special:
        details.append(f"special tokens in the texts: {', '.join(special)}")
    tested = "stop string, max_tokens" if stop is not None else "max_tokens (no text to stop in)"
    return Check("stopping", not details, f"{tested}, special tokens", details)


def stop_string(text: str) -> str | None:
    """A few characters from the middle of an answer, to stop at; None where the text is too short for it."""
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    return stop if middle > 0 and len(stop) == 3 and HALF_CHARACTER not in stop else None
