"""Personal data and secrets by patterns: each type, what is near it, labelled texts, and hostile ones."""

from __future__ import annotations

import json
import math
import os
import re._parser as regex_parser  # type: ignore[import-not-found]
from collections import Counter
from pathlib import Path
from re import _constants as op  # type: ignore[attr-defined]

import pytest

from data_prep.pii import OPTIONAL, RULES, TYPES, Redactor, custom_rules, find
from data_prep.pii_patterns import IBAN_LENGTHS, luhn
from posttrain.errors import UserError

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
PRESIDIO = SHARED / "presidio_research"
GSM8K = SHARED / "gsm8k" / "grade_school_math" / "data" / "train.jsonl"
NO_DATA = "not here: set POSTTRAIN_SHARED_DATA to the folder of shared test data"
RANDOM = "Zq3vX8bN1mK7pL2sD5fG9hJ4kT6wY0uR" * 8
KEY_BLOCK = "PRIVATE KEY-----"
FOUND = {
    "EMAIL": ["ann@shop.example", "Ann.Lee+news@mail.shop.co.uk", "jörg@müller.example"],
    "PHONE": ["541-714-1388", "(978)645-9740x11144", "+46 (0)8 928 571 38", "+447700677662", "07700 063 966"],
    "CREDIT_CARD": ["4111 1111 1111 1111", "378282246310005", "3782-822463-10005", "630427373398"],
    "IBAN": ["GB82 WEST 1234 5698 7654 32", "de89370400440532013000", "ES91 2100 0418 4502 0005 1332"],
    "SSN": ["460-89-9847", "460 89 9847"],
    "IP": ["106.31.73.20", "6e40:4041:c617:e898:c11:40d2:c669:2eb4", "fe80::1", "::ffff:10.218.6.131"],
    "URL_CREDENTIALS": ["https://ann:s3cret@shop.example:8080", "postgres://app:p@ss@db"],
    "AWS_KEY": ["AKIA" + "IOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY"],
    "GCP_KEY": ["AIza" + RANDOM[:35], "ya29." + RANDOM[:60], "GOCSPX-" + RANDOM[:28]],
    "AZURE_KEY": [RANDOM[:86] + "==", "abc8Q~" + RANDOM[:34]],
    "GITHUB_TOKEN": ["ghp_" + RANDOM[:36], "github_pat_" + RANDOM[:82]],
    "SLACK_TOKEN": ["xoxb-" + "1234567890-" + RANDOM[:24], "T0AB12CD3/B0AB12CD3/" + RANDOM[:24]],
    "OPENAI_KEY": ["sk-" + RANDOM[:48], "sk-proj-" + RANDOM[:120]],
    "GATEWAY_KEY": ["pt-" + RANDOM[:43]],
    "HUGGINGFACE_TOKEN": ["hf_" + RANDOM[:34]],
    "JWT": [f"eyJ{RANDOM[:20]}.eyJ{RANDOM[:80]}.{RANDOM[:43]}"],
    "PRIVATE_KEY": [
        f"-----BEGIN RSA {KEY_BLOCK}\nProc-Type: 4,ENCRYPTED\n\n{RANDOM}\n-----END RSA {KEY_BLOCK}",
        f"-----BEGIN {KEY_BLOCK}\n{RANDOM}",
    ],
}
AROUND = {
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY": ("aws_secret_access_key = ", ""),
    RANDOM[:86] + "==": ("DefaultEndpointsProtocol=https;AccountKey=", ";"),
    "T0AB12CD3/B0AB12CD3/" + RANDOM[:24]: ("https://hooks.slack.com/services/", ""),
}
NOT_FOUND = [
    "Room 12, 3 of 4; 3.14159; 1,000,000; 1.000.000; 12:30:45; 2026-11-24; 24.11.2026; 24/11/2026",
    "Between 1990-2005 and 1914 1918 they paid $1000-200 or 500-1000, then 1000-200-400=400",
    "4111 1111 1111 1112, 0000000000000000, 1700000000, 170000000000",
    "000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567, GB83 WEST 1234 5698 7654 32",
    "300.1.1.1, v1.2.3.4, 1.2.3.4.5, std::vector, a::b, ::, Dad::Face",
    "https://shop.example/a:b, mailto: nobody, @ann, a@b, sk-this-is-a-class-of-a-web-page",
    "AKIA, ghp_short, eyJhbGciOi.x, -----BEGIN CERTIFICATE-----",
]


