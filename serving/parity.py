"""The proof that what is served is what was trained: the same prompts, greedy, token by token.

The reference is `model.generate()` of the trained model, loaded from its own run and not from the export, one
prompt at a time. Compared are the rendered prompt (chat template), the number of prompt tokens the server saw
(special tokens), every token of the answer including its end (weights, stop tokens), and the log-probability
of each served token (weights that changed too little to change a token). Pure but for `reference_answer`,
which runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from serving.client import Generation

LOGPROB_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
SHOWN_FAILURES = 5
SHOWN_TOKENS = 6


@dataclass(frozen=True)
class Reference:
    """What the trained model makes of one prompt."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Comparison:
    """One prompt, both ways.

    first_difference: position of the first token that differs, None if there is none. margin: by how many
    nats the trained model prefers its own token there; near 0 means a tie that rounding decides.
    max_logprob_delta: largest |served - reference| log-probability over the served tokens, None where it is
    not a finite number.
    """

    index: int
    prompt_equal: bool
    prompt_tokens: int
    served_prompt_tokens: int
    expected_ids: list[int]
    served_ids: list[int]
    expected_text: str
    served_text: str
    first_difference: int | None
    margin: float | None
    max_logprob_delta: float | None

    @property
    def identical(self) -> bool:
        """Prompt and answer are the same, token by token."""
        return (
            self.prompt_equal
            and self.prompt_tokens == self.served_prompt_tokens
            and self.first_difference is None
        )


