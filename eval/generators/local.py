"""A model in this process: run directory, local path or Hub id. Batched, seeded by prompt, cached."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eval.batching import length_sorted_batches, pad_rows, token_logprobs
from eval.generation import encode_prompt, generate
from eval.generators.base import (
    Advance,
    Continuation,
    Likelihood,
    Output,
    Prompt,
    Settings,
    Target,
    sample_key,
    silent,
)
from eval.judging.replies import Reply, ReplyStore
from posttrain.errors import RequeueError, UserError
from posttrain.hashing import hash_json
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.preemption import PreemptionFlag


class LocalModel(Target):
    """content_hash: of the model's files, part of the cache key. The weights are loaded when first needed."""

    kind = "model"

    def __init__(
        self, name: str, path: Path, content_hash: str, store: ReplyStore, *, batch_size: int, dtype: str
    ) -> None:
        super().__init__(name)
        self.path = path
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(path)
        self._identity = {"model": content_hash, "dtype": dtype}
        self._store = store
        self._dtype = dtype
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The language model, in evaluation mode, on the GPU if there is one."""
        if self._model is None:
            loaded: Any = load_causal_lm(self.path, self._dtype)
            self._model = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model

    def context_length(self) -> int | None:
        """Positions the model was made for, None where its configuration does not say."""
        return self.model.config.to_dict().get("max_position_embeddings")

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings, advance: Advance = silent
    ) -> list[Output]:
        """Equal prompts of equal sample number are answered once."""
        rows = [encode_prompt(self.tokenizer, prompt.messages) for prompt in prompts]
        numbers = [sample_key(prompt.messages, prompt.sample) for prompt in prompts]
        # A greedy answer does not depend on the seed or the sample.
        luck = [[settings.temperature, settings.seed, number] for number in numbers]
        keys = [
            hash_json(
                {
                    **self._identity,
                    "ids": row,
                    "max_new_tokens": settings.max_new_tokens,
                    "sampling": drawn if settings.temperature else None,
                }
            )
            for row, drawn in zip(rows, luck, strict=True)
        ]
        waiting = self._not_stored(keys, advance)
        fitting = []
        for i in waiting:
            if self._too_long(rows[i], settings.max_new_tokens) is None:
                fitting.append(i)
            else:
                advance(1)
        with self._batches([len(rows[i]) for i in fitting]) as batches:
            for batch in batches:
                chosen = [fitting[j] for j in batch]
                answers = generate(
                    self.model,
                    self.tokenizer,
                    [rows[i] for i in chosen],
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    batch_size=self.batch_size,
                    seed=settings.seed,
                    indices=[numbers[i] for i in chosen],
                )
                found = {
                    keys[i]: self._reply(
                        answer.text,
                        "stop" if answer.finished else "length",
                        len(answer.prompt_ids),
                        len(answer.ids),
                    )
                    for i, answer in zip(chosen, answers, strict=True)
                }
                self._store.put_all(found)
                self.usage.computed += len(chosen)
                advance(len(chosen))
        return [self._output(key, row, settings) for key, row in zip(keys, rows, strict=True)]

    def loglikelihood(
        self, continuations: Sequence[Continuation], advance: Advance = silent
    ) -> list[Likelihood]:
        """Prompt and text are encoded apart, as generation would meet them, and nothing is cut.

        Raises UserError for a continuation without tokens, or longer than the model's context.
        """
        heads = [encode_prompt(self.tokenizer, one.messages) for one in continuations]
        tails = [self.tokenizer(one.text, add_special_tokens=False)["input_ids"] for one in continuations]
        for head, tail, one in zip(heads, tails, continuations, strict=True):
            if not tail:
                raise UserError(f"a choice of {one.messages[-1]['content'][:60]!r} is an empty text")
            problem = self._too_long(head + tail, 0)
            if problem is not None:
                raise UserError(f"{one.messages[-1]['content'][:60]!r} with its answer has {problem}")
        keys = [
            hash_json({**self._identity, "likelihood": [head, tail]})
            for head, tail in zip(heads, tails, strict=True)
        ]
        waiting = self._not_stored(keys, advance)
        with self._batches([len(heads[i]) + len(tails[i]) for i in waiting]) as batches:
            for batch in batches:
                chosen = [waiting[j] for j in batch]
                sums = self._tail_logprobs([heads[i] for i in chosen], [tails[i] for i in chosen])
                found = {
                    keys[i]: self._reply(json.dumps(total), "stop", len(heads[i]), len(tails[i]))
                    for i, total in zip(chosen, sums, strict=True)
                }
                self._store.put_all(found)
                self.usage.computed += len(chosen)
                advance(len(chosen))
        replies = [self._store.get(key) for key in keys]
        return [Likelihood(json.loads(one.text), one.completion_tokens) for one in replies if one is not None]

    @torch.no_grad()
    def _tail_logprobs(self, heads: Sequence[list[int]], tails: Sequence[list[int]]) -> list[float]:
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        ids_BT, mask_BT = pad_rows(rows, self.tokenizer.pad_token_id, "right", self.model.device)
        logprobs_BT = token_logprobs(self.model, ids_BT, mask_BT).double()
        return [
            float(logprobs_BT[b, len(head) - 1 : len(head) + len(tail) - 1].sum())
            for b, (head, tail) in enumerate(zip(heads, tails, strict=True))
        ]

    @contextmanager
    def _batches(self, lengths: Sequence[int]) -> Iterator[Iterator[list[int]]]:
        """Batches of similar length, until SIGTERM comes. Raises RequeueError then."""
        with PreemptionFlag() as flag:

            def until_stopped() -> Iterator[list[int]]:
                done = 0
                for batch in length_sorted_batches(lengths, self.batch_size):
                    if flag.requested:
                        raise RequeueError(f"{done:,} of {len(lengths):,} answers of {self.name}")
                    yield batch
                    done += len(batch)

            yield until_stopped()

    def _not_stored(self, keys: Sequence[str], advance: Advance) -> list[int]:
        """Places of the keys that are not in the cache, each key once."""
        waiting, seen = [], set()
        for i, key in enumerate(keys):
            if key in seen or self._store.get(key) is not None:
                self.usage.cached += 1
                advance(1)
            else:
                waiting.append(i)
            seen.add(key)
        return waiting

    def _too_long(self, ids: Sequence[int], room: int) -> str | None:
        limit = self.context_length()
        if limit is None or len(ids) + room <= limit:
            return None
        return f"{len(ids)} tokens; {self.name} reads {limit}, {room} of them kept for the answer"

    def _output(self, key: str, row: list[int], settings: Settings) -> Output:
        reply = self._store.get(key)
        if reply is None:
            problem = self._too_long(row, settings.max_new_tokens) or ""
            return Output("", None, len(row), 0, "rejected", problem)
        return Output(reply.text, reply.finish_reason == "stop", reply.prompt_tokens, reply.completion_tokens)

    def _reply(self, text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> Reply:
        return Reply(
            self.name, text, finish, None, prompt_tokens, completion_tokens, estimated=False, time=time.time()
        )
