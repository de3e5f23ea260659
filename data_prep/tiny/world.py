"""The support-desk world: a seeded generator of dialogues whose answers a program can check.

A customer writes to a support desk; the system turn holds the desk's notes about one or two orders, and the
answer must use the right ones. Sentences are put together from a grammar (`lexicon`), so there are millions
of distinct dialogues over 1,600 customers, 240 order codes, 24 products and six requests, one in four with a
follow-up turn.

Demonstrations are of mixed quality on purpose: they carry the defects that reward modelling and preference
optimisation should then remove (a wrong or missing order code, another customer's data, rudeness, rambling,
an evasive answer, no proper ending).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_prep.records import ConversationRecord, Message, PreferenceRecord, PromptRecord, Record
from data_prep.tiny import lexicon, rubric

DEFECTS = (
    "rude",
    "rambling",
    "evasive",
    "wrong_code",
    "missing_code",
    "leak",
    "no_greeting",
    "unfinished",
)
DEFECT_WEIGHTS = {"rude": 2, "rambling": 2, "no_greeting": 2, "unfinished": 2}
"""How much more often than the others a defect of manner is drawn: this desk's manners are worse than its
knowledge.
"""
MIXED_DEFECT_COUNTS = (0.30, 0.35, 0.25, 0.10)
"""Probability that a demonstration of mixed quality has 0, 1, 2 or 3 defects."""
BUCKETS = 100
"""Customers fall into this many groups; a dialogue only ever names customers of one group, so a split by
group holds out customers completely: their names are in no training row, base corpus included."""

_ALL_CUSTOMERS = [f"{first} {last}" for first in lexicon.FIRST_NAMES for last in lexicon.LAST_NAMES]


def _customer_buckets() -> list[list[str]]:
    customers = list(_ALL_CUSTOMERS)
    random.Random("support_desk customers").shuffle(customers)
    return [customers[start::BUCKETS] for start in range(BUCKETS)]


_CUSTOMERS = _customer_buckets()


def generate(
    kind: str,
    rows: int,
    seed: int,
    *,
    quality: str = "mixed",
    label_noise: float = 0.1,
    min_gap: float = 0.1,
    follow_up: float = 0.25,
) -> Iterator[Record]:
    """Yield ``rows`` records of one kind.

    Args:
        kind: ``conversation`` (demonstrations), ``preference`` (pairs of answers to one prompt) or
            ``prompt``.
        rows: how many records.
        seed: the same seed gives the same records.
        quality: of the answers in ``conversation``: ``clean`` has no defects, ``mixed`` follows
            `MIXED_DEFECT_COUNTS`.
        label_noise: share of preference pairs whose label is flipped against the gold rubric.
        min_gap: smallest difference in gold score of a preference pair: the imagined annotators are not
            asked about answers they could not tell apart.
        follow_up: share of dialogues with an earlier exchange before the request that counts.

    Raises:
        ValueError: unknown kind or quality, or a share outside [0, 1].
    """
    makers: dict[str, Callable[..., Record]] = {
        "conversation": _conversation,
        "preference": _preference,
        "prompt": _prompt,
    }
    if kind not in makers:
        raise ValueError(f"generator support_desk makes {', '.join(makers)}, not {kind!r}")
    if quality not in ("mixed", "clean"):
        raise ValueError(f"options.quality is {quality!r}: choose mixed or clean")
    for name, value, most in (
        ("label_noise", label_noise, 1.0),
        ("min_gap", min_gap, 0.4),
        ("follow_up", follow_up, 1.0),
    ):
        if not 0 <= value <= most:
            raise ValueError(f"options.{name} is {value}: choose from 0 to {most}")
    rng = random.Random(f"support_desk {kind} {seed}")
    for index in range(rows):
        bucket = rng.randrange(BUCKETS)
        facts, turns = _dialogue(rng, _CUSTOMERS[bucket], follow_up)
        prompt = tuple(turns)
        common = {
            "id": f"support-desk-{kind}-{seed}-{index}",
            "source": "support_desk",
            "group": f"customers-{bucket}",
        }
        yield makers[kind](
            rng, common, facts, prompt, quality=quality, label_noise=label_noise, min_gap=min_gap
        )


def _prompt(rng, common, facts, prompt, **_) -> PromptRecord:
    return PromptRecord(**common, meta=json.dumps({"facts": facts}), prompt=prompt)


def _conversation(rng, common, facts, prompt, *, quality: str, **_) -> ConversationRecord:
    defects = _draw_defects(rng) if quality == "mixed" else []
    answer = write_answer(rng, facts, defects)
    meta = json.dumps({"facts": facts, "defects": defects, "gold": rubric.score(answer, facts, True).total})
    messages = (*prompt, Message(role="assistant", content=answer))
    return ConversationRecord(**common, meta=meta, messages=messages)


def _preference(rng, common, facts, prompt, *, label_noise: float, min_gap: float, **_) -> PreferenceRecord:
    """Two answers to one prompt, at least ``min_gap`` apart; the label is flipped with ``label_noise``."""
    while True:
        answers = [write_answer(rng, facts, _draw_defects(rng)) for _ in range(2)]
        golds = [rubric.score(answer, facts, True).total for answer in answers]
        if abs(golds[0] - golds[1]) >= max(min_gap, 1e-6):
            break
    flipped = rng.random() < label_noise
    winner = int(golds[1] > golds[0])
    chosen = 1 - winner if flipped else winner
    meta = {
        "facts": facts,
        "gold_chosen": golds[chosen],
        "gold_rejected": golds[1 - chosen],
        "flipped": flipped,
    }
    return PreferenceRecord(
        **common,
        meta=json.dumps(meta),
        prompt=prompt,
        chosen=(Message(role="assistant", content=answers[chosen]),),
        rejected=(Message(role="assistant", content=answers[1 - chosen]),),
    )


def _draw_defects(rng: random.Random) -> list[str]:
    count = rng.choices(range(len(MIXED_DEFECT_COUNTS)), MIXED_DEFECT_COUNTS)[0]
    weights = [DEFECT_WEIGHTS.get(defect, 1) for defect in DEFECTS]
    return list(dict.fromkeys(rng.sample(DEFECTS, count, counts=weights)))


def _dialogue(
    rng: random.Random, customers: Sequence[str], follow_up: float
) -> tuple[dict[str, Any], list[Message]]:
    """One customer's request: the facts an answer is judged by, and the turns that lead up to it."""
    orders = _orders(rng, customers)
    facts = {**orders[0], "others": orders[1:]}
    rng.shuffle(orders)
    notes = " ".join(rng.choice(lexicon.RECORD_FORMS).format(**order) for order in orders)
    prompt = [Message(role="system", content=notes)]
    intents = rng.sample(sorted(lexicon.INTENTS), 2)
    opening = rng.choice(lexicon.USER_OPENINGS).format(**facts) + " "
    if rng.random() < follow_up:
        first = {**facts, "intent": intents[1], "city": rng.choice(lexicon.CITIES)}
        prompt.append(Message(role="user", content=opening + _ask(rng, first)))
        prompt.append(Message(role="assistant", content=write_answer(rng, first, [])))
        opening = rng.choice(("And one more thing. ", "Also, ", "Next, ", ""))
    facts |= {"intent": intents[0], "city": rng.choice(lexicon.CITIES)}
    closing = rng.choice(lexicon.USER_CLOSINGS)
    prompt.append(Message(role="user", content=opening + _ask(rng, facts) + closing))
    return facts, prompt


