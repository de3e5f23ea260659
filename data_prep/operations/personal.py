"""Personal data and secrets that have a form of their own: found, redacted, or a reason to drop the row.

What is found and what cannot be (names of people, addresses, organisations) is in ``data_prep/pii.py``. With
`redact` and `drop` nothing found stays in the row: its texts, its meta, its id and group. The same rules then
clean what the stage writes of rows that were dropped (`scrubber`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_prep.operations.base import Dropped, Kept, Row, tagged
from data_prep.operations.parts import with_texts
from data_prep.pii import RULES, Redactor, Rule, Search
from data_prep.records import InvalidRecord, Record

Action = Literal["find", "redact", "drop"]


@dataclass(frozen=True)
class PersonalData:
    """Row-local. find tags types with counts; redact replaces what was found by pseudonyms as [EMAIL_1].

    key: of the hashes that stand for ids and groups; without one they are plain, and a value of few digits
    can be guessed from them.
    """

    action: Action = "redact"
    rules: Sequence[Rule] = RULES
    searches: Sequence[Search] = ()
    key: bytes = b""

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Tags `pii` {type: count}; drops personal_data."""
        return [self._one(row) for row in batch]

    def _one(self, row: Row) -> Kept | Dropped:
        redactor = Redactor(self.rules, self.searches)
        try:
            record = _redacted(row.record, redactor, self.key)
        except InvalidRecord as error:
            return Dropped(error.reason, f"after its redaction: {error}")
        counts = dict(sorted(redactor.counts.items()))
        if not counts:
            return Kept(row.record)
        said = ", ".join(f"{type} {count}" for type, count in counts.items())
        if self.action == "drop":
            return Dropped("personal_data", said)
        kept = row.record if self.action == "find" else record
        return Kept(tagged(kept, pii=counts), tuple(f"with {type}" for type in counts))


def _redacted(record: Record, redactor: Redactor, key: bytes) -> Record:
    record = with_texts(record, redactor.redact)
    before = json.loads(record.meta)
    after = _walk(before, redactor.redact)
    tags = before.get("tags")
    for name in CLUSTER_TAGS:
        if isinstance(tags, dict) and isinstance(tags.get(name), str):
            after["tags"][name] = _nameless(tags[name], redactor, key)
    meta = json.dumps(after, ensure_ascii=False, sort_keys=True)
    id, group = _nameless(record.id, redactor, key), _nameless(record.group, redactor, key)
    return replace(record, id=id, group=group, meta=meta if redactor.counts else record.meta)


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its texts changed; a whole number that the change does not leave becomes a text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _walk(item, change) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        after = change(str(value))
        return value if after == str(value) else after
    return value


CLUSTER_TAGS = ("cluster", "semantic_cluster")
"""Tags that are the id of another row: they become what that id becomes."""
_NUMBERED = re.compile("(.+)(-[0-9]+)", re.DOTALL)


def _nameless(name: str, redactor: Redactor, key: bytes) -> str:
    """An id or group that is personal data (an e-mail address) as a hash: equal ones stay equal.

    The number that makes a repeated id unique ("ann@shop.example-1") is kept, and hides nothing.
    """
    whole = redactor.find(name)
    numbered = None if whole else _NUMBERED.fullmatch(name)
    base, number = numbered.groups() if numbered else (name, "")
    findings = whole or (redactor.find(base) if number else [])
    if not findings:
        return name
    redactor.counts.update(finding.type for finding in findings)
    encoded = base.encode()
    digest = hmac.new(key, encoded, hashlib.sha256) if key else hashlib.sha256(encoded)
    return digest.hexdigest()[:16] + number


NOT_SHOWN = "(not shown: it is cut, and could not be redacted whole)"


@dataclass(frozen=True)
class Scrubber:
    """Cleans what reports show of rows as these operations clean the rows themselves."""

    operations: tuple[PersonalData, ...]

    def __call__(self, text: str) -> str:
        """The text redacted. A text that was cut ("...") is not shown at all: what is left of a secret may
        have lost its form.
        """
        if "..." in text:
            return NOT_SHOWN
        return self._redactor().redact(text)

    def row(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row with all of their texts redacted, those inside meta too."""
        redact = self._redactor().redact

        def cleaned(name: str, value: Any) -> Any:
            if name in ("id", "group"):
                return self.name(value)
            if name == "meta":
                return json.dumps(_walk(json.loads(value), redact), ensure_ascii=False, sort_keys=True)
            if isinstance(value, list):
                return [{key: redact(text) for key, text in turn.items()} for turn in value]
            return redact(value) if isinstance(value, str) else value

        return {name: cleaned(name, value) for name, value in columns.items()}

    def _redactor(self) -> Redactor:
        """By the rules of all operations."""
        rules = tuple(dict.fromkeys(rule for each in self.operations for rule in each.rules))
        searches = tuple(dict.fromkeys(search for each in self.operations for search in each.searches))
        return Redactor(rules, searches)

    def name(self, id: str) -> str:
        """The id as it is, or will be, in the data set."""
        for each in self.operations:
            id = _nameless(id, Redactor(each.rules, each.searches), each.key)
        return id


def scrubber(operations: Sequence[Any]) -> Scrubber | None:
    """What cleans reports by the rules of all operations that redact or drop; None without any."""
    redacting = tuple(
        operation
        for operation in operations
        if isinstance(operation, PersonalData) and operation.action != "find"
    )
    return Scrubber(redacting) if redacting else None
