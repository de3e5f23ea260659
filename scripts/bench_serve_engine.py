"""The sides of `bench_serve.py` that have no server: the engine in one process, and generate() one at a time.

    python scripts/bench_serve_engine.py (engine | generate) SETTINGS.json WORLD.json REQUESTS.json

Run by the Triton environment's python, which the served engine runs on too. Reads one JSON object a line on
standard input, {"concurrency", "count"}, and answers each with the samples of that measurement; both come
after a first line with the number of torch's threads.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench_serve_common import Request, Sample, Settings, read_requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Recorder:
    """The engine's sink: one sample."""

    def __init__(self, index: int, done: queue.Queue[Recorder]) -> None:
        self.sample = Sample(time.perf_counter(), index)
        self.done = done

    def update(self, update: Any) -> None:
        """One token."""
        self.sample.tokens += 1
        if update.text:
            self.sample.events.append(time.perf_counter())
            self.sample.text += update.text
        if update.finish_reason is not None:
            self._end()

    def fail(self, message: str, unavailable: bool) -> None:
        """The request failed."""
        self.sample.error = message
        self._end()

    def cancelled(self) -> bool:
        """Nobody leaves here."""
        return False

    def _end(self) -> None:
        self.sample.ended = time.perf_counter()
        self.done.put(self)


class TokenTimes:
    """A streamer of generate() that notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begun = False

    def put(self, value: Any) -> None:
        """Token ids."""
        if self.begun:
            self.times.append(time.perf_counter())
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""


def load(world: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer as serving/backends/vllm/model.py loads them, with its number of threads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from serving.backends.vllm.engine import useful_threads

    model = AutoModelForCausalLM.from_pretrained(world["weights"], dtype=getattr(torch, world["dtype"]))
    torch.set_num_threads(useful_threads(model))
    return model.eval(), AutoTokenizer.from_pretrained(world["weights"])


def engine_side(world: dict[str, Any]) -> Callable[[list[Request], int], list[Sample]]:
    """measure(requests, concurrency) on the engine that Triton serves."""
    from serving.backends.vllm.engine import Engine, Limits
    from serving.backends.vllm.sampling import SamplingParams

    model, tokenizer = load(world)
    engine = Engine(model, tokenizer, Limits(max_model_len=world["max_model_len"], **world["limits"]))

    def measure(requests: list[Request], concurrency: int) -> list[Sample]:
        done: queue.Queue[Recorder] = queue.Queue()
        waiting = enumerate(requests)

        def submit_next() -> None:
            for index, request in waiting:
                params = SamplingParams(temperature=0.0, max_tokens=request.answer_tokens)
                engine.submit(request.prompt, params, Recorder(index, done))
                return

        for _ in range(concurrency):
            submit_next()
        samples = []
        while len(samples) < len(requests):
            samples.append(done.get().sample)
            submit_next()
        return samples

    return measure


def generate_side(world: dict[str, Any]) -> Callable[[list[Request], int], list[Sample]]:
    """measure(requests, 1) with transformers' generate()."""
    import torch

    model, tokenizer = load(world)

    @torch.inference_mode()
    def measure(requests: list[Request], concurrency: int) -> list[Sample]:
        if concurrency != 1:
            raise ValueError("generate() answers one request at a time")
        samples = []
        for index, request in enumerate(requests):
            sample, streamer = Sample(time.perf_counter(), index), TokenTimes()
            inputs = tokenizer(request.prompt, return_tensors="pt")
            answer = model.generate(
                **inputs, do_sample=False, max_new_tokens=request.answer_tokens, streamer=streamer
            )
            ids = answer[0, inputs["input_ids"].shape[1] :]
            sample.text = tokenizer.decode(ids, skip_special_tokens=True)
            sample.ended = time.perf_counter()
            sample.events, sample.tokens = streamer.times, len(ids)
            samples.append(sample)
        return samples

    return measure


def main() -> None:
    side, settings_file, world_file, requests_file = sys.argv[1:]
    settings = Settings.read(Path(settings_file))
    world = json.loads(Path(world_file).read_text(encoding="utf-8"))
    requests = read_requests(Path(requests_file))
    measure = {"engine": engine_side, "generate": generate_side}[side](world)
    import torch

    print(json.dumps({"threads": torch.get_num_threads(), "asked": settings.threads}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        samples = measure(list(islice(cycle(requests), order["count"])), order["concurrency"])
        print(json.dumps([asdict(sample) for sample in samples]), flush=True)


if __name__ == "__main__":
    main()
