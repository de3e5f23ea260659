"""Which licences allow commercial use, by their SPDX identifiers; and what a mix of several comes to.

A table of names, not legal advice: terms beyond the licence (personal data, the terms of the service that
wrote the answers) are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_COMMERCIAL = re.compile(
    r"generated|apache-2\.0|mit(-0)?|bsd-[234]-clause.*|isc|zlib|unlicense|0bsd|wtfpl|cc0-1\.0|pddl(-1\.0)?|odc-by(-1\.0)?"
    r"|odbl(-1\.0)?|cc-by(-sa|-nd)?-[1-4]\.[05]|cdla-(permissive|sharing)-[12]\.0|public-domain"
    r"|(a|l)?gpl-[23]\.[01](-only|-or-later)?|mpl-2\.0|epl-2\.0|ecl-2\.0|etalab-2\.0|bsl-1\.0"
)
_NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research-only|academic")
_SHARE_ALIKE = re.compile(r"cc-by-sa-|odbl|cdla-sharing|(^|[^a-z])[al]?gpl-")


def _plain(licence: str) -> str:
    return re.sub(r"[\s_]+", "-", licence.strip().lower())


def commercial_problem(licence: str | None, allowed: Sequence[str] = ()) -> str | None:
    """Why a source of this licence cannot be in a commercial mix; None when it can."""
    if licence is None:
        return "it has no `licence`; look it up and write it down"
    if _plain(licence) in map(_plain, allowed):
        return None
    if _NON_COMMERCIAL.search(_plain(licence)):
        return f"licence {licence} is non-commercial; leave the source out"
    if not _COMMERCIAL.fullmatch(_plain(licence)):
        return f"licence {licence} is not known to allow it; if it does, name it in `commercial_licences`"
    return None


def roll_up(sources: Sequence[tuple[str, str | None]], rows: Mapping[str, int]) -> dict[str, Any]:
    """What dataset.json says of licences. sources: (name, licence); rows: of each name in the data set.

    commercial: whether every licence is one that is known to allow it.
    """
    used = [(name, licence) for name, licence in sources if rows.get(name)]
    by_licence: dict[str, int] = {}
    for name, licence in dict.fromkeys(used):
        by_licence[licence or "unknown"] = by_licence.get(licence or "unknown", 0) + rows[name]
    return {
        "rows_by_licence": dict(sorted(by_licence.items())),
        "commercial": all(commercial_problem(licence) is None for _, licence in used),
        "share_alike": sorted(
            {licence for _, licence in used if licence and _SHARE_ALIKE.search(_plain(licence))}
        ),
    }
