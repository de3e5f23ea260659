"""Each row-local operation and each check by examples that it must get right, and some that it must not
touch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.config import CurateConfig
from data_prep.licences import commercial_problem, roll_up
from data_prep.operations.base import Dropped, Kept, Row, Stays
from data_prep.operations.language import Language
from data_prep.operations.mixing import Mix
from data_prep.operations.personal import NOT_SHOWN, PersonalData, scrubber
from data_prep.operations.preferences import PreferenceChecks, length_bias
from data_prep.operations.quality import Quality
from data_prep.operations.quality_rules import RULES, Measured
from data_prep.operations.toxicity import Toxicity, load_scorer
from data_prep.operations.unicode import Unicode
from data_prep.records import ConversationRecord, Message, PreferenceRecord, Record, TextRecord
from posttrain.errors import DataError, UserError
from tests.unit.corpus import decided_on


def row(record: Record, line: int = 1, source: str = "") -> Row:
    return Row(replace(record, id=record.id or f"r{line}", group=record.group or "g"), "f", line, source)


def talk(ask: str, answer: str, **rest: Any) -> ConversationRecord:
    return ConversationRecord([Message("user", ask), Message("assistant", answer)], **rest)


def pair(ask: str, chosen: str, rejected: str) -> PreferenceRecord:
    return PreferenceRecord(
        [Message("user", ask)], [Message("assistant", chosen)], [Message("assistant", rejected)]
    )


def tags(verdict: Kept | Dropped) -> dict[str, Any]:
    assert isinstance(verdict, Kept)
    return json.loads(verdict.record.meta).get("tags", {})


@pytest.mark.parametrize(
    ("text", "repaired", "notes"),
    [
        ("The Mona Lisa doesnâ€™t smile. CafÃ©.", "The Mona Lisa doesn’t smile. Café.", ("mojibake",)),
        ("a\r\nb\rc\n", "a\nb\nc\n", ("line_ends",)),
        ("a\x00b\x1b[0m\tc\n", "ab[0m\tc\n", ("control",)),
        ("\ufeffa\u200bb", "ab", ("zero_width",)),
        ("cafe\u0301", "café", ("nfc",)),
        ("می\u200cخواهم 👩\u200d👧 naïve “quoted” — 漢字", None, ()),
        ("plain\n\ttext", None, ()),
    ],
)
def test_unicode(text: str, repaired: str | None, notes: tuple[str, ...]) -> None:
    (verdict,) = Unicode().apply([row(TextRecord(text))])
    assert isinstance(verdict, Kept)
    assert verdict.notes == notes
    assert verdict.record == row(TextRecord(repaired or text)).record
    assert Unicode(()).apply([row(TextRecord(text))])[0].record.text == text


def test_a_turn_without_text_after_its_repair_is_a_drop() -> None:
    (verdict,) = Unicode().apply([row(talk("\u200b\x07", "Yes?"))])
    assert isinstance(verdict, Dropped)
    assert verdict.reason == "empty_content"


ENGLISH = "The kettle has not arrived yet, and I would like to know when it will be delivered."
GERMAN = "Der Wasserkocher ist noch nicht angekommen, und ich wüsste gern, wann er geliefert wird."


def test_language() -> None:
    rows = [row(TextRecord(text)) for text in (ENGLISH, GERMAN, "ok", "12 + 30 = 42, 42 + 1 = 43")]
    tagging = Language().apply(rows)
    assert [tags(verdict)["language"] for verdict in tagging] == ["en", "de", "und", "und"]
    dropping = Language(keep=["en"], action="drop").apply(rows)
    assert [isinstance(verdict, Kept) for verdict in dropping] == [True, False, True, True]
    assert isinstance(dropping[1], Dropped)
    assert dropping[1].reason == "other_language"
    assert dropping[1].detail.startswith("de (1.00)")


GOOD = (
    "The kettle that you ordered of us left our warehouse this morning and will be with you soon. "
    "Have a look at the page of the carrier to see where it is. If nobody is at home, a neighbour may sign "
    "for it; otherwise it can be fetched from the nearest post office with the card left in your letter box."
)
FAILS = {
    "gopher_words_min": None,
    "gopher_words_max": " ".join(["a"] * 100_001),
    "gopher_word_length": " ".join(f"incomprehensibilities{n}" for n in range(60)),
    "gopher_symbols": " ".join(f"#w{n}" for n in range(60)),
    "gopher_bullets": "- one\n- two\n* three",
    "gopher_ellipsis_lines": "\n".join(f"word number {n} and more to come..." for n in range(20)),
    "gopher_alphabetic": "1 2 3 4 a",
    "gopher_stop_words": " ".join(f"wort{n}" for n in range(60)),
    "gopher_repeated_lines": "\n".join(["one and the same line"] * 20),
    "gopher_repeated_paragraphs": "\n\n".join(["one and the same line"] * 20),
    "gopher_repeated_line_characters": "\n".join([*"abcdefghi", *["a long line that is there again"] * 9]),
    "gopher_repeated_paragraph_characters": "\n\n".join(
        [*"abcdefghi", *["a long line that is there again"] * 9]
    ),
    "gopher_top_2gram": " ".join(f"same again {n}" for n in range(30)),
    "gopher_top_3gram": " ".join(f"same again and {n}" for n in range(30)),
    "gopher_top_4gram": " ".join(f"same again and again {n}" for n in range(30)),
    "c4_lorem_ipsum": "Lorem ipsum dolor sit amet",
    "c4_javascript": "Please enable JavaScript to see this page.",
    "c4_policy": "This site uses cookies.",
    "c4_curly_bracket": "int main() {",
    "c4_sentences": "One. Two.",
    "fineweb_line_punctuation": "one\ntwo",
    "fineweb_short_lines": "one\ntwo",
    "fineweb_repeated_line_characters": "\n".join(["one and the same line"] * 20),
}
TEN = "one two three four five six seven eight nine ten"
FAILS |= {f"gopher_repeated_{n}gram": " ".join([TEN] * 9) for n in range(5, 11)}


def test_every_quality_rule_has_a_text_that_fails_it() -> None:
    assert set(FAILS) == set(RULES)
    for name, text in FAILS.items():
        if text is not None:
            assert not RULES[name].passes(Measured(text))[0], name
    assert not RULES["gopher_words_min"].passes(Measured(" "))[0]


@pytest.mark.parametrize(
    "text", [GOOD, "Yes.", "42", "- one\n- two", "```c\nint main() {\n}\n```", "漢字だけの短い文。"]
)
def test_the_default_rules_let_answers_pass(text: str) -> None:
    chosen = [name for name, rule in RULES.items() if rule.default]
    assert [name for name in chosen if not RULES[name].passes(Measured(text))[0]] == []


def test_what_the_repetition_rules_measure() -> None:
    """By hand: 20 characters of words, of which `a b` twice is 4; the second `one two three` is 11 of 22."""
    assert RULES["gopher_top_2gram"].measure(Measured("a b cccccccc a b dddddddd")) == pytest.approx(4 / 20)
    again = "one two three one two three"
    assert RULES["gopher_repeated_5gram"].measure(Measured(again)) == 0
    six = "one two three four five x one two three four five"
    assert RULES["gopher_repeated_5gram"].measure(Measured(six)) == pytest.approx(19 / 39)
    assert RULES["gopher_repeated_lines"].measure(Measured("a\na\nb\nc")) == pytest.approx(0.25)
    assert RULES["gopher_repeated_line_characters"].measure(Measured("aaa\naaa\nb\nc")) == pytest.approx(
        3 / 8
    )


def test_quality_tags_or_drops_and_bounds_replace_the_rules_own() -> None:
    rows = [row(talk("Write code.", "int main() {")), row(talk("{", "Yes."))]
    found = Quality(["c4_curly_bracket", "gopher_words_min"], {"gopher_words_min": 2}).apply(rows)
    assert [tags(verdict) for verdict in found] == [
        {"quality": ["c4_curly_bracket"]},
        {"quality": ["gopher_words_min"]},
    ]
    dropped = Quality(["gopher_words_min"], {"gopher_words_min": 2}, "drop").apply(rows)[1]
    assert dropped == Dropped("gopher_words_min", "words: 1")


SECRET = "ann@shop.example"


def test_personal_data_is_found_redacted_or_dropped() -> None:
    record = talk(
        f"I am {SECRET}", f"Hello {SECRET}", group=SECRET, meta=json.dumps({"tools": [SECRET], "n": 1})
    )
    find, redact, drop = (
        PersonalData(action).apply([row(record, 1), row(talk("a", "b"))])  # type: ignore[arg-type]
        for action in ("find", "redact", "drop")
    )
    assert tags(find[0]) == {"pii": {"EMAIL": 4}}
    assert isinstance(redact[0], Kept)
    assert SECRET not in str(redact[0].record)
    assert [text for _, text in redact[0].record.turns()] == ["I am [EMAIL_1]", "Hello [EMAIL_1]"]
    assert json.loads(redact[0].record.meta)["tools"] == ["[EMAIL_1]"]
    assert drop[0] == Dropped("personal_data", "EMAIL 4")
    assert [verdicts[1] for verdicts in (find, redact, drop)] == [Kept(row(talk("a", "b")).record)] * 3


def test_what_is_shown_of_dropped_rows_is_clean() -> None:
    assert scrubber([Unicode(), PersonalData("find")]) is None
    clean = scrubber([PersonalData("drop")])
    assert clean is not None
    assert clean(f"from {SECRET}") == "from [EMAIL_1]"
    assert clean("from ann@sh...") == NOT_SHOWN


def odd(texts: Sequence[str]) -> list[float]:
    return [len(text) % 2 for text in texts]


def test_toxicity_is_a_tag_of_a_scorer_of_ones_own() -> None:
    operation = Toxicity(load_scorer("tests.unit.test_operations_rows:odd"), 0.5)
    found = operation.apply([row(talk("q", "abc")), row(talk("q", "ab"))])
    assert [(tags(verdict), verdict.notes) for verdict in found] == [
        ({"toxicity": 1.0}, ("toxicity of 0.5 or more",)),
        ({"toxicity": 0.0}, ()),
    ]
    with pytest.raises(UserError, match="has no function 'even'"):
        load_scorer("tests.unit.test_operations_rows:even")
    with pytest.raises(UserError, match="no_such_module"):
        load_scorer("no_such_module:even")
    with pytest.raises(UserError, match="1 scores for 2 texts"):
        Toxicity(lambda texts: [1.0], 0.5).apply([row(talk("q", "a"))] * 2)


def checked(*records: PreferenceRecord) -> tuple[list[Stays | Dropped], dict[str, Any]]:
    return decided_on(PreferenceChecks(), [row(record, line) for line, record in enumerate(records, 1)], 2)


def test_preference_checks() -> None:
    verdicts, facts = checked(
        pair("Which one?", "The red one.", "The blue one."),
        pair("which one", "the blue one", "THE RED ONE!"),
        pair("Which one?", "The red one.", "The green one."),
        pair("Which two?", "Yes!", "yes."),
        pair("Which two?", "...", "No."),
        pair("Which two?", "The blue one.", "The red one."),
    )
    reasons = [verdict.reason if isinstance(verdict, Dropped) else "" for verdict in verdicts]
    assert reasons == ["contradictory_pairs"] * 2 + ["", "sides_alike", "side_without_words", ""]
    assert isinstance(verdicts[0], Dropped)
    assert verdicts[0].detail.startswith("f:2 prefers the other")
    assert isinstance(verdicts[2], Stays)
    assert isinstance(verdicts[5], Stays)
    assert verdicts[2].ties != verdicts[5].ties
    assert facts["chosen_longer"] == 0.5


def test_pairs_of_one_prompt_are_tied() -> None:
    verdicts, facts = checked(pair("Why?", "A b", "C"), pair("why", "D", "E f"), pair("How?", "D", "E f"))
    ties = [verdict.ties for verdict in verdicts if isinstance(verdict, Stays)]
    assert ties[0] == ties[1] != ties[2]
    assert facts["prompts_with_several_pairs"] == 1


def test_length_bias_by_hand() -> None:
    """7 of 10 unlike pairs; Wilson's interval at 95 % is .3968 to .8922."""
    lengths = np.array([(2, 1)] * 7 + [(1, 2)] * 3 + [(5, 5)] * 2, dtype=np.int32)
    assert length_bias(*lengths.T) == {
        "chosen_longer": 0.7,
        "chosen_longer_95": [0.3968, 0.8922],
        "mean_characters_chosen": 2.2,
        "mean_characters_rejected": 1.9,
    }
    assert length_bias(np.ones(1, np.int32), np.ones(1, np.int32)) == {}


