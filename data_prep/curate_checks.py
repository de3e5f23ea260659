"""What makes the curate stage fail once rows are read: too many unusable ones, none left, an empty side."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from data_prep.dataset import SPLITS
from data_prep.ingest import Reject
from posttrain.errors import DataError

if TYPE_CHECKING:
    from data_prep.config import CurateConfig
    from data_prep.curate import Curated

FILTERED = ("duplicate", "too_short", "too_long")
"""Drops that filters and dedup make. Every other reason is a row that could not be used: a reject."""


def check_rows(config: CurateConfig, curated: Curated) -> None:
    """Raises DataError when there are no rows, too many unusable ones, or none left."""
    total, names = curated.rows_in, ", ".join(source.name for source in curated.sources)
    if total == 0:
        raise DataError(f"{names}: no rows\n    give files that hold rows")
    rejects = [drop for drop in curated.dropped if drop.reason not in FILTERED]
    if len(rejects) > config.max_reject_fraction * total:
        raise DataError(_too_many_rejects(config, rejects, total))
    if not curated.pending and not any(curated.rows.values()):
        drops = ", ".join(f"{reason} {count:,}" for reason, count in curated.drops.items())
        what = "`filters` or `operations`" if config.operations else "`filters`"
        raise DataError(
            f"{names}: none of the {total:,} rows is left ({drops})\n    relax {what}, or give other sources"
        )


def _too_many_rejects(config: CurateConfig, rejects: list[Reject], total: int) -> str:
    counts = Counter(reject.reason for reject in rejects)
    first = {reason: next(reject for reject in rejects if reject.reason == reason) for reason in counts}
    lines = [
        f"{len(rejects):,} of {total:,} rows cannot be used, "
        f"more than max_reject_fraction {config.max_reject_fraction} allows"
    ]
    for reason, count in counts.most_common(8):
        at = first[reason]
        lines.append(f"    {reason} ({count:,}), first at {at.file}:{at.line}: {at.detail}")
    lines.append(f"    row: {first[counts.most_common(1)[0][0]].excerpt}")
    lines.append("    correct the rows, or raise max_reject_fraction to drop and count them")
    return "\n".join(lines)


def check_split(config: CurateConfig, curated: Curated) -> None:
    """Raises DataError when all rows landed on one side."""
    for split in SPLITS:
        if curated.rows[split]:
            continue
        rows = [row for others in curated.rows.values() for row in others]
        groups = len({row["group"] for row in rows})
        remedy = (
            "a split by group needs several groups: give more varied rows, or set split.by: record"
            if groups < 2
            else f"{'raise' if split == 'eval' else 'lower'} split.eval_fraction, "
            "change split.salt, or give more rows"
        )
        raise DataError(
            f"split.eval_fraction {config.split.eval_fraction} leaves the {split} side empty: "
            f"all {len(rows):,} rows ({groups:,} groups) fall on the other\n    {remedy}"
        )
