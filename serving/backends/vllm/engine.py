"""A small generation engine: one thread, one forward pass per token, requests taking turns.

Every request keeps its own key-value cache and is computed alone, so its tokens do not depend on what else is
being served; turns of one token keep a short request from waiting behind a long one. In each round the
requests of one adapter follow each other, so that a round switches adapters once for each that is in use.
Throughput is that of one request. What a faster engine must keep is `Engine.submit` and the `Sink` it reports
to.
"""

from __future__ import annotations

import inspect
import queue
import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from serving.backends.vllm.sampling import RequestError, SamplingParams, draw

CONTEXT_TOKENS = 6
CANCEL_CHECK_EVERY = 8
SMALL_MODEL_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    max_model_len: int
    max_prompt_characters: int = 32768
    max_output_tokens: int = 1024
    max_queue: int = 256
    max_active: int = 16


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one candidate at one position; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True)
class Update:
    """What one turn added to an answer. `logprobs`: the drawn token, then the likeliest ones if asked for."""

    text: str
    token_id: int
    logprob: float
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    num_input_tokens: int


class Adapters(Protocol):
    """Adapters of the served model: those of serving.backends.vllm.adapters, where there are any."""

    names: tuple[str, ...]

    def use(self, name: str | None) -> None:
        """Compute with this adapter, or with the plain model."""


class Sink(Protocol):
    """Where a request's answer goes; called from the engine's thread."""

    def update(self, update: Update) -> None:
        """One more token; the last one has a finish_reason."""

    def fail(self, message: str, unavailable: bool) -> None:
        """No more is coming: the request failed."""

    def cancelled(self) -> bool:
        """Whether the client has gone; then no more is computed or sent."""


@dataclass
class _Sequence:
    prompt_ids: list[int]
    params: SamplingParams
    sink: Sink
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    cache: Any = None
    sent: int = 0
    finished: bool = False


