"""Asks an endpoint many things at once, within a budget, and keeps what was said.

A question is asked once however often it is needed, a reply in the store is not asked for again, and a stop
(SIGTERM, an endpoint that is down, the budget) lets what is in flight finish first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eval.judging.config import EndpointJudge
from eval.judging.parsing import parse
from eval.judging.replies import Reply, ReplyStore
from eval.judging.request import RejectedError, StoppedError, UnansweredError, estimated_tokens
from eval.judging.templates import REFORMAT, Message
from posttrain.preemption import PreemptionFlag

POLL_S = 0.2
MOST_QUOTED = 20_000
"""Characters of a reply that is sent back with the request for the form."""
STATUSES = ("ok", "unparseable", "refused", "rejected", "failed")
Status = Literal["ok", "unparseable", "refused", "rejected", "failed"]
Stop = Literal["sigterm", "budget", "down"]


@dataclass(frozen=True)
class Said:
    """What became of one question: a verdict, or why there is none. reply: the last text, for the record."""

    status: Status
    value: str | float | None = None
    reason: str = ""
    detail: str = ""
    reply: str = ""


@dataclass
class Account:
    """Requests, tokens and cost. cached: replies that were there already; their cost counts in `cost` too."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    reformatted: int = 0

    def cost(self, config: EndpointJudge) -> float | None:
        """What the replies cost, in the currency of the prices; None without prices."""
        return price(config, self.prompt_tokens, self.completion_tokens)


