"""Language identification by py3langid (97 languages, naive Bayes on byte n-grams, model in the package).

Measured on 75 languages: tests/integration/test_language.py. Short texts are guesses: below `min_letters`
letters none is made, the language is `und` (ISO 639-2: undetermined) and the row stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from data_prep.operations.base import Dropped, Kept, Row, tagged
from data_prep.operations.parts import Part, part_text

UNDETERMINED = "und"


@dataclass(frozen=True)
class Language:
    """Row-local. keep: ISO 639-1 codes, empty for all. action: what becomes of the other languages."""

    keep: Sequence[str] = ()
    min_confidence: float = 0.5
    min_letters: int = 20
    action: Literal["tag", "drop"] = "tag"
    part: Part = "whole"

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Tags `language`; drops other_language."""
        return [self._one(row) for row in batch]

    def _one(self, row: Row) -> Kept | Dropped:
        code, confidence = self.identify(part_text(row.record, self.part))
        wanted = not self.keep or code in self.keep or code == UNDETERMINED
        if not wanted and self.action == "drop":
            return Dropped("other_language", f"{code} ({confidence:.2f}), kept are {', '.join(self.keep)}")
        return Kept(tagged(row.record, language=code), (f"language {code}",))

    def identify(self, text: str) -> tuple[str, float]:
        """(code, confidence); UNDETERMINED for few letters or a confidence below min_confidence."""
        if sum(map(str.isalpha, text)) < self.min_letters:
            return UNDETERMINED, 0.0
        code, confidence = _identifier().classify(text)
        return (code if confidence >= self.min_confidence else UNDETERMINED), float(confidence)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
