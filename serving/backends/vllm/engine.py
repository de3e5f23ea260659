"""The generation engine: requests from a queue, answered together, one forward pass per token of all of them.

A thread of its own lets requests in, computes the next token of every one (batching.py; turns.py for models
that cannot be batched), draws it with the request's own parameters and randomness, and reports it to the
request's sink. Short requests do not wait behind long ones, and long prompts are read in pieces between the
tokens of others. Whatever fails in that loop fails the requests being answered, with an error; then the loop
starts again with a new cache.
"""

from __future__ import annotations

import gc
import itertools
import logging
import queue
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from serving.backends.vllm.batching import AdaptersLike
from serving.backends.vllm.detokenise import AnswerText
from serving.backends.vllm.drawing import draw
from serving.backends.vllm.packed import pack_linear_layers
from serving.backends.vllm.sampling import RequestError, SamplingParams
from serving.backends.vllm.sequences import Answer, LogprobReader, Sink, TokenLogprob, Update
from serving.backends.vllm.support import choose_batching

__all__ = ["Engine", "Limits", "Sink", "TokenLogprob", "Update", "end_of_turn_ids", "useful_threads"]

SMALL_MODEL_PARAMETERS = 50_000_000
MAX_FAILURES_IN_A_ROW = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    max_model_len: int
    max_prompt_characters: int = 32768
    max_output_tokens: int = 1024
    max_queue: int = 256
    max_active: int = 32


