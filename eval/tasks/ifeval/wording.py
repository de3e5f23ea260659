"""Instructions about the words of a response: keywords, letters, lengths, language and case."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from eval.tasks.ifeval.registry import holds, instruction
from eval.tasks.ifeval.text import language, sentences, words

_DETECTED_WHEN_UNKNOWN = True
"""A text in which no language can be told follows a language instruction."""


@instruction("keywords:existence")
def has_keywords(response: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, in any case, inside words too."""
    folded = response.lower()
    return all(keyword.lower() in folded for keyword in keywords)


@instruction("keywords:frequency")
def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so often, in any case, inside words too."""
    return holds(response.lower().count(keyword.lower()), relation, frequency)


@instruction("keywords:forbidden_words")
def has_no_forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word, in any case."""
    return not any(
        re.search(rf"\b{re.escape(word)}\b", response, flags=re.IGNORECASE) for word in forbidden_words
    )


@instruction("keywords:letter_frequency")
def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The character occurs so often, in any case."""
    return holds(response.lower().count(letter.lower()), let_relation, let_frequency)


@instruction("language:response_language")
def is_in_language(response: str, language: str) -> bool:
    """The whole response is in the language of that ISO 639-1 code."""
    return _language_is(response, language)


@instruction("length_constraints:number_words")
def number_of_words(response: str, num_words: int, relation: str) -> bool:
    """Runs of letters and digits."""
    return holds(len(words(response)), relation, num_words)


@instruction("length_constraints:number_sentences")
def number_of_sentences(response: str, num_sentences: int, relation: str) -> bool:
    """Sentences as `eval.tasks.ifeval.text.sentences` cuts them."""
    return holds(len(sentences(response)), relation, num_sentences)


@instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, divided by `***`; only the first and the last may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    if not all(parts[1:-1]):
        return False
    return sum(bool(part) for part in parts) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def first_word_of_paragraph(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by an empty line; the nth starts with the word, punctuation aside."""
    parts = response.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    paragraph = parts[nth_paragraph - 1].strip()
    if not paragraph:
        return False
    start = paragraph.split()[0].lstrip("'\"")
    match = re.match(r"[^.,?!'\"]*", start)
    return match is not None and match.group().lower() == first_word.lower()


@instruction("change_case:english_capital")
def is_english_capitals(response: str) -> bool:
    """English, without a small letter."""
    return response.isupper() and _language_is(response, "en")


@instruction("change_case:english_lowercase")
def is_english_lowercase(response: str) -> bool:
    """English, without a capital letter."""
    return response.islower() and _language_is(response, "en")


@instruction("change_case:capital_word_frequency")
def capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words all in capitals, single letters such as `I` included."""
    found = [word.strip(string.punctuation) for word in re.split(r"\s+|--|(?<=\w)[,;:/()]|(?=')", response)]
    return holds(sum(word.isupper() for word in found), capital_relation, capital_frequency)


def _language_is(response: str, code: str) -> bool:
    found = language(response)
    return _DETECTED_WHEN_UNKNOWN if found is None else found == code