@dataclass(frozen=True)
class ParityReport:
    """All comparisons, and the bound on log-probabilities they are held to."""

    comparisons: list[Comparison]
    logprob_bound: float

    @property
    def identical(self) -> int:
        """Number of prompts answered identically."""
        return sum(comparison.identical for comparison in self.comparisons)

    @property
    def max_logprob_delta(self) -> float | None:
        """Largest deviation over all prompts, in nats."""
        deltas = [c.max_logprob_delta for c in self.comparisons if c.max_logprob_delta is not None]
        return max(deltas, default=None)

    @property
    def within_bound(self) -> bool:
        """Whether every log-probability is close enough."""
        return all(
            c.max_logprob_delta is not None and c.max_logprob_delta <= self.logprob_bound
            for c in self.comparisons
        )

    @property
    def passed(self) -> bool:
        """Whether all prompts are identical and all log-probabilities within the bound."""
        return self.identical == len(self.comparisons) and self.within_bound

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "passed": self.passed,
            "prompts": len(self.comparisons),
            "identical": self.identical,
            "max_logprob_delta": self.max_logprob_delta,
            "logprob_bound": self.logprob_bound,
            "comparisons": [{"identical": c.identical, **asdict(c)} for c in self.comparisons],
        }

    def explain(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Readable account of what differs, at most SHOWN_FAILURES prompts of it."""
        total = len(self.comparisons)
        lines = [f"{self.identical}/{total} prompts are answered as the trained model answers them"]
        failures = [c for c in self.comparisons if not c.identical]
        for comparison in failures[:SHOWN_FAILURES]:
            lines += _explain_one(comparison, tokenizer)
        if len(failures) > SHOWN_FAILURES:
            lines.append(f"... and {len(failures) - SHOWN_FAILURES} more, all in parity.json")
        if not self.within_bound:
            lines.append(
                f"log-probabilities differ by up to {_number(self.max_logprob_delta)} nats, "
                f"allowed are {self.logprob_bound:g}: weights or precision are not the trained ones"
            )
        return "\n".join(lines)


def _explain_one(c: Comparison, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    lines = [f"prompt {c.index}:"]
    if not c.prompt_equal:
        lines.append("    the exported chat template renders another prompt than the trained one")
    if c.prompt_tokens != c.served_prompt_tokens:
        lines.append(
            f"    the server read {c.served_prompt_tokens} prompt tokens, training reads {c.prompt_tokens}"
        )
    at = c.first_difference
    if at is None:
        return lines
    start, end = max(at - SHOWN_TOKENS, 0), at + SHOWN_TOKENS
    lines.append(
        f"    first difference at token {at} (of {len(c.expected_ids)} trained, {len(c.served_ids)} served)"
    )
    for name, ids in (("trained", c.expected_ids), ("served", c.served_ids)):
        lines.append(f"    {name:8}{_tokens(tokenizer, ids[start:end])}{'' if len(ids) > end else ' (end)'}")
    if c.margin is not None:
        lines.append(f"    the trained model prefers its own token there by {c.margin:.2g} nats")
    return lines


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " ".join(repr(tokenizer.decode([token])) for token in ids)


def _number(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:.3g}"


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The conversation up to where the assistant is to speak, by the tokenizer's chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def reference_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_new_tokens: int,
) -> Reference:
    """Greedy answer of the trained model to one conversation."""
    prompt = render(tokenizer, messages)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    output = generate_greedily(model, tokenizer, prompt_ids, max_new_tokens)
    ids = output.sequences[0, len(prompt_ids) :].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Reference(prompt, prompt_ids, ids, text)


def generate_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> Any:
    """`model.generate()` with every setting written out, so that none comes from a file.

    Returns transformers' output with `sequences` and, per step, the raw `logits`.
    """
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    trained_settings, model.generation_config = model.generation_config, settings
    try:
        generate: Any = model.generate
        with torch.inference_mode():
            return generate(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
    finally:
        model.generation_config = trained_settings


@contextmanager
def as_served(model: PreTrainedModel) -> Iterator[None]:
    """Compute with as many threads as the embedded server does; afterwards with as many as before."""
    import torch

    from serving.backends.vllm.engine import useful_threads

    before = torch.get_num_threads()
    torch.set_num_threads(useful_threads(model))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


def compare(
    index: int, model: PreTrainedModel, reference: Reference, prompt: str, served: Generation
) -> Comparison:
    """Compare one served answer with the reference.

    Args:
        model: the trained model; one forward pass gives its log-probabilities of the served tokens.
        prompt: text that was sent, rendered with the exported tokenizer.
        served: the answer, with token ids and log-probabilities.
    """
    import torch

    prompt_ids, ids = reference.prompt_ids, served.token_ids
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 :].float()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    chosen_T = logprobs_TV[:-1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
    deltas = (chosen_T - torch.tensor(served.logprobs)).abs().tolist()
    at = first_difference(reference.ids, ids)
    margin = None
    if at is not None and at < len(ids) and at < len(reference.ids):
        margin = float(logprobs_TV[at, reference.ids[at]] - logprobs_TV[at, ids[at]])
    return Comparison(
        index=index,
        prompt_equal=prompt == reference.prompt,
        prompt_tokens=len(prompt_ids),
        served_prompt_tokens=served.num_input_tokens,
        expected_ids=reference.ids,
        served_ids=ids,
        expected_text=reference.text,
        served_text=served.text,
        first_difference=at,
        margin=margin,
        max_logprob_delta=max(deltas) if deltas and all(map(math.isfinite, deltas)) else None,
    )


def compare_all(
    model: PreTrainedModel,
    references: Sequence[Reference],
    prompts: Sequence[str],
    answers: Sequence[Generation],
    logprob_bound: float,
) -> ParityReport:
    """`compare` of every prompt, in order."""
    with as_served(model):
        comparisons = [
            compare(index, model, reference, prompt, answer)
            for index, (reference, prompt, answer) in enumerate(
                zip(references, prompts, answers, strict=True)
            )
        ]
    return ParityReport(comparisons, logprob_bound)


def first_difference(expected: Sequence[int], served: Sequence[int]) -> int | None:
    """Position of the first token in which two answers differ (one may be the other's beginning), or None."""
    for at, (left, right) in enumerate(zip(expected, served, strict=False)):
        if left != right:
            return at
    return None if len(expected) == len(served) else min(len(expected), len(served))
