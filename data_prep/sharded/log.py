"""What is said of the rows of one chunk: lines of rejects.jsonl, review.jsonl and rejected.jsonl, and a tally
a step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_prep.dataset import to_row
from data_prep.ingest import Reject
from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.engine import EXAMPLE_CHARS, REVIEW_CHARS, Tally
from data_prep.operations.personal import Scrubber
from data_prep.operations.view_columns import place
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
    """Of one step over one chunk. clean: redacts what is shown, None where no operation redacts.

    step, operation: its number and name for rejected.jsonl; full: whether dropped rows are written there.
    """

    clean: Scrubber | None
    examples: int = 0
    step: int = 0
    operation: str = ""
    full: bool = False
    tally: Tally = field(default_factory=Tally)
    rejects: list[str] = field(default_factory=list)
    reviews: list[str] = field(default_factory=list)
    dropped_rows: list[str] = field(default_factory=list)

    def show(self, text: str, limit: int) -> str:
        """The text shortened; where an operation redacts, it is redacted whole before it is cut."""
        if self.clean is None:
            return excerpt(text, limit)
        return excerpt(self.clean(text.replace("...", "\u2026")), limit)

    def dropped(self, row: Row, verdict: Dropped) -> None:
        """Note a row that goes, and keep it as an example while there are few."""
        text = self.show(row.record.turns()[0][1], EXAMPLE_CHARS)
        detail = self.clean(verdict.detail) if self.clean else verdict.detail
        reject = Reject(row.file, row.line, verdict.reason, detail, text)
        self.rejected(reject, self.in_full(row, reject, self.operation))
        shown = self.tally.examples.setdefault(verdict.reason, [])
        if len(shown) < self.examples:
            said = self.show(verdict.detail, EXAMPLE_CHARS)
            shown.append({"at": place(row), "detail": said, "excerpt": text})

    def rejected(self, at: Reject, in_full: str | None = None) -> None:
        """Note a line of rejects.jsonl as it is, and that of rejected.jsonl."""
        self.tally.drop(at)
        self.rejects.append(line_of(asdict(at)))
        if in_full is not None:
            self.dropped_rows.append(in_full)

    def in_full(self, row: Row, at: Reject, operation: str) -> str | None:
        """The line of rejected.jsonl for a row; None where that is not written. at: cleaned already."""
        if not self.full:
            return None
        columns = to_row(row.record)
        return line_of(
            {
                "file": at.file,
                "line": at.line,
                "step": self.step,
                "operation": operation,
                "reason": at.reason,
                "detail": at.detail,
                "row": self.clean.row(columns) if self.clean else columns,
            }
        )

    def reviewed(self, row: Row, verdict: Kept) -> None:
        """Note a line of review.jsonl."""
        said = {
            key: self.show(value, REVIEW_CHARS) if isinstance(value, str) else value
            for key, value in (verdict.review or {}).items()
        }
        id = self.clean.name(verdict.record.id) if self.clean else verdict.record.id
        self.reviews.append(line_of({"file": row.file, "line": row.line, "id": id, **said}))
