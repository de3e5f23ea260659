"""Personal data and secrets that have a form of their own: found by patterns and checksums, and redacted.

Found (TYPES): e-mail addresses, phone numbers, card numbers (Luhn), IBANs (checksum), US social security
numbers, IP addresses (v4, v6), URLs with a password, keys and tokens (AWS, Google Cloud, Azure, GitHub,
Slack, OpenAI and those written alike, Hugging Face, this gateway's, JSON web tokens) and private keys in PEM
blocks.

Not found, because no pattern tells them from other words: **names of people, postal addresses,
organisations, dates of birth, account and passport numbers, user names, and passwords in prose**. A text
without findings may still name a person.

    redactor = Redactor()
    redactor.redact("Ask ann@shop.example, 541-714-1388")  # "Ask [EMAIL_1], [PHONE_1]"
    redactor.counts  # {"EMAIL": 1, "PHONE": 1}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from data_prep.pii_patterns import OPTIONAL, RULES, TYPES, Rule
from posttrain.errors import UserError

__all__ = ["OPTIONAL", "RULES", "TYPES", "Finding", "Redactor", "Rule", "Search", "custom_rules", "find"]

_DIGIT = re.compile("[0-9]")
_TYPE = re.compile("[A-Z][A-Z0-9_]{0,31}")
_SPACING = re.compile(r"[\s().-]")
_SPACED = frozenset({"PHONE", "CREDIT_CARD", "IBAN", "SSN"})
"""Types whose values are the same however they are grouped."""


Search = Callable[[str], Iterable[tuple[int, int, str]]]
"""A search beside the rules: (start, end, type) of what it finds in a text (`data_prep.pii_presidio`)."""


@dataclass(frozen=True)
class Finding:
    """text[start:end] is of this type."""

    type: str
    start: int
    end: int


def find(text: str, rules: Sequence[Rule] = RULES, searches: Sequence[Search] = ()) -> list[Finding]:
    """What the rules, and then the searches, find, from left to right. Findings do not overlap.

    Of two that do, one finding is made that covers both and has the type of the earlier rule: nothing found
    is left out.
    """
    hits: list[tuple[int, int, int]] = []
    types = [rule.type for rule in rules]
    digits = _DIGIT.search(text) is not None
    for rank, rule in enumerate(rules):
        if not (any(hint in text for hint in rule.hints) if rule.hints else digits):
            continue
        for match in rule.pattern.finditer(text):
            span = rule.check(match)
            if span is not None:
                hits.append((*span, rank))
    for search in searches:
        for start, end, type in search(text):
            types.append(type)
            hits.append((start, end, len(types) - 1))
    return [Finding(types[rank], start, end) for start, end, rank in _merged(hits)]


def _merged(hits: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    merged: list[tuple[int, int, int]] = []
    for start, end, rank in sorted(hits):
        if merged and start < merged[-1][1]:
            before = merged[-1]
            merged[-1] = (before[0], max(before[1], end), min(before[2], rank))
        else:
            merged.append((start, end, rank))
    return merged


def custom_rules(patterns: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules of one's own, by type ("TICKET"): regular expressions of Python, whose last group that took
    part, if there is one, is the value. They are tried on every text, and nothing bounds how long they take.

    Raises UserError: a type that is no capital word, a pattern that is none or that matches an empty text.
    """
    rules = []
    for type, pattern in patterns.items():
        if not _TYPE.fullmatch(type):
            raise UserError(f"{type!r}: is no type\n    write it in capital letters, for example CUSTOMER_ID")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"{type}: {pattern!r} is no regular expression ({error})") from error
        if compiled.match(""):
            raise UserError(f"{type}: {pattern!r} matches an empty text\n    let it ask for a character")
        rules.append(Rule(type, compiled, hints=("",)))
    return tuple(rules)


class Redactor:
    """Replaces findings by pseudonyms, such as [EMAIL_1], in the texts of one record.

    One redactor per record: the same value has the same number in all its texts, and numbers tell nothing
    about other records. counts: findings by type so far.
    """

    def __init__(self, rules: Sequence[Rule] = RULES, searches: Sequence[Search] = ()) -> None:
        self.rules = rules
        self.searches = searches
        self.counts: Counter[str] = Counter()
        self._numbers: dict[tuple[str, str], int] = {}
        self._values: Counter[str] = Counter()

    def find(self, text: str) -> list[Finding]:
        """What is replaced in the text, from left to right."""
        return find(text, self.rules, self.searches)

    def redact(self, text: str) -> str:
        """The text with every finding replaced."""
        findings = self.find(text)
        if not findings:
            return text
        parts, done = [], 0
        for finding in findings:
            parts += [
                text[done : finding.start],
                self._pseudonym(finding.type, text[finding.start : finding.end]),
            ]
            done = finding.end
            self.counts[finding.type] += 1
        return "".join([*parts, text[done:]])

    def _pseudonym(self, type: str, value: str) -> str:
        value = _SPACING.sub("", value) if type in _SPACED else value
        key = (type, value.casefold() if type in ("EMAIL", "IBAN", "IP") else value)
        if key not in self._numbers:
            self._values[type] += 1
            self._numbers[key] = self._values[type]
        return f"[{type}_{self._numbers[key]}]"