@pytest.mark.parametrize(
    ("mix", "sizes", "rows"),
    [
        (Mix({"a": 1, "b": 1}), {"a": 100, "b": 40}, {"a": 40, "b": 40}),
        (Mix({"a": 3, "b": 1}), {"a": 100, "b": 40}, {"a": 100, "b": 33}),
        (Mix({"a": 1, "b": 1}, max_epochs=2), {"a": 100, "b": 40}, {"a": 80, "b": 80}),
        (Mix({"a": 1}), {"a": 100, "b": 40}, {"a": 100, "b": 0}),
        (Mix({"a": 1, "b": 1}, rows=120), {"a": 100, "b": 40}, {"a": 80, "b": 40}),
        (Mix({"a": 1, "b": 1}, quotas={"b": 10}), {"a": 100, "b": 40}, {"a": 70, "b": 10}),
        (Mix(temperature=2, rows=90), {"a": 10_000, "b": 2_500}, {"a": 60, "b": 30}),
        (Mix(rows=10), {"a": 50, "b": 50, "c": 50}, {"a": 4, "b": 3, "c": 3}),
        (Mix(), {"a": 7, "b": 3}, {"a": 7, "b": 3}),
        (Mix(rows=1000), {"a": 7, "b": 3}, {"a": 7, "b": 3}),
    ],
)
def test_rows_of_a_mix(mix: Mix, sizes: dict[str, int], rows: dict[str, int]) -> None:
    assert mix.targets(sizes) == rows


