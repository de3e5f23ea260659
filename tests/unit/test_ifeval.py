"""IFEval's instruction checkers, each followed and not followed; the verdicts on real responses are in
test_published_numbers.py."""

from __future__ import annotations

import pytest

from eval.tasks.ifeval import INSTRUCTIONS, accuracies, loose_variants, verdict
from eval.tasks.ifeval.registry import bound
from eval.tasks.ifeval.text import language, sentences, words
from posttrain.errors import DataError

ENGLISH = "this is a plain english sentence about the weather in the mountains"
AT_LEAST, LESS = "at least", "less than"

CASES = [
    ("keywords:existence", {"keywords": ["rain", "SUN"]}, "Sunny, then raining.", "Sunny."),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": AT_LEAST},
        "War, a warning",
        "One war",
    ),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LESS}, "One war", "War and war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Rocket", "The Rock."),
    (
        "keywords:letter_frequency",
        {"letter": "O", "let_frequency": 2, "let_relation": AT_LEAST},
        "Oslo",
        "or",
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": LESS}, "no", "#a"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein deutscher Satz über das Wetter in den Bergen.",
        ENGLISH,
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "two, words", "now three words"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        "Dr. No came. He left.",
        "Dr. No came.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        'First.\n\n"then, more',
        "Then.\n\nFirst",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.capitalize()),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": AT_LEAST},
        "I saw (NASA) and ESA, too",
        "I saw Nasa and ESA",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", "[name"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\np. p. s more", "Bye\nP.S. more"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. more", "Bye PS"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b c**",
        "*a* and * *",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSection 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<a poem>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, "say it. Yes.", "Yes. Say it."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, '"... any questions?"', "Any questions? No."),
    ("startend:quotation", {}, ' "all of it" ', '"'),
    ("punctuation:no_comma", {}, "none; here", "one, here"),
]


@pytest.mark.parametrize(("name", "parameters", "followed", "broken"), CASES)
def test_each_instruction(name: str, parameters: dict, followed: str, broken: str) -> None:
    check = bound(name, parameters)
    assert check(followed)
    assert not check(broken)


def test_there_are_25_types_and_each_is_tested() -> None:
    assert len(INSTRUCTIONS) == 25
    assert {case[0] for case in CASES} == set(INSTRUCTIONS)


def test_loose_forgives_an_introduction_a_closing_and_asterisks() -> None:
    response = 'Sure!\n**"quoted"**\nHope that helps!'
    found = verdict(response, ["startend:quotation"], [{}])
    assert (found.strict, found.loose) == ((False,), (True,))
    assert len(loose_variants(response)) == 8
    assert verdict("Sure!\nplain", ["startend:quotation"], [{}]).loose == (False,)


def test_an_empty_response_follows_nothing() -> None:
    found = verdict(" \n", ["punctuation:no_comma"], [{}])
    assert (found.strict, found.loose) == ((False,), (False,))


def test_accuracies_by_hand() -> None:
    one = verdict("a, b", ["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["a"]}])
    two = verdict("a b", ["punctuation:no_comma"], [{"unused": None}])
    found = accuracies([one, two])
    assert found["prompt_strict"].value == 0.5
    assert found["instruction_strict"].value == pytest.approx(2 / 3)
    assert found["instruction_strict"].n == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One. Two! Three?", 3),
        ("No stop", 1),
        ("Mr. and Mrs. Smith met J. R. Tolkien at 5 p.m. on Sunday.", 1),
        ("1. First item.\n2. Second item.", 2),
        ('He said "Stop!" Then he left.', 2),
        ("It costs 3.50 dollars. Version 2.0 is out.", 2),
        ("In 1990. Then more.", 2),
        ("Wait... what? Yes.", 3),
        ("Sun, rain, etc. are weather.", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_words_and_languages() -> None:
    assert words("Don't stop, 2 go_on") == ["Don", "t", "stop", "2", "go_on"]
    assert language(ENGLISH) == "en"
    assert language("12345 !!!") is None


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("keywords:exist", {}, "unknown instruction 'keywords:exist'"),
        ("keywords:existence", {}, "needs keywords"),
        ("punctuation:no_comma", {"comma": 1}, "does not take comma"),
        ("length_constraints:number_words", {"num_words": 1, "relation": "around"}, "unknown relation"),
    ],
)
def test_bad_instructions_are_named(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bound(name, parameters)("text")


def test_every_instruction_needs_its_parameters() -> None:
    with pytest.raises(DataError, match="2 instructions but 1 kwargs"):
        verdict("a", ["punctuation:no_comma", "startend:quotation"], [{}])


def test_a_response_of_brackets_without_end_is_no_json() -> None:
    assert verdict("[" * 100_000, ["detectable_format:json_format"], [{}]).strict == (False,)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("detectable_content:number_placeholders", {"num_placeholders": "3"}),
        ("detectable_content:number_placeholders", {"num_placeholders": True}),
        ("keywords:existence", {"keywords": "ab"}),
        ("keywords:existence", {"keywords": [1]}),
        ("startend:end_checker", {"end_phrase": 7}),
    ],
)
def test_a_parameter_of_another_type_is_an_error_of_the_data(name: str, given: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"instruction '{name}' needs {next(iter(given))} to be"):
        verdict("[a] [b] [c] ab 7", [name], [given])
