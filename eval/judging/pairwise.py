"""A language model as a judge: what it is asked about each comparison, and what its replies amount to.

A comparison is asked twice, with the answers in both orders. The winner is the answer that both orders name;
where the orders disagree, or either says tie, it is a tie. If either reply cannot be used the comparison has
no outcome: it is counted by its reason and is nobody's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Template

from eval.judging.asking import STATUSES, Account, Asked, Asker, Said, Status
from eval.judging.config import EndpointJudge
from eval.judging.contest import Match, Question
from eval.judging.request import estimated_tokens
from eval.judging.templates import Message, bundled, load_template, render

IDENTICAL = "the answers are the same text"
REPLY_TOKENS = 60
"""Tokens of a reply in an estimate: a verdict and a sentence or two."""


@dataclass(frozen=True)
class Judgement:
    """One judge's word on one comparison. outcome: of `first`, 1 won, 0.5 tied, 0 lost, None: no verdict.

    orders: for a language model, what was said with `first` standing first and with it standing second, as
    outcomes of `first`. choice: of a person's vote. scores: of a judge that scores answers one by one.
    """

    match: Match
    outcome: float | None
    status: Status = "ok"
    detail: str = ""
    orders: tuple[float | None, ...] = ()
    reasons: tuple[str, ...] = ()
    scores: tuple[float, float] | None = None
    annotator: str | None = None
    choice: str | None = None

    def as_row(self, judge: str) -> dict[str, Any]:
        """A line of judgements.jsonl."""
        question = self.match.question
        row: dict[str, Any] = {
            "judge": judge,
            "id": question.id,
            "category": question.category,
            "first": self.match.first,
            "second": self.match.second,
            "outcome": self.outcome,
            "status": self.status,
        }
        optional = {
            "detail": self.detail,
            "orders": list(self.orders),
            "reasons": list(self.reasons),
            "scores": self.scores,
            "annotator": self.annotator,
            "choice": self.choice,
        }
        return row | {key: value for key, value in optional.items() if value}


@dataclass
class Requests:
    """What has to be asked: by match key the request hashes of both orders (or of both answers), none for
    identical answers; and the messages of every request."""

    by_match: dict[tuple[str, str, str], tuple[str, ...]] = field(default_factory=dict)
    messages: dict[str, list[Message]] = field(default_factory=dict)


class LanguageModelJudge:
    """Makes the requests of an endpoint judge and reads its replies back into judgements."""

    def __init__(self, config: EndpointJudge, asker: Asker) -> None:
        self.config = config
        self._asker = asker
        own = load_template(Path(config.template).expanduser()) if config.template is not None else None
        self._plain = own or bundled(config.method)
        self._reference = own or (bundled("reference") if config.method == "pairwise" else self._plain)

    def requests(self, matches: Sequence[Match]) -> Requests:
        """Everything to ask about the matches, each request once."""
        found = Requests()
        for match in matches:
            first, second = match.answers
            if first.turns == second.turns:
                found.by_match[match.key] = ()
                continue
            if self.config.method == "rating":
                sides = [[first.shown], [second.shown]]
            else:
                sides = [[first.shown, second.shown], [second.shown, first.shown]]
            hashes = []
            for shown in sides:
                messages = self._messages(match.question, shown)
                hashes.append(self._asker.request_hash(messages))
                found.messages.setdefault(hashes[-1], messages)
            found.by_match[match.key] = tuple(hashes)
        return found

    def _messages(self, question: Question, answers: Sequence[str]) -> list[Message]:
        reference = question.reference if self.config.use_references else None
        template: Template = self._plain if reference is None else self._reference
        return render(template, question.conversation, answers, reference)

    def judge(
        self,
        matches: Sequence[Match],
        requests: Requests,
        on_answer: Callable[[Account], Any] = lambda account: None,
    ) -> tuple[list[Judgement], Asked]:
        """Ask, and one judgement per match in their order."""
        asked = self._asker.ask_all(requests.messages, on_answer)
        combine = _from_ratings if self.config.method == "rating" else _from_orders
        judgements = []
        for match in matches:
            hashes = requests.by_match[match.key]
            if not hashes:
                judgements.append(Judgement(match, 0.5, detail=IDENTICAL))
            else:
                judgements.append(combine(match, [asked.said[request] for request in hashes]))
        return judgements, asked


def _unusable(match: Match, said: Sequence[Said]) -> Judgement | None:
    """The judgement without an outcome when a reply cannot be used, by the gravest reason; else None."""
    worst = max(said, key=lambda one: STATUSES.index(one.status))
    if worst.status == "ok":
        return None
    return Judgement(match, None, worst.status, worst.detail, reasons=tuple(one.reply for one in said))


def _from_orders(match: Match, said: Sequence[Said]) -> Judgement:
    unusable = _unusable(match, said)
    forward, backward = ({"A": 1.0, "tie": 0.5, "B": 0.0}.get(str(one.value)) for one in said)
    orders = (forward, None if backward is None else 1.0 - backward)
    reasons = tuple(one.reason for one in said)
    if unusable is not None:
        return Judgement(match, None, unusable.status, unusable.detail, orders, unusable.reasons)
    outcome = orders[0] if orders[0] == orders[1] else 0.5
    return Judgement(match, outcome, orders=orders, reasons=reasons)


def _from_ratings(match: Match, said: Sequence[Said]) -> Judgement:
    unusable = _unusable(match, said)
    if unusable is not None:
        return unusable
    first, second = (float(one.value or 0.0) for one in said)
    outcome = 0.5 if first == second else float(first > second)
    return Judgement(match, outcome, scores=(first, second), reasons=tuple(one.reason for one in said))


def estimate(requests: Requests, asker: Asker) -> dict[str, Any]:
    """Requests, tokens and cost of asking, by what the store has not got; tokens from bytes."""
    missing = [messages for key, messages in requests.messages.items() if asker.store.get(key) is None]
    prompt = sum(estimated_tokens(messages) for messages in missing)
    likely, most = len(missing) * REPLY_TOKENS, len(missing) * asker.config.max_tokens
    return {
        "requests": len(missing),
        "cached": len(requests.messages) - len(missing),
        "prompt_tokens": prompt,
        "completion_tokens": likely,
        "cost": asker.price(prompt, likely),
        "cost_at_most": asker.price(prompt, most),
        "method": f"bytes of UTF-8 / 4; {REPLY_TOKENS} tokens a reply, at most max_tokens; no second asking",
    }
