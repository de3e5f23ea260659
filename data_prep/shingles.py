"""Word shingles of many texts as 64-bit hashes, computed for a whole batch at once in numpy.

A text is normalised (NFKC, case, spacing and punctuation aside), cut into words, and every run of `n` words
becomes one hash; a shorter text is one shingle. In scripts that are written without spaces (Chinese
characters, kana, Thai, Lao, Khmer, Burmese) every character is a word. Words are hashed by differences of a
prefix polynomial modulo 2**64 (Karp and Rabin, 1987): with an odd base the difference can be divided by its
power of the base, so that a word's hash does not depend on its place. Two different shingles of 10 million
share a hash with probability of about 3e-6.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
BASE = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
ORDER = np.uint64(0xD6E8FEB86659FD93)


class Shingles(NamedTuple):
    """hashes: of all texts, one text after the other, repeated ones included; starts: where each text begins,
    and the end of the last one.
    """

    hashes: Hashes
    starts: NDArray[np.int64]

    def of(self, index: int) -> Hashes:
        """The set of one text: its hashes, sorted, each once."""
        return np.unique(self.hashes[self.starts[index] : self.starts[index + 1]])

    def sets(self) -> Shingles:
        """The sets of all texts: `of` each, one after the other."""
        hashes = self.hashes.copy()
        bounds = self.starts.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            hashes[begin:end].sort()
        first = np.ones(len(hashes), dtype=np.bool_)
        first[1:] = hashes[1:] != hashes[:-1]
        first[self.starts[:-1][np.diff(self.starts) > 0]] = True
        before = np.zeros(len(hashes) + 1, dtype=np.int64)
        np.cumsum(first, out=before[1:])
        return Shingles(hashes[first], before[self.starts])


def shingle(texts: Sequence[str], n: int = 3) -> Shingles:
    """Hashes of every run of `n` words of every text. Texts without any word have no shingle."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    encoded = [_spaced(text).encode("utf-8") for text in texts]
    # A text is followed by a space, so that every word has an end; offsets are those of the texts.
    data = np.frombuffer(b" ".join([*encoded, b""]), dtype=np.uint8)
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) + 1 for text in encoded], out=offsets[1:])
    first, last = _word_bounds(data)
    words = _word_hashes(data, first, last)
    starts = np.searchsorted(first, offsets)
    return _runs(words, starts, n)


def _spaced(text: str) -> str:
    """`data_prep.dedup.normalise` without its work on white space, which does not matter here."""
    if text.isascii():
        return text.lower()
    # NFKC makes plain spaces of all white space but these line ends; U+1680 is among the punctuation.
    return unicodedata.normalize("NFKC", text).casefold().replace("\x85", " ")


def _word_bounds(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First byte of each word and the one behind its last: letters, digits, and what is not ASCII but for the
    punctuation of U+2000 to U+206F and U+3000 to U+303F. Characters of scripts without spaces stand alone.
    """
    inside = _IN_WORD[data]
    lead = np.flatnonzero(data >= _FIRST_LEAD)
    alone = _outside_words(data, lead, inside) if len(lead) else lead
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    ends = inside.copy()
    ends[:-1] &= ~inside[1:]
    if len(alone):
        # The first byte of a character that stands alone begins a word and ends the one before it, if any.
        size = np.where(data[alone] >= _FOUR_BYTES, 4, 3)
        begins[alone] = True
        ends[alone - 1] = inside[alone - 1]
        after = alone + size
        begins[after] = inside[after]
        ends[after - 1] = True
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def _outside_words(
    data: NDArray[np.uint8], lead: NDArray[np.int64], inside: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Marks punctuation as outside, and returns where characters that stand alone begin.

    lead: first bytes of all characters of three and four bytes in UTF-8. The text ends with a space.
    """
    # For three bytes the code point; for four a number above all of those, by the plane: 2 and 3 are Chinese.
    points = (data[lead].astype(np.uint32) & 15) << 12
    points |= (data[lead + 1].astype(np.uint32) & 63) << 6
    points |= data[lead + 2] & 63
    four = data[lead] >= _FOUR_BYTES
    kind = _CLASS[points]
    kind[four] = np.where((data[lead[four]] == _FOUR_BYTES) & (data[lead[four] + 1] >= 0xA0), _ALONE, 0)
    marks = lead[kind == _PUNCTUATION]
    for offset in range(3):
        inside[marks + offset] = False
    return lead[kind == _ALONE]


def _word_hashes(data: NDArray[np.uint8], first: NDArray[np.int64], last: NDArray[np.int64]) -> Hashes:
    powers, backwards = _powers(_POWERS_STEP * -(-(len(data) + 1) // _POWERS_STEP))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)], out=prefix[1:])
    return mix((prefix[last] - prefix[first]) * backwards[first])


_POWERS_STEP = 1 << 20


@lru_cache(maxsize=1)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """BASE and INVERSE to the power of 0 ... count - 1."""
    both = []
    for base in (BASE, INVERSE):
        powers = np.full(count, base, dtype=np.uint64)
        powers[0] = 1
        np.multiply.accumulate(powers, out=powers)
        both.append(powers)
    return both[0], both[1]


def _runs(words: Hashes, starts: NDArray[np.int64], n: int) -> Shingles:
    """Hashes of `n` words in a row, none of which crosses from one text to the next."""
    counts = np.diff(starts)
    runs = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    begins = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(runs, out=begins[1:])
    # Word where each run begins, and how many words it has: n, or all of a shorter text.
    at = np.arange(begins[-1]) - np.repeat(begins[:-1] - starts[:-1], runs)
    length = np.repeat(np.minimum(counts, n), runs)
    hashes = np.zeros(len(at), dtype=np.uint64)
    for step in range(n):
        here = step < length
        if here.all():
            hashes = hashes * ORDER + words[at + step]
        else:
            hashes[here] = hashes[here] * ORDER + words[at[here] + step]
    return Shingles(mix(hashes), begins)


def mix(values: Hashes) -> Hashes:
    """splitmix64's finaliser (Steele et al., 2014): every bit depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def jaccard(left: Hashes, right: Hashes) -> float:
    """Size of the intersection of two sets from `Shingles.of` over that of their union; 1 if both empty."""
    if not len(left) and not len(right):
        return 1.0
    # Two ascending runs: a stable sort merges them.
    both = np.concatenate((left, right))
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(left) + len(right) - shared)


def _in_word() -> NDArray[np.bool_]:
    return np.array([byte >= 128 or chr(byte).isalnum() for byte in range(256)])


_IN_WORD = _in_word()
_FIRST_LEAD, _FOUR_BYTES = np.uint8(0xE0), np.uint8(0xF0)
_PUNCTUATION, _ALONE = 1, 2
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3041, 0x30FF),  # hiragana, katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters; NFKC has mapped radicals and compatibility forms to these
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)


def _classes() -> NDArray[np.uint8]:
    """By code point below U+10000: punctuation, a word of its own, or 0."""
    classes = np.zeros(0x10000, dtype=np.uint8)
    classes[0x2000:0x2070] = classes[0x3000:0x3040] = classes[0x1680] = _PUNCTUATION
    for first, last in _WITHOUT_SPACES:
        classes[first : last + 1] = _ALONE
    return classes


_CLASS = _classes()