def values(text: str) -> list[tuple[str, str]]:
    return [(finding.type, text[finding.start : finding.end]) for finding in find(text)]


def test_the_samples_cover_every_type():
    assert set(FOUND) == set(TYPES)


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind in FOUND for value in FOUND[kind]])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("it is (", ")."), ("Tel.:\n", "\nand so on")])
def test_a_value_is_found_as_a_whole(kind, value, before, after):
    left, right = AROUND.get(value, ("", ""))
    text = f"{before}{left}{value}{right}{after}"
    if kind == "PRIVATE_KEY":
        (found,) = values(text)
        assert found[0] == kind and found[1].startswith(value)
    else:
        assert values(text) == [(kind, value)]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_alike_is_left(text):
    assert values(text) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("You can call 33 93 31", "33 93 31"),
        ("Tel.: 0301234", "0301234"),
        ("my phone number is 123456.", "123456"),
        ("61 51 81 office", "61 51 81"),
        ("085 175 7641-Office, 3660170548-Fax", "3660170548"),
    ],
)
def test_what_is_called_a_phone_number_may_have_any_groups(text, value):
    assert ("PHONE", value) in values(text)


@pytest.mark.parametrize("text", ["655502 cell phones", "he phoned 12345 people", "the fax took 1,000,000"])
def test_what_only_stands_near_such_a_word_is_left(text):
    assert values(text) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("See https://shop.example/a?b=(c)#d, and go.", "https://shop.example/a?b=(c)#d"),
        ("(at http://www.shop.example.)", "http://www.shop.example"),
        ("<a href='WWW.Shop.example/x'>", "WWW.Shop.example/x"),
        ("[here](ftp://a.b/c)", "ftp://a.b/c"),
    ],
)
def test_addresses_of_pages_are_found_where_asked_for(text, value):
    assert [text[f.start : f.end] for f in find(text, OPTIONAL)] == [value]
    assert find(text) == []


def test_a_word_behind_an_iban_is_not_taken():
    assert values("ES91 2100 0418 4502 0005 1332 that is it") == [("IBAN", "ES91 2100 0418 4502 0005 1332")]
    assert len(IBAN_LENGTHS) > 75


@pytest.mark.parametrize("number", ["4111111111111111", "378282246310005", "79927398713"])
def test_luhn_knows_every_changed_digit(number):
    assert luhn(number)
    for place in range(len(number)):
        for digit in set("0123456789") - {number[place]}:
            assert not luhn(number[:place] + digit + number[place + 1 :])


def test_the_same_value_has_the_same_number_in_all_texts_of_a_record():
    redactor = Redactor()
    first = redactor.redact("Ann@Shop.example, bob@shop.example and ann@shop.example; 541-714-1388")
    second = redactor.redact("Was it bob@shop.example or (541) 714 1388? Or 10.0.0.7?")
    assert first == "[EMAIL_1], [EMAIL_2] and [EMAIL_1]; [PHONE_1]"
    assert second == "Was it [EMAIL_2] or [PHONE_1]? Or [IP_1]?"
    assert redactor.counts == {"EMAIL": 4, "PHONE": 2, "IP": 1}
    assert Redactor().redact("eve@shop.example") == "[EMAIL_1]", "records know nothing of each other"


def test_what_is_redacted_is_found_no_more():
    text = " ; ".join("".join((AROUND.get(v, ("", ""))[0], v, "\n")) for kind in FOUND for v in FOUND[kind])
    redacted = Redactor().redact(text)
    assert find(redacted) == []
    assert all(value not in redacted for samples in FOUND.values() for value in samples)


