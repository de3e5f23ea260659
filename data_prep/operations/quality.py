"""Quality rules over the answers: a row that fails one is tagged with its name, or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_prep.operations.base import Dropped, Kept, Row, tagged
from data_prep.operations.parts import Part, part_texts
from data_prep.operations.quality_rules import RULES, Measured


@dataclass(frozen=True)
class Quality:
    """Row-local. rules: names in RULES; bounds: other bounds than theirs, by name."""

    rules: Sequence[str]
    bounds: Mapping[str, float] = field(default_factory=dict)
    action: Literal["tag", "drop"] = "tag"
    part: Part = "answer"

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Tags `quality`, the rules that any text of the part fails; drops with the first one as reason."""
        return [self._one(row) for row in batch]

    def _one(self, row: Row) -> Kept | Dropped:
        failed: dict[str, float] = {}
        for text in part_texts(row.record, self.part):
            measured = Measured(text)
            for name in self.rules:
                passes, value = RULES[name].passes(measured, self.bounds.get(name))
                if not passes:
                    failed.setdefault(name, float(value))
        if not failed:
            return Kept(row.record)
        if self.action == "drop":
            name, value = next((name, failed[name]) for name in self.rules if name in failed)
            return Dropped(name, f"{RULES[name].what}: {value:.4g}")
        return Kept(tagged(row.record, quality=sorted(failed)), tuple(failed))