class Engine:
    """Serves requests from a queue in a thread of its own until `close`."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits, adapters: Adapters | None = None) -> None:
        """`adapters`: those of `model` that a request may name as `lora_name`."""
        self.model = model.eval()
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.limits = limits
        self.stop_ids = end_of_turn_ids(model, tokenizer)
        self._last_logits_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._waiting: queue.Queue[_Sequence | None] = queue.Queue()
        self._active: list[_Sequence] = []
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, params: SamplingParams, sink: Sink) -> None:
        """Queue one request.

        Raises:
            RequestError: empty or too long a prompt, an unknown adapter, or a full queue. A stopped engine is
            reported to the sink.
        """
        self._check_adapter(params.lora_name)
        if not prompt:
            raise RequestError("text_input is empty")
        if len(prompt) > self.limits.max_prompt_characters:
            raise RequestError(
                f"text_input has {len(prompt)} characters, "
                f"at most {self.limits.max_prompt_characters} are accepted"
            )
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        if not prompt_ids:
            raise RequestError("text_input holds no tokens")
        if len(prompt_ids) >= self.limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer in "
                f"max_model_len={self.limits.max_model_len}"
            )
        if self._waiting.qsize() >= self.limits.max_queue:
            raise RequestError(f"the queue is full ({self.limits.max_queue} requests)", unavailable=True)
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        self._waiting.put(_Sequence(prompt_ids, params, sink, generator))
        if not self._thread.is_alive():
            self._fail_remaining()

    def close(self) -> None:
        """Finish what is being served, then stop the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _check_adapter(self, name: str | None) -> None:
        served = self.adapters.names if self.adapters is not None else ()
        if name is not None and name not in served:
            known = f"adapters are {', '.join(served)}" if served else "no adapters are served"
            raise RequestError(f"lora_name '{name[:80]}' is not served; {known}")

    def _serve(self) -> None:
        try:
            while self._admit():
                for sequence in sorted(self._active, key=lambda each: each.params.lora_name or ""):
                    self._take_turn(sequence)
                self._active = [sequence for sequence in self._active if not sequence.finished]
        finally:
            self._fail_remaining()

    def _admit(self) -> bool:
        """Move waiting requests in; sleeps while there is nothing to do. False: time to stop."""
        while len(self._active) < self.limits.max_active:
            try:
                sequence = self._waiting.get(block=not self._active)
            except queue.Empty:
                return True
            if sequence is None:
                self._waiting.put(None)
                return bool(self._active)
            self._active.append(sequence)
        return True

    def _take_turn(self, sequence: _Sequence) -> None:
        if len(sequence.ids) % CANCEL_CHECK_EVERY == 0 and sequence.sink.cancelled():
            sequence.finished = True
            return
        try:
            update = self._next_token(sequence)
        except RuntimeError as error:
            sequence.finished = True
            sequence.sink.fail(f"generation failed: {error}", unavailable=False)
            return
        sequence.finished = update.finish_reason is not None
        sequence.sink.update(update)

    @torch.inference_mode()
    def _next_token(self, sequence: _Sequence) -> Update:
        step_ids = sequence.ids[-1:] or sequence.prompt_ids
        options = {"logits_to_keep": 1} if self._last_logits_only else {}
        if self.adapters is not None:
            self.adapters.use(sequence.params.lora_name)
        ids_1T = torch.tensor([step_ids], device=self.model.device)
        output = self.model(input_ids=ids_1T, past_key_values=sequence.cache, use_cache=True, **options)
        sequence.cache = output.past_key_values
        logits_V = output.logits[0, -1].float().cpu()
        token = draw(logits_V, sequence.params, sequence.generator)
        sequence.ids.append(token)
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        text, finish_reason = self._text_and_reason(sequence, token)
        return Update(
            text=text,
            token_id=token,
            logprob=float(logprobs_V[token]),
            logprobs=self._candidates(logprobs_V, token, sequence.params.logprobs),
            finish_reason=finish_reason,
            num_input_tokens=len(sequence.prompt_ids),
        )

    def _text_and_reason(self, sequence: _Sequence, token: int) -> tuple[str, str | None]:
        """New text that is safe to send: no half character, no beginning of a stop string."""
        params = sequence.params
        reason = None
        if (token in self.stop_ids and not params.ignore_eos) or token in params.stop_token_ids:
            reason = "stop"
        elif (
            len(sequence.ids) >= params.max_tokens
            or len(sequence.prompt_ids) + len(sequence.ids) >= self.limits.max_model_len
        ):
            reason = "length"
        text = self._decode(sequence)
        cut = min((at for at in (text.find(stop) for stop in params.stop) if at >= 0), default=-1)
        if cut >= 0:
            text, reason = text[:cut], "stop"
        elif reason is None and text.endswith("\ufffd"):
            text = text[: sequence.sent]
        elif reason is None and params.stop:
            text = text[: max(len(text) - max(map(len, params.stop)) + 1, sequence.sent)]
        delta = text[sequence.sent :]
        sequence.sent += len(delta)
        return delta, reason

    def _decode(self, sequence: _Sequence) -> str:
        """The answer's text, decoded behind the prompt's last tokens so that a leading space survives."""
        context = sequence.prompt_ids[-CONTEXT_TOKENS:]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(context, **options)
        return self.tokenizer.decode(context + sequence.ids, **options)[len(before) :]

    def _candidates(
        self, logprobs_V: torch.Tensor, token: int, count: int | None
    ) -> tuple[TokenLogprob, ...] | None:
        if count is None:
            return None
        others = logprobs_V.topk(min(count, len(logprobs_V))).indices.tolist()
        ids = [token, *(other for other in others if other != token)]
        values = [float(logprobs_V[i]) for i in ids]
        return tuple(
            TokenLogprob(i, value, int((logprobs_V > value).sum()) + 1, self.tokenizer.decode([i]))
            for i, value in zip(ids, values, strict=True)
        )

    def _fail_remaining(self) -> None:
        """Nobody waits for an answer that will not come, even if the thread died of something unforeseen."""
        remaining = [sequence for sequence in self._active if not sequence.finished]
        self._active = []
        while not self._waiting.empty():
            sequence = self._waiting.get()
            if sequence is not None:
                remaining.append(sequence)
        for sequence in remaining:
            sequence.sink.fail("the engine has stopped; restart the server", unavailable=True)


def useful_threads(model: Any) -> int:
    """Threads for computing one token at a time.

    A small model's matrices are not worth handing to a second thread, which on a busy machine makes every
    step wait for the scheduler (measured: ten times slower).
    """
    small = sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL_PARAMETERS
    return 1 if small else torch.get_num_threads()


def end_of_turn_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the generation config, as in vLLM."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
