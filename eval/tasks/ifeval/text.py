"""Words, sentences and the language of a text, as the instruction checkers count them."""

from __future__ import annotations

import re

from posttrain.errors import UserError

_ABBREVIATIONS = frozenset(
    "adj adv approx apt assn ave blvd bros capt cf co col corp dept dr eg esp etc ext gov hon hr ie inc"
    " jan feb mar apr jun jul aug sep sept oct nov dec jr lt ltd maj messrs mr mrs ms mt nos pp pres prof"
    " rev sgt sr st univ vol vs".split()
)
"""Words whose full stop does not end a sentence when more of the sentence may follow."""

_BOUNDARY = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*\s+")
_LAST_WORD = re.compile(r"([^\W_](?:[\w.'’-]*[^\W_])?)\.$")


def words(text: str) -> list[str]:
    """Maximal runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    """The text cut after `.`, `!` or `?` and white space, unless the full stop belongs to the word before it.

    It does after an abbreviation, an initial (`J.`), dotted letters (`e.g.`), and the number or letter of a
    list item.
    """
    found: list[str] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        piece = text[start : match.start()]
        if _stop_belongs_to_word(piece):
            continue
        if piece.strip():
            found.append(text[start : match.end()].strip())
        start = match.end()
    if text[start:].strip():
        found.append(text[start:].strip())
    return found


def _stop_belongs_to_word(piece: str) -> bool:
    match = _LAST_WORD.search(piece)
    if match is None:
        return False
    word = match.group(1)
    if word.isdigit() or len(word) == 1:
        return word.isupper() or not piece[: match.start()].strip()
    return word.lower() in _ABBREVIATIONS or re.fullmatch(r"[^\W\d_](?:\.[^\W\d_])+", word) is not None


def language(text: str) -> str | None:
    """ISO 639-1 code of the language by langdetect with its seed fixed; None where it finds no letters."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as error:
        raise UserError("IFEval tells languages by langdetect\n    pip install 'posttrain[tasks]'") from error

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None