def test_findings_that_overlap_are_one_and_nothing_of_them_stays():
    text = "https://ann:pw@shop.example/x and 4111 1111 1111 1111"
    assert Redactor().redact(text) == "[URL_CREDENTIALS_1]/x and [CREDIT_CARD_1]"
    rules = custom_rules({"LATE": "c+d+", "EARLY": "b+c+"})
    assert [(f.type, f.start, f.end) for f in find("abbccdde", rules)] == [("LATE", 1, 7)]


def test_rules_of_ones_own():
    rules = (*RULES, *custom_rules({"TICKET": r"\bK[0-9]{3}\b", "NAME": r"name is (\w+)"}))
    redactor = Redactor(rules)
    assert redactor.redact("My name is Ann, ticket K154, a@b.example") == (
        "My name is [NAME_1], ticket [TICKET_1], [EMAIL_1]"
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [({"ticket": "a"}, "is no type"), ({"A": "("}, "no regular expression"), ({"A": "a*"}, "empty text")],
)
def test_a_wrong_rule_is_named(patterns, message):
    with pytest.raises(UserError, match=message):
        custom_rules(patterns)


def steps(pattern) -> tuple[float, float]:
    """(ways to match, characters looked at) at one place of a text, both at most.

    An unbounded repeat must be possessive: it has one way, and what it reads is not counted.
    """
    ways, cost = 1.0, 0.0
    for code, argument in pattern:
        one, looked = _steps_of(code, argument)
        cost, ways = cost + ways * looked, ways * one
    return ways, cost


def _steps_of(code, argument) -> tuple[float, float]:
    if code in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY, op.AT, op.GROUPREF):
        return 1, 1
    if code is op.SUBPATTERN:
        return steps(argument[3])
    if code in (op.ASSERT, op.ASSERT_NOT):
        return 1, steps(argument[1])[1]
    if code is op.BRANCH:
        found = [steps(branch) for branch in argument[1]]
        return sum(ways for ways, _ in found), sum(cost for _, cost in found)
    low, high, item = argument
    ways, cost = steps(item)
    if code is op.POSSESSIVE_REPEAT:
        return 1, cost if high is op.MAXREPEAT else cost * high
    assert code in (op.MAX_REPEAT, op.MIN_REPEAT)
    assert high is not op.MAXREPEAT, "an unbounded repeat that can give back"
    return sum(ways**count for count in range(low, high + 1)), cost * sum(ways**n for n in range(high))


@pytest.mark.parametrize("rule", [*RULES, *OPTIONAL], ids=lambda rule: rule.type)
def test_no_pattern_can_backtrack_far(rule):
    """Counted on the pattern itself: so many characters are looked at from one place, whatever the text."""
    flags = rule.pattern.flags
    ways, cost = steps(regex_parser.parse(rule.pattern.pattern, flags))
    assert math.isfinite(cost) and cost < 20_000
    assert ways <= 1000


CHOICES = (op.MAX_REPEAT, op.MIN_REPEAT, op.BRANCH, op.ASSERT, op.ASSERT_NOT)


def possessive_choices(pattern, inside=False):
    """Choices within possessive repeats."""
    for code, argument in pattern:
        if inside and code in CHOICES:
            yield code
        if code is op.SUBPATTERN:
            inner = [argument[3]]
        elif code is op.BRANCH:
            inner = argument[1]
        elif code in (op.ASSERT, op.ASSERT_NOT):
            inner = [argument[1]]
        elif code in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            inner = [argument[2]]
        else:
            inner = []
        for item in inner:
            yield from possessive_choices(item, inside or code is op.POSSESSIVE_REPEAT)


@pytest.mark.parametrize("rule", [*RULES, *OPTIONAL], ids=lambda rule: rule.type)
def test_every_python_matches_it_alike(rule):
    """Before 3.11.5 a possessive repeat of something with a choice in it may fail where it fits."""
    assert list(possessive_choices(regex_parser.parse(rule.pattern.pattern, rule.pattern.flags))) == []


def test_choices_within_possessive_repeats_are_seen():
    found = possessive_choices(regex_parser.parse("(?:ab?c|(?!d)e)++f?"))
    assert list(found) == [op.BRANCH, op.MAX_REPEAT, op.ASSERT_NOT]


