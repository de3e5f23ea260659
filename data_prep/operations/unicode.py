"""Text repaired: mojibake, composed characters, control characters, zero-width ones, line ends.

In this order, each counted by name: mojibake (ftfy's `fix_encoding`, extra `data`), line_ends (CR LF and
CR to LF), control (C0, C1 and U+FFFE/U+FFFF but for tab and line feed), zero_width (U+200B, U+2060, U+FEFF;
the joiners U+200C and U+200D stay, because Persian, Indic scripts and emoji are written with them), nfc.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.parts import with_texts
from data_prep.records import InvalidRecord

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff]")
REPAIRS = ("mojibake", "line_ends", "control", "zero_width", "nfc")


@dataclass(frozen=True)
class Unicode:
    """Row-local. repairs: which of REPAIRS are made. A record left without text is dropped."""

    repairs: Sequence[str] = REPAIRS

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Notes name the repairs that changed a record."""
        return [self._one(row) for row in batch]

    def _one(self, row: Row) -> Kept | Dropped:
        made: set[str] = set()

        def change(text: str) -> str:
            for name in REPAIRS:
                if name in self.repairs:
                    repaired = _CHANGES[name](text)
                    if repaired != text:
                        made.add(name)
                        text = repaired
            return text

        try:
            record = with_texts(row.record, change)
        except InvalidRecord as error:
            return Dropped(error.reason, f"after its repair: {error}")
        return Kept(record, tuple(name for name in REPAIRS if name in made))


def _mojibake(text: str) -> str:
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_encoding(text)


_CHANGES: dict[str, Callable[[str], str]] = {
    "mojibake": _mojibake,
    "line_ends": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control": lambda text: _CONTROL.sub("", text),
    "zero_width": lambda text: _ZERO_WIDTH.sub("", text),
    "nfc": lambda text: unicodedata.normalize("NFC", text),
}
