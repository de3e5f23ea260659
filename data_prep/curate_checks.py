"""What makes the curate stage fail once rows are read: too many unusable ones, none left, an empty side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data_prep.dataset import SPLITS, Split
from posttrain.errors import DataError

if TYPE_CHECKING:
    from data_prep.config import CurateConfig
    from data_prep.ingest import SourceReport
    from data_prep.operations.engine import Tally

FILTERED = ("duplicate", "too_short", "too_long")
"""Drops that filters and dedup make. Every other reason is a row that could not be used: a reject."""


def check_read(config: CurateConfig, sources: Sequence[SourceReport], read: Tally) -> None:
    """Raises DataError when there are no rows, or too many unusable ones. read: of all rows."""
    total = sum(source.rows for source in sources)
    if total == 0:
        raise DataError(f"{_names(sources)}: no rows\n    give files that hold rows")
    rejects = {reason: count for reason, count in read.drops.items() if reason not in FILTERED}
    if sum(rejects.values()) > config.max_reject_fraction * total:
        raise DataError(_too_many_rejects(config, rejects, read, total))


def check_left(
    config: CurateConfig, sources: Sequence[SourceReport], left: int, drops: Mapping[str, int]
) -> None:
    """Raises DataError when no row is left. drops: by reason."""
    if left:
        return
    said = ", ".join(f"{reason} {count:,}" for reason, count in sorted(drops.items()))
    what = "`filters` or `operations`" if config.operations else "`filters`"
    total = sum(source.rows for source in sources)
    raise DataError(
        f"{_names(sources)}: none of the {total:,} rows is left ({said})\n"
        f"    relax {what}, or give other sources"
    )


def _names(sources: Sequence[SourceReport]) -> str:
    return ", ".join(source.name for source in sources)


def _too_many_rejects(config: CurateConfig, rejects: Mapping[str, int], read: Tally, total: int) -> str:
    common = sorted(rejects.items(), key=lambda at: -at[1])
    lines = [
        f"{sum(rejects.values()):,} of {total:,} rows cannot be used, "
        f"more than max_reject_fraction {config.max_reject_fraction} allows"
    ]
    for reason, count in common[:8]:
        at = read.first[reason]
        lines.append(f"    {reason} ({count:,}), first at {at.file}:{at.line}: {at.detail}")
    lines.append(f"    row: {read.first[common[0][0]].excerpt}")
    lines.append("    correct the rows, or raise max_reject_fraction to drop and count them")
    return "\n".join(lines)


def check_split(config: CurateConfig, rows: Mapping[Split, int], groups: Mapping[Split, int]) -> None:
    """Raises DataError when all rows landed on one side."""
    for split in SPLITS:
        if rows[split]:
            continue
        several = sum(groups.values())
        remedy = (
            "a split by group needs several groups: give more varied rows, or set split.by: record"
            if several < 2
            else f"{'raise' if split == 'eval' else 'lower'} split.eval_fraction, "
            "change split.salt, or give more rows"
        )
        raise DataError(
            f"split.eval_fraction {config.split.eval_fraction} leaves the {split} side empty: "
            f"all {sum(rows.values()):,} rows ({several:,} groups) fall on the other\n    {remedy}"
        )
