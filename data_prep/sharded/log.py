"""What is said of the rows of one chunk: lines of rejects.jsonl and review.jsonl, and a tally a step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_prep.ingest import Reject
from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.engine import EXAMPLE_CHARS, REVIEW_CHARS, Tally
from data_prep.operations.personal import Scrubber
from data_prep.records import excerpt


def line_of(value: Any) -> str:
    """A line of a file of JSON lines."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def cleaned(at: Reject, clean: Scrubber | None) -> Reject:
    """A row that could not be read, with what is shown of it redacted where an operation redacts."""
    if clean is None:
        return at
    return replace(at, detail=clean(at.detail), excerpt=clean(at.excerpt))


@dataclass
class StepLog:
    """Of one step over one chunk. clean: redacts what is shown, None where no operation redacts."""

    clean: Scrubber | None
    examples: int = 0
    tally: Tally = field(default_factory=Tally)
    rejects: list[str] = field(default_factory=list)
    reviews: list[str] = field(default_factory=list)

    def show(self, text: str, limit: int) -> str:
        """The text shortened; where an operation redacts, it is redacted whole before it is cut."""
        if self.clean is None:
            return excerpt(text, limit)
        return excerpt(self.clean(text.replace("...", "\u2026")), limit)

    def dropped(self, row: Row, verdict: Dropped) -> None:
        """Note a row that goes, and keep it as an example while there are few."""
        text = self.show(row.record.turns()[0][1], EXAMPLE_CHARS)
        detail = self.clean(verdict.detail) if self.clean else verdict.detail
        self.rejected(Reject(row.file, row.line, verdict.reason, detail, text))
        shown = self.tally.examples.setdefault(verdict.reason, [])
        if len(shown) < self.examples:
            said = self.show(verdict.detail, EXAMPLE_CHARS)
            shown.append({"at": f"{row.file}:{row.line}", "detail": said, "excerpt": text})

    def rejected(self, at: Reject) -> None:
        """Note a line of rejects.jsonl as it is."""
        self.tally.drop(at)
        self.rejects.append(line_of(asdict(at)))

    def reviewed(self, row: Row, verdict: Kept) -> None:
        """Note a line of review.jsonl."""
        said = {
            key: self.show(value, REVIEW_CHARS) if isinstance(value, str) else value
            for key, value in (verdict.review or {}).items()
        }
        id = self.clean.name(verdict.record.id) if self.clean else verdict.record.id
        self.reviews.append(line_of({"file": row.file, "line": row.line, "id": id, **said}))