def test_a_mix_repeats_or_drops_rows_and_a_larger_one_only_adds() -> None:
    rows = [row(TextRecord("t", id=f"a{n}"), source="a") for n in range(10)]
    rows += [row(TextRecord("t", id=f"b{n}"), source="b") for n in range(4)]
    twice, _ = decided_on(Mix({"a": 1, "b": 1}, max_epochs=2), rows, 3)
    assert [verdict.copies for verdict in twice[10:] if isinstance(verdict, Stays)] == [2] * 4
    kept = []
    for count in (4, 8, 12):
        verdicts, _ = decided_on(Mix(rows=count), rows)
        kept.append({place for place, verdict in enumerate(verdicts) if isinstance(verdict, Stays)})
        assert len(kept[-1]) == count
    assert kept[0] < kept[1] < kept[2]
    _, facts = decided_on(Mix({"a": 1, "b": 1}), rows)
    assert facts["sources"]["a"] == {"rows_before": 10, "rows": 4, "share": 0.5}


def test_a_mix_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no row is left of b"):
        Mix({"a": 1, "b": 1}).targets({"a": 3})


@pytest.mark.parametrize(
    ("licence", "problem"),
    [
        ("MIT", None),
        ("Apache-2.0", None),
        ("CC-BY-SA-4.0", None),
        ("cc by 4.0", None),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("research only", "non-commercial"),
        ("llama3", "not known to allow it"),
        (None, "has no `licence`"),
    ],
)
def test_commercial_licences(licence: str | None, problem: str | None) -> None:
    found = commercial_problem(licence)
    assert found is None if problem is None else problem in (found or "")