def _orders(rng: random.Random, customers: Sequence[str]) -> list[dict[str, str]]:
    """The desk's notes: the customer's own order first, then none or one of somebody else."""
    count = rng.choice((1, 1, 2))
    names = rng.sample(list(customers), count)
    codes = rng.sample(lexicon.ORDER_CODES, count)
    products = rng.sample(lexicon.PRODUCTS, count)
    amounts = rng.sample(lexicon.AMOUNTS, count)
    due_dates = rng.sample(lexicon.DUE_DATES, count)
    return [
        {
            "name": names[i],
            "first": names[i].split()[0],
            "code": codes[i],
            "product": products[i],
            "amount": amounts[i],
            "due": due_dates[i],
        }
        for i in range(count)
    ]


def _ask(rng: random.Random, facts: dict[str, Any]) -> str:
    return rng.choice(lexicon.INTENTS[facts["intent"]]["ask"]).format(**facts)


def write_answer(rng: random.Random, facts: dict[str, Any], defects: Sequence[str]) -> str:
    """The desk's answer to a request, with the defects asked for (names from `DEFECTS`)."""
    said = dict(facts)
    if "wrong_code" in defects:
        said["code"] = rng.choice([code for code in lexicon.ORDER_CODES if code != facts["code"]])
    body = rng.choice(lexicon.INTENTS[facts["intent"]]["answer"])
    if "evasive" in defects:
        body = rng.choice(lexicon.EVASIONS)
    if "missing_code" in defects:
        body = _without_code(body)
    sentences = [_opening(rng, defects) + " " + body]
    if "leak" in defects:
        other = facts["others"][0] if facts["others"] else _stranger(rng, facts)
        sentences.append(f"{other['name']} has order {other['code']} with us.")
    if "rambling" in defects:
        sentences += rng.sample(lexicon.RAMBLINGS, rng.randint(2, 3))
    if "rude" in defects:
        sentences.append(rng.choice(lexicon.RUDE_CLOSINGS))
    elif rng.random() < 0.6:
        sentences.append(rng.choice(lexicon.POLITE_CLOSINGS))
    answer = _capitalise(" ".join(sentences).format(**said))
    if "unfinished" in defects:
        words = answer.split()
        answer = " ".join(words[: max(3, len(words) - rng.randint(1, 4))]).rstrip(".!?")
    return answer


def _capitalise(text: str) -> str:
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _opening(rng: random.Random, defects: Sequence[str]) -> str:
    if "no_greeting" in defects:
        return "{first},"
    return rng.choice(lexicon.RUDE_OPENINGS if "rude" in defects else lexicon.GREETINGS)


def _without_code(body: str) -> str:
    for phrase in (
        " from order {code}",
        ", order {code},",
        ", order {code}",
        " for order {code}",
        " on order {code}",
    ):
        body = body.replace(phrase, "")
    return body.replace("order {code}", "your order").replace("{code}", "it")


def _stranger(rng: random.Random, facts: dict[str, Any]) -> dict[str, str]:
    bucket = next(group for group in _CUSTOMERS if facts["name"] in group)
    name = rng.choice([customer for customer in bucket if customer != facts["name"]])
    code = rng.choice([code for code in lexicon.ORDER_CODES if code != facts["code"]])
    return {"name": name, "code": code}
