"""The licence that a file beside the data names, as a suggestion: nobody but a person can say it holds."""

from __future__ import annotations

import re
from pathlib import Path

LEVELS = 4
LONGEST = 200_000
_NAMES = ("data_license", "data_licence", "license", "licence", "copying", "readme")
_TEXTS = (
    ("CC-BY-NC-SA-4.0", r"attribution-noncommercial-sharealike 4\.0"),
    ("CC-BY-NC-ND-4.0", r"attribution-noncommercial-noderivatives 4\.0"),
    ("CC-BY-NC-4.0", r"attribution-noncommercial 4\.0"),
    ("CC-BY-SA-4.0", r"attribution-sharealike 4\.0"),
    ("CC-BY-4.0", r"attribution 4\.0 international"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
    ("Apache-2.0", r"apache license,?\s+version 2\.0"),
    ("MIT", r"\bmit license\b|permission is hereby granted, free of charge"),
    ("AGPL-3.0", r"gnu affero general public license\s+version 3"),
    ("GPL-3.0", r"gnu general public license\s+version 3"),
    ("BSD-3-Clause", r"neither the name of .{0,200} may be used to endorse"),
    ("ODC-By-1.0", r"open data commons attribution license"),
)
_FRONT_MATTER = re.compile(r"\A---\n.*?^license:\s*([\w.+-]+)\s*$.*?^---$", re.MULTILINE | re.DOTALL)


def licence_beside(file: Path) -> tuple[str, Path] | None:
    """(licence, the file that names it): of the nearest folder, at most LEVELS up, that has such a file.

    A licence of the data goes before one of the code, and a file whose text is unknown does not count.
    """
    folder = file.absolute().parent
    for place in [folder, *folder.parents][:LEVELS]:
        for name in _NAMES:
            for beside in sorted(place.glob("*")):
                if beside.is_file() and beside.name.lower().split(".")[0] == name and beside != file:
                    found = _named(beside)
                    if found:
                        return found, beside
    return None


def _named(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(LONGEST)
    except OSError:
        return None
    matter = _FRONT_MATTER.match(text)
    if matter:
        return matter.group(1)
    words = " ".join(text.lower().split())
    if file.name.lower().startswith("readme"):
        return None
    return next((name for name, pattern in _TEXTS if re.search(pattern, words)), None)