def price(config: EndpointJudge, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Cost of that many tokens, None without prices."""
    if config.price_input is None or config.price_output is None:
        return None
    return (prompt_tokens * config.price_input + completion_tokens * config.price_output) / 1e6


@dataclass
class Asked:
    """The outcome of `ask_all`. stopped: why it ended early; left: questions not asked or not answered."""

    said: dict[str, Said]
    account: Account
    retries: dict[str, int] = field(default_factory=dict)
    stopped: Stop | None = None
    left: int = 0


class Asker:
    """Asks one judge. What the replies in the store cost counts against its budget."""

    def __init__(self, config: EndpointJudge, key: str | None, store: ReplyStore) -> None:
        from eval.judging.endpoint import Endpoint  # needs the extra `judge`, other judges do not

        self.config = config
        self.store = store
        self.account = Account()
        self._stop = threading.Event()
        self._endpoint = Endpoint(config, key, self._stop)
        self._lock = threading.Lock()
        self._spent = self._reserved = 0.0
        self._failed_in_a_row = 0
        self._why: Stop | None = None

    def request_hash(self, messages: list[Message]) -> str:
        """The key of a question (see `Endpoint.request_hash`)."""
        return self._endpoint.request_hash(messages)

    def price(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Cost of that many tokens, None without prices."""
        return price(self.config, prompt_tokens, completion_tokens)

    def ask_all(
        self,
        questions: Mapping[str, list[Message]],
        on_answer: Callable[[Account], Any] = lambda account: None,
    ) -> Asked:
        """Ask everything, `concurrency` at a time. Raises UserError for a wrong key, model or address."""
        said: dict[str, Said] = {}
        waiting = iter(questions.items())
        self._spent = sum(
            self._cost(reply) for messages in questions.values() for reply in self._stored(messages)
        )
        running: dict[Future[Said], str] = {}
        with PreemptionFlag() as flag, ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    if flag.requested:
                        self._halt("sigterm")
                    while not self._stop.is_set() and len(running) < self.config.concurrency:
                        following = next(waiting, None)
                        if following is None:
                            break
                        running[pool.submit(self._question, following[1])] = following[0]
                    if not running:
                        break
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        said[running.pop(future)] = future.result()
                        on_answer(self.account)
            except BaseException:
                self._stop.set()
                raise
        for question, messages in waiting:  # after a stop: what is paid for already is read all the same
            if self._stored(messages):
                said[question] = self._question(messages)
        not_asked = Said("failed", detail="not asked")
        said = {question: said.get(question, not_asked) for question in questions}
        left = sum(one.status == "failed" for one in said.values())
        return Asked(said, self.account, dict(self._endpoint.retries), self._why, left)

    def _halt(self, why: Stop) -> None:
        with self._lock:
            self._why = self._why or why
        self._stop.set()

    def _question(self, messages: list[Message]) -> Said:
        """Ask, and once more for a verdict that can be read."""
        try:
            reply = self._reply(messages)
            said = self._read(reply)
            if said.status == "unparseable":
                with self._lock:
                    self.account.reformatted += 1
                said = self._read(self._reply(self._follow_up(messages, reply)))
        except RejectedError as error:
            return Said("rejected", detail=str(error))
        except UnansweredError as error:
            self._count_failure()
            return Said("failed", detail=str(error))
        except StoppedError:
            return Said("failed", detail="stopped before there was a reply")
        return said

    def _follow_up(self, messages: list[Message], reply: Reply) -> list[Message]:
        again = {"role": "user", "content": REFORMAT[self.config.method]}
        said = reply.text[:MOST_QUOTED] or "(empty)"
        return [*messages, {"role": "assistant", "content": said}, again]

    def _stored(self, messages: list[Message]) -> list[Reply]:
        """The replies to this question, and to the one after it, that need not be paid for."""
        reply = self.store.get(self.request_hash(messages))
        if reply is None:
            return []
        if self._read(reply).status != "unparseable":
            return [reply]
        again = self.store.get(self.request_hash(self._follow_up(messages, reply)))
        return [reply] if again is None else [reply, again]

    def _cost(self, reply: Reply) -> float:
        return price(self.config, reply.prompt_tokens, reply.completion_tokens) or 0.0

    def _read(self, reply: Reply) -> Said:
        parsed = parse(
            reply.text, self.config.method, finish_reason=reply.finish_reason, refusal=reply.refusal
        )
        if parsed.value is not None:
            return Said("ok", parsed.value, parsed.reason, reply=reply.text)
        status: Status = "refused" if parsed.problem == "refused" else "unparseable"
        return Said(status, None, parsed.reason, parsed.problem or "", reply.refusal or reply.text)

    def _reply(self, messages: list[Message]) -> Reply:
        """From the store, or asked for within the budget and stored."""
        request = self.request_hash(messages)
        reply = self.store.get(request)
        cached = reply is not None
        if reply is None:
            if self._stop.is_set():
                raise StoppedError
            held = self._reserve(messages)
            try:
                asked = self._endpoint.ask(messages)
                kept = self.store.put(request, asked)
                # Another run that shares the store may have been first: its words count, our tokens are paid.
                reply = replace(
                    kept,
                    prompt_tokens=asked.prompt_tokens,
                    completion_tokens=asked.completion_tokens,
                    estimated=asked.estimated,
                )
            finally:
                with self._lock:
                    self._reserved -= held
        with self._lock:
            self._failed_in_a_row = 0
            self._spent += 0.0 if cached else self._cost(reply)
            self.account.requests += not cached
            self.account.cached += cached
            self.account.prompt_tokens += reply.prompt_tokens
            self.account.completion_tokens += reply.completion_tokens
            self.account.estimated += reply.estimated
        return reply

    def _reserve(self, messages: list[Message]) -> float:
        """Set aside the most that this request may cost. Raises StoppedError where the budget lacks it."""
        most = price(self.config, 2 * estimated_tokens(messages), self.config.max_tokens)
        if self.config.max_cost is None or most is None:
            return 0.0
        with self._lock:
            fits = self._spent + self._reserved + most <= self.config.max_cost
            self._reserved += most if fits else 0.0
        if not fits:
            self._halt("budget")
            raise StoppedError
        return most

    def _count_failure(self) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            down = self._failed_in_a_row >= self.config.give_up_after
        if down:
            self._halt("down")
