"""Which format the rows of a file are in, by the fields of the first of them, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.formats import FORMATS, candidates
from data_prep.records import ConversationRecord, InvalidRecord, Kind
from data_prep.turns import Row
from posttrain.errors import DataError

LOOKED_AT = 100


@dataclass(frozen=True)
class Detection:
    """format: what was chosen; fits: how many of `rows` looked at have its fields; others: what else."""

    format: str
    fits: int
    rows: int
    others: dict[str, int]

    def why(self) -> str:
        """The reason, in words."""
        needs = FORMATS[self.format].needs
        text = f"{self.format}, because {self.fits:,} of the first {self.rows:,} rows have {needs}"
        if self.others:
            rest = ", ".join(f"{count:,} {name}" for name, count in self.others.items())
            text += f"; the others: {rest}"
        return text


def detect_rows(rows: Sequence[tuple[int, Row]], place: str, kind: Kind | None = None) -> Detection:
    """The format of most of these (line, row) pairs, at equal numbers that of the first.

    Where any of them is a labelled answer it is unpaired_preference.
    Raises DataError: no row fits a format; rows hold several conversations that differ.
    """
    counts: Counter[str] = Counter()
    for line, row in rows:
        found = candidates(row, kind)
        if len(found) > 1 and _differ(row, found):
            raise DataError(
                f"{place}:{line}: ambiguous, the row can be read as {' and as '.join(found)}, "
                "and they differ\n"
                "    set `format` to the one that is meant"
            )
        counts[found[0] if found else ""] += 1
    known = [(name, count) for name, count in counts.most_common() if name]
    if not known:
        raise DataError(unknown_format(place, *rows[0]))
    # Rows with a label among others: without it, bad answers would become demonstrations.
    chosen, fits = next((pair for pair in known if pair[0] == "unpaired_preference"), known[0])
    others = {name or "no known format": count for name, count in counts.items() if name != chosen}
    return Detection(chosen, fits, len(rows), others)


def _differ(row: Row, names: list[str]) -> bool:
    """Whether the formats make different turns of the row; one that cannot read it does not count."""
    read = set()
    for name in names:
        try:
            record = FORMATS[name].parse(row)
        except InvalidRecord:
            continue
        read.add(tuple(record.turns()) if isinstance(record, ConversationRecord) else record.turns()[0][1])
    return len(read) > 1


def unknown_format(place: str, line: int, row: Row) -> str:
    """The message for a row whose fields fit no format."""
    needs = "\n".join(f"      {name}: {form.needs}" for name, form in FORMATS.items())
    fields = ", ".join(map(str, row)) or "none"
    return (
        f"{place}:{line}: cannot tell the format from the fields {fields}\n"
        f"    set `format`, and `columns` to rename fields; `posttrain data doctor` suggests them. "
        f"What each format needs:\n{needs}"
    )