class Engine:
    """Serves requests from a queue in a thread of its own until `close`."""

    def __init__(
        self, model: Any, tokenizer: Any, limits: Limits, adapters: AdaptersLike | None = None
    ) -> None:
        """`adapters`: those of `model` that a request may name as `lora_name`."""
        model.eval()
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.limits = limits
        self.stop_ids = end_of_turn_ids(model, tokenizer)
        pack_linear_layers(model)
        self._new_batch = choose_batching(model, adapters, limits.max_model_len, limits.max_active)
        self._batch: Any = self._new_batch()
        self._logprobs = LogprobReader(tokenizer)
        self._keys = itertools.count()
        self._waiting: queue.Queue[Answer | None] = queue.Queue()
        self._next: Answer | None = None
        self._active: dict[str, Answer] = {}
        self._failures = 0
        self._stopped: str | None = None
        self._stopping = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, params: SamplingParams, *sinks: Sink) -> None:
        """Queue one request, with one answer for each sink; answer number i is drawn with `seed` + i.

        Raises:
            RequestError: the engine has stopped, whatever is asked (the supervisor's probe relies on that);
            empty or too long a prompt, an unknown adapter, or a full queue. One that stops now is reported to
            the sinks.
        """
        if self._stopped is not None:
            raise RequestError(self._stopped, unavailable=True)
        prompt_ids = self._read_prompt(prompt, params)
        if self._waiting.qsize() + len(sinks) > self.limits.max_queue:
            raise RequestError(f"the queue is full ({self.limits.max_queue} requests)", unavailable=True)
        answers = [self._answer(prompt_ids, params, sink, at) for at, sink in enumerate(sinks)]
        with self._stopping:
            stopped = self._stopped
            if stopped is None:
                for answer in answers:
                    self._waiting.put(answer)
        if stopped is not None:
            for answer in answers:
                answer.fail(stopped, unavailable=True)

    def close(self) -> None:
        """Finish what is being served, then stop the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _read_prompt(self, prompt: str, params: SamplingParams) -> list[int]:
        served = self.adapters.names if self.adapters is not None else ()
        if params.lora_name is not None and params.lora_name not in served:
            known = f"adapters are {', '.join(served)}" if served else "no adapters are served"
            raise RequestError(f"lora_name '{params.lora_name[:80]}' is not served; {known}")
        if not prompt:
            raise RequestError("text_input is empty")
        if len(prompt) > self.limits.max_prompt_characters:
            raise RequestError(
                f"text_input has {len(prompt)} characters, "
                f"at most {self.limits.max_prompt_characters} are accepted"
            )
        prompt_ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not prompt_ids:
            raise RequestError("text_input holds no tokens")
        if len(prompt_ids) >= self.limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer in "
                f"max_model_len={self.limits.max_model_len}"
            )
        return prompt_ids

    def _answer(self, prompt_ids: list[int], params: SamplingParams, sink: Sink, number: int) -> Answer:
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed + number)
        return Answer(
            key=str(next(self._keys)),
            prompt_ids=prompt_ids,
            params=replace(params, n=1),
            sink=sink,
            generator=generator,
            text=AnswerText(self.tokenizer, prompt_ids, params.stop),
            max_tokens=min(params.max_tokens, self.limits.max_model_len - len(prompt_ids)),
        )

    @torch.inference_mode()
    def _serve(self) -> None:
        reason = "the engine has stopped; restart the server"
        try:
            while self._admit():
                try:
                    self._step()
                    self._failures = 0
                except Exception as error:
                    self._recover(error)
        except _TooManyFailures as error:
            reason = str(error)
        finally:
            self._stop(reason)

    def _admit(self) -> bool:
        """Let waiting requests in; sleeps while there is nothing to do. False: time to stop."""
        while len(self._active) < self.limits.max_active:
            if self._next is None:
                try:
                    self._next = self._waiting.get(block=not self._active)
                except queue.Empty:
                    return True
                if self._next is None:
                    self._waiting.put(None)
                    return bool(self._active)
            answer = self._next
            if not answer.is_gone():
                room = self._batch.add(
                    answer.key, answer.prompt_ids, answer.max_tokens, answer.params.lora_name
                )
                if not room:
                    return True
                self._active[answer.key] = answer
            self._next = None
        return True

    def _step(self) -> None:
        """One forward pass, and what it adds to the answers."""
        for answer in list(self._active.values()):
            if answer.is_gone():
                self._remove(answer)
        if not self._active:
            return
        keys, logits_RV = self._batch.step()
        if not keys:
            return
        answers = [self._active[key] for key in keys]
        params = [answer.params for answer in answers]
        tokens = draw(logits_RV, params, [answer.generator for answer in answers])
        read = self._logprobs.read(logits_RV, tokens, [each.logprobs for each in params])
        for answer, token, (logprob, candidates) in zip(answers, tokens, read, strict=True):
            answer.add(token, logprob, candidates, self.stop_ids)
            if answer.finished:
                self._remove(answer)
            else:
                self._batch.extend(answer.key, token)

    def _remove(self, answer: Answer) -> None:
        del self._active[answer.key]
        self._batch.remove(answer.key)

    def _recover(self, error: Exception) -> None:
        """Fail what was being answered, and go on with an empty batch.

        Raises:
            _TooManyFailures: nothing has worked for several times in a row.
        """
        self._failures += 1
        problem = f"{type(error).__name__}: {error}"[:500]
        log.error("the engine failed (%s); its requests are failed", problem, exc_info=error)
        for answer in self._active.values():
            answer.fail(f"the engine failed ({problem}); the request may be sent again", unavailable=True)
        self._active = {}
        error.__traceback__ = None  # its frames hold the old cache
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise _TooManyFailures(
                f"the engine has stopped after {self._failures} failures in a row, the last one: {problem}; "
                "restart the server"
            )
        self._batch = None
        gc.collect()
        self._batch = self._new_batch()

    def _stop(self, reason: str) -> None:
        """Nobody waits for an answer that will not come, whatever ended the thread."""
        self._batch = None
        with self._stopping:
            self._stopped = reason
        remaining = [*self._active.values()] + ([self._next] if self._next is not None else [])
        while not self._waiting.empty():
            answer = self._waiting.get()
            if answer is not None:
                remaining.append(answer)
        for answer in remaining:
            answer.fail(reason, unavailable=True)


class _TooManyFailures(Exception):
    """The engine does not work."""


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