def test_the_count_sees_what_explodes():
    assert steps(regex_parser.parse("(?:a{1,9}){1,9}"))[0] > 1e8
    with pytest.raises(AssertionError, match="give back"):
        steps(regex_parser.parse("(a+)+b"))


HOSTILE = [
    "http://",
    "www.a)",
    "call ",
    "a",
    "a.",
    "a@",
    "@a.",
    "1",
    "1 ",
    "1.",
    "1-",
    "12 34 ",
    "(1",
    "+1",
    ":",
    "a:",
    "1:2:",
    "a://",
    "a://b:",
    "a://b:c@",
    "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nA",
    "-----BEGIN A",
    "eyJaaaaaaaaa.",
    "eyJ",
    "sk-",
    "sk-a_",
    "ghp_a",
    "hf_",
    "xoxb-",
    "AKIA",
    "AIza",
    "ya29.",
    "?sig=",
    "AccountKey=",
    "secret_access_key=",
    "Q~",
    "1Q~a",
    "GB82WEST",
    "GB82 ",
    "4111 1111 ",
    "hooks.slack.com/services/",
    "secret access key : \t",
    "\n",
    "é",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_text_is_read_to_its_end(unit):
    """100,000 characters: with a quadratic pattern these would take minutes."""
    size = 100_000
    text = (unit * (size // len(unit) + 1))[:size] + " the end: ann@shop.example"
    assert find(text, (*RULES, *OPTIONAL))[-1].end == len(text)


def test_a_megabyte_of_all_of_them_is_read_to_its_end():
    text = "".join(unit * (1_000_000 // len(HOSTILE) // len(unit)) for unit in HOSTILE)
    assert len(text) > 990_000
    assert values(text + "\nann@shop.example")[-1] == ("EMAIL", "ann@shop.example")


OURS = {
    "CREDIT_CARD": "CREDIT_CARD",
    "PHONE_NUMBER": "PHONE",
    "EMAIL_ADDRESS": "EMAIL",
    "US_SSN": "SSN",
    "IP_ADDRESS": "IP",
    "IBAN_CODE": "IBAN",
}
LEAST = {"EMAIL": 1.0, "SSN": 1.0, "IP": 1.0, "IBAN": 1.0, "CREDIT_CARD": 1.0, "PHONE": 1.0}
MOST_FALSE = {"PHONE": 26, "SSN": 1}
"""Parts of postal addresses, such as "370 3911", which are labelled as addresses."""


@pytest.mark.skipif(not PRESIDIO.is_dir(), reason=f"no presidio_research {NO_DATA}")
@pytest.mark.parametrize("file", ["data/synth_dataset_v2.json", "tests/data/generated_large.json"])
def test_labelled_texts(file):
    labelled, found, false = Counter(), Counter(), Counter()
    for row in json.loads((PRESIDIO / file).read_text(encoding="utf-8")):
        findings = find(row["full_text"])
        spans = [
            (OURS[s["entity_type"]], s["start_position"], s["end_position"])
            for s in row["spans"]
            if s["entity_type"] in OURS
        ]
        for kind, start, end in spans:
            labelled[kind] += 1
            found[kind] += any(f.type == kind and f.start <= start and f.end >= end for f in findings)
        false.update(
            f.type
            for f in findings
            if not any(kind == f.type and start < f.end and f.start < end for kind, start, end in spans)
        )
    assert labelled.keys() == LEAST.keys()
    for kind, least in LEAST.items():
        assert found[kind] / labelled[kind] >= least, (kind, found[kind], labelled[kind])
    assert all(count <= MOST_FALSE.get(kind, 0) for kind, count in false.items()), false


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no gsm8k {NO_DATA}")
def test_sums_are_no_personal_data():
    """7,473 problems and solutions full of numbers: two findings, "88-12-44-22" in one of them."""
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    found = [value for row in rows for value in values(f"{row['question']} {row['answer']}")]
    assert len(rows) == 7473
    assert len(found) <= 2, found
