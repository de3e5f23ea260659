"""An OpenAI-compatible endpoint as a target: vLLM, the gateway in front of Triton, a hosted model.

Retries, pauses and the cache are those of the judges (eval.judging.endpoint, eval.judging.replies).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from eval.generators.base import Advance, Output, Prompt, Settings, Target, silent
from eval.generators.config import EndpointTarget
from eval.judging.endpoint import Endpoint
from eval.judging.replies import Reply, ReplyStore
from eval.judging.request import RejectedError, StoppedError, UnansweredError
from posttrain.errors import RequeueError
from posttrain.preemption import PreemptionFlag

POLL_S = 0.2


@dataclass(frozen=True)
class Request:
    """What decides a reply beside the messages, as `eval.judging.endpoint.Endpoint` reads it."""

    base_url: str
    model: str
    max_tokens: int
    token_limit_field: str
    temperature: float | None
    seed: int | None
    json_mode: bool
    timeout_s: float
    attempts: int
    backoff_s: float
    max_wait_s: float


class EndpointModel(Target):
    """Several requests at a time. The seed sent is the stage's plus the number of the sample."""

    kind = "endpoint"

    def __init__(self, name: str, config: EndpointTarget, key: str | None, store: ReplyStore) -> None:
        super().__init__(name)
        self.config = config
        self._key = key
        self._store = store
        self._lock = threading.Lock()

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings, advance: Advance = silent
    ) -> list[Output]:
        """Raises RequeueError when the endpoint is down, or SIGTERM came; replies so far are kept.

        Raises UserError for a wrong key, model or address.
        """
        stop = threading.Event()
        endpoints = {
            sample: self._endpoint(settings, sample, stop) for sample in {one.sample for one in prompts}
        }
        hashes = [endpoints[one.sample].request_hash(one.messages) for one in prompts]
        found: dict[str, Output] = {}
        waiting: dict[str, Prompt] = {}
        for prompt, key in zip(prompts, hashes, strict=True):
            reply = self._store.get(key)
            if reply is not None:
                found[key] = _output(reply)
            if reply is not None or key in waiting:
                self.usage.cached += 1
                advance(1)
            else:
                waiting[key] = prompt
        failures = self._ask(waiting, endpoints, stop, found, advance)
        for endpoint in endpoints.values():
            for cause, count in endpoint.retries.items():
                self.usage.retries[cause] = self.usage.retries.get(cause, 0) + count
        left = sum(key not in found for key in hashes)
        if left:
            done = f"{len(prompts) - left:,} of {len(prompts):,} answers of {self.name}"
            if not failures:
                raise RequeueError(done)
            raise RequeueError(done, f"because the endpoint did not answer the others ({failures[0]})")
        return [found[key] for key in hashes]

    def _ask(
        self,
        waiting: dict[str, Prompt],
        endpoints: dict[int, Endpoint],
        stop: threading.Event,
        found: dict[str, Output],
        advance: Advance,
    ) -> list[str]:
        """Ask for everything that is waiting; returns why requests failed, if any did."""
        todo = iter(waiting.items())
        running: dict[Future[Output], str] = {}
        failures: list[str] = []
        in_a_row = 0
        with PreemptionFlag() as flag, ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    if flag.requested or in_a_row >= self.config.give_up_after:
                        stop.set()
                    while not stop.is_set() and len(running) < self.config.concurrency:
                        following = next(todo, None)
                        if following is None:
                            break
                        key, prompt = following
                        running[pool.submit(self._one, endpoints[prompt.sample], key, prompt)] = key
                    if not running:
                        return failures
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        key = running.pop(future)
                        try:
                            found[key] = future.result()
                            in_a_row = 0
                        except UnansweredError as error:
                            failures.append(str(error))
                            in_a_row += 1
                        except StoppedError:
                            continue
                        advance(1)
            except BaseException:
                stop.set()
                raise

    def _one(self, endpoint: Endpoint, key: str, prompt: Prompt) -> Output:
        try:
            reply = endpoint.ask(prompt.messages)
        except RejectedError as error:
            return Output("", status="rejected", detail=str(error))
        self._store.put(key, reply)
        with self._lock:
            self.usage.computed += 1
        return _output(reply)

    def _endpoint(self, settings: Settings, sample: int, stop: threading.Event) -> Endpoint:
        config = self.config
        request = Request(
            config.base_url,
            config.model,
            settings.max_new_tokens,
            config.token_limit_field,
            settings.temperature if config.send_temperature else None,
            settings.seed + sample if config.send_seed else None,
            False,
            config.timeout_s,
            config.attempts,
            config.backoff_s,
            config.max_wait_s,
        )
        return Endpoint(request, self._key, stop)


def _output(reply: Reply) -> Output:
    """A refusal that the endpoint marks as one is the answer."""
    finished = None if reply.finish_reason is None else reply.finish_reason == "stop"
    counted = not reply.estimated
    return Output(
        reply.text or reply.refusal or "",
        finished,
        reply.prompt_tokens if counted else None,
        reply.completion_tokens if counted else None,
    )