def test_licences_of_a_mix() -> None:
    sources = [("a", "MIT"), ("b", "CC-BY-SA-4.0"), ("c", None), ("d", "CC-BY-NC-4.0")]
    assert roll_up(sources, {"a": 3, "b": 2}) == {
        "rows_by_licence": {"CC-BY-SA-4.0": 2, "MIT": 3},
        "commercial": True,
        "share_alike": ["CC-BY-SA-4.0"],
    }
    assert roll_up(sources, {"a": 3, "c": 2})["rows_by_licence"] == {"MIT": 3, "unknown": 2}
    assert not roll_up(sources, {"a": 3, "c": 2})["commercial"]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (
            {"commercial": True},
            r"sources.0 \(a.jsonl\): it has no `licence`.*sources.1 \(second\): licence CC-BY-NC",
        ),
        (
            {"operations": [{"op": "quality", "rules": ["gopher_word_min"]}]},
            "did you mean 'gopher_words_min'",
        ),
        ({"operations": [{"op": "pii", "types": ["EMIAL"]}]}, "did you mean 'EMAIL'"),
        ({"operations": [{"op": "pii", "patterns": {"TICKET": "["}}]}, "no regular expression"),
        ({"operations": [{"op": "language", "action": "drop"}]}, "needs `keep`"),
        ({"operations": [{"op": "mix", "weights": {"secnd": 1}}]}, "did you mean 'second'"),
        ({"operations": [{"op": "mix", "weights": {"second": 1}, "temperature": 2.0}]}, "not both"),
        ({"operations": [{"op": "preference_checks"}]}, "is for kind preference"),
        (
            {"operations": [{"op": "length", "tokenizer": "m", "min_tokens": 9, "max_tokens": 3}]},
            "larger than",
        ),
    ],
)
def test_settings_are_refused(block: dict[str, Any], says: str) -> None:
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "name": "second", "licence": "CC-BY-NC-4.0"}]
    with pytest.raises(ValidationError, match=says):
        CurateConfig.model_validate({"kind": "text", "sources": sources} | block)


def test_sources_of_one_name_cannot_be_mixed() -> None:
    sources = [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}]
    with pytest.raises(ValidationError, match="set `name` on those called a.jsonl"):
        CurateConfig.model_validate({"kind": "text", "sources": sources, "operations": [{"op": "mix"}]})
