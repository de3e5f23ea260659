"""Quality rules by name: a number measured of a text, and the bounds outside of which the rule fails.

Sources: gopher (Rae et al., Scaling language models, 2021, table A1), c4 (Raffel et al., Exploring the limits
of transfer learning, 2020, section 2.2), fineweb (Penedo et al., The FineWeb datasets, 2024, section 3.6).
Those papers filter web pages. The bounds here are theirs where answers of an assistant are like pages;
`default` is False, or the bound another one, where they are not, and `why` says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

_WORD = re.compile(r"\S+")
_BULLET = ("•", "-", "*", "‣", "·")
_STOP = frozenset("the be to of and that have with".split())
_END = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？", "…", ":", ")", "`")
_SENTENCES = re.compile(r"[.!?。！？]+(?:\s|$)")


class Measured:
    """A text with what the rules count in it, each counted once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Runs without white space."""
        return _WORD.findall(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Lines with text, stripped."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines separate, stripped."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _of_lines(test: Callable[[str], bool]) -> Callable[[Measured], float]:
    return lambda at: _share(sum(map(test, at.lines)), len(at.lines))


def _repeated(parts: list[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: list[str]) -> float:
    counts = Counter(parts)
    again = sum(len(part) * (count - 1) for part, count in counts.items())
    return _share(again, sum(map(len, parts)))


def _top_gram(n: int) -> Callable[[Measured], float]:
    """Share of the characters of the words that the most frequent run of n words takes; 0 if none repeats."""

    def measure(at: Measured) -> float:
        grams = Counter(zip(*(at.words[start:] for start in range(n)), strict=False))
        if not grams:
            return 0.0
        (gram, count) = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0])), item[0]))
        return _share(sum(map(len, gram)) * count, sum(map(len, at.words))) if count > 1 else 0.0

    return measure


def _repeated_grams(n: int) -> Callable[[Measured], float]:
    """Share of the characters of the words that lie in a run of n words that was there before."""

    def measure(at: Measured) -> float:
        seen: set[tuple[str, ...]] = set()
        again = [False] * len(at.words)
        for start in range(len(at.words) - n + 1):
            gram = tuple(at.words[start : start + n])
            if gram in seen:
                again[start : start + n] = [True] * n
            seen.add(gram)
        inside = sum(len(word) for word, marked in zip(at.words, again, strict=True) if marked)
        return _share(inside, sum(map(len, at.words)))

    return measure


def _symbols(at: Measured) -> float:
    marks = at.text.count("#") + at.text.count("...") + at.text.count("…")
    return _share(marks, len(at.words))


def _alphabetic(at: Measured) -> float:
    return _share(sum(any(map(str.isalpha, word)) for word in at.words), len(at.words))


def _stop_words(at: Measured) -> float:
    return len({word.lower().strip(".,;:!?") for word in at.words} & _STOP)


@dataclass(frozen=True)
class Rule:
    """low, high: bounds of what `measure` gives, inclusive; words: texts of fewer words pass."""

    source: str
    what: str
    measure: Callable[[Measured], float]
    low: float = -math.inf
    high: float = math.inf
    default: bool = True
    words: int = 0
    why: str = ""

    def passes(self, at: Measured, bound: float | None = None) -> tuple[bool, float]:
        """(whether it passes, what was measured). bound: replaces `high`, or `low` where only that is."""
        value = self.measure(at)
        low, high = self.low, self.high
        if bound is not None:
            low, high = (low, bound) if high < math.inf else (bound, high)
        return len(at.words) < self.words or low <= value <= high, value


_PAGES = "a rule for pages: answers are short, lists or code"
RULES: dict[str, Rule] = {
    "gopher_words_min": Rule(
        "gopher", "words", lambda at: len(at.words), low=1, why="50 in the paper; an answer may be one word"
    ),
    "gopher_words_max": Rule("gopher", "words", lambda at: len(at.words), high=100_000),
    "gopher_word_length": Rule(
        "gopher",
        "mean characters of a word",
        lambda at: _share(sum(map(len, at.words)), len(at.words)),
        low=3,
        high=10,
        words=50,
        why="from 50 words on; scripts without spaces need it off",
    ),
    "gopher_symbols": Rule("gopher", "# and ... per word", _symbols, high=0.1, words=50),
    "gopher_bullets": Rule(
        "gopher",
        "share of lines that are bullets",
        _of_lines(lambda line: line.startswith(_BULLET)),
        high=0.9,
        default=False,
        why=_PAGES,
    ),
    "gopher_ellipsis_lines": Rule(
        "gopher",
        "share of lines that end in an ellipsis",
        _of_lines(lambda line: line.endswith(("...", "…"))),
        high=0.3,
        words=50,
    ),
    "gopher_alphabetic": Rule(
        "gopher",
        "share of words with a letter",
        _alphabetic,
        low=0.8,
        default=False,
        why="arithmetic fails it",
    ),
    "gopher_stop_words": Rule(
        "gopher",
        "kinds of English stop words",
        _stop_words,
        low=2,
        default=False,
        words=50,
        why="other languages and code fail it",
    ),
    "gopher_repeated_lines": Rule(
        "gopher", "share of repeated lines", lambda at: _repeated(at.lines), high=0.3, words=50
    ),
    "gopher_repeated_paragraphs": Rule(
        "gopher", "share of repeated paragraphs", lambda at: _repeated(at.paragraphs), high=0.3, words=50
    ),
    "gopher_repeated_line_characters": Rule(
        "gopher",
        "share of characters in repeated lines",
        lambda at: _repeated_characters(at.lines),
        high=0.2,
        words=50,
    ),
    "gopher_repeated_paragraph_characters": Rule(
        "gopher",
        "share of characters in repeated paragraphs",
        lambda at: _repeated_characters(at.paragraphs),
        high=0.2,
        words=50,
    ),
    **{
        f"gopher_top_{n}gram": Rule(
            "gopher", f"share of characters in the most frequent {n}-gram", _top_gram(n), high=high, words=50
        )
        for n, high in ((2, 0.20), (3, 0.18), (4, 0.16))
    },
    **{
        f"gopher_repeated_{n}gram": Rule(
            "gopher", f"share of characters in repeated {n}-grams", _repeated_grams(n), high=high, words=50
        )
        for n, high in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    },
    "c4_lorem_ipsum": Rule("c4", "lorem ipsum", lambda at: "lorem ipsum" in at.text.lower(), high=0),
    "c4_javascript": Rule(
        "c4",
        "lines that ask for JavaScript",
        lambda at: sum("javascript" in line.lower() and "enable" in line.lower() for line in at.lines),
        high=0,
    ),
    "c4_policy": Rule(
        "c4",
        "lines on cookies or terms of use",
        lambda at: sum(
            any(words in line.lower() for words in ("uses cookies", "use of cookies", "cookie policy"))
            for line in at.lines
        ),
        high=0,
    ),
    "c4_curly_bracket": Rule(
        "c4", "a curly bracket", lambda at: "{" in at.text, high=0, default=False, why="answers hold code"
    ),
    "c4_sentences": Rule(
        "c4", "sentences", lambda at: len(_SENTENCES.findall(at.text)), low=3, default=False, why=_PAGES
    ),
    "fineweb_line_punctuation": Rule(
        "fineweb",
        "share of lines that end in punctuation",
        _of_lines(lambda line: line.endswith(_END)),
        low=0.12,
        default=False,
        why=_PAGES,
    ),
    "fineweb_short_lines": Rule(
        "fineweb",
        "share of lines of fewer than 30 characters",
        _of_lines(lambda line: len(line) < 30),
        high=0.67,
        default=False,
        why=_PAGES,
    ),
    "fineweb_repeated_line_characters": Rule(
        "fineweb",
        "share of characters in repeated lines",
        lambda at: _repeated_characters(at.lines),
        high=0.1,
        words=50,
        why="0.01 in the paper; code repeats its closing brackets",
    ),
}
