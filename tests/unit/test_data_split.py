"""Deduplication and the split: what counts as the same, and that groups never straddle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import CurateConfig, SourceConfig, SplitConfig
from data_prep.dedup import content_key, normalise
from data_prep.records import ConversationRecord, Message, PromptRecord, TextRecord
from data_prep.split import default_group, group_key, side
from tests.unit import chunked

TEXTS = st.text(min_size=1).filter(str.strip)
PROMPTS = st.text("abcéж ?.", min_size=1, max_size=6).filter(lambda text: any(map(str.isalnum, text)))


def test_normalise() -> None:
    assert normalise("  Ｈｅｌｌｏ\u00a0 WORLD\n") == "hello world"
    assert normalise("Straße ﬁne") == "strasse fine"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (TextRecord("A b"), TextRecord(" a  B\n"), True),
        (TextRecord("a", id="1", source="x", group="g"), TextRecord("a", id="2"), True),
        (TextRecord("a"), TextRecord("a."), False),
        (TextRecord("a"), PromptRecord([Message("user", "a")]), False),
        (TextRecord("a", meta='{"tools": [1]}'), TextRecord("a", meta='{"tools": [2]}'), False),
        (
            ConversationRecord([Message("user", "a b"), Message("assistant", "c")]),
            ConversationRecord([Message("user", "a"), Message("assistant", "b c")]),
            False,
        ),
    ],
)
def test_content_key(one: TextRecord, other: TextRecord, same: bool) -> None:
    assert (content_key(one) == content_key(other)) is same


def test_group_ignores_case_space_and_punctuation_only() -> None:
    assert group_key("How can I pay?") == group_key(" how can i... PAY!")
    assert group_key("How can I pay?") != group_key("How can I play?")
    assert group_key("??") != group_key("!!")


def test_default_group_is_that_of_the_first_user_turn() -> None:
    system, ask, say = Message("system", "S"), Message("user", "Hi!"), Message("assistant", "Hello")
    talk = ConversationRecord([system, ask, say, Message("user", "More"), say])
    assert default_group(talk) == default_group(PromptRecord([Message("user", "hi")])) == group_key("hi")


def test_side_is_pinned() -> None:
    """Changing the hash would silently move held-out rows into train."""
    sides = "".join(side(f"group-{index}", "posttrain", 0.3)[0] for index in range(20))
    assert sides == "eeetteetttttteettete"


@given(group=TEXTS, salt=TEXTS, fractions=st.tuples(*[st.floats(0.01, 0.99)] * 2).map(sorted))
def test_side_depends_on_nothing_else_and_grows_with_the_fraction(
    group: str, salt: str, fractions: list[float]
) -> None:
    small, large = fractions
    assert side(group, salt, small) == side(group, salt, small)
    if side(group, salt, small) == "eval":
        assert side(group, salt, large) == "eval"


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(PROMPTS, min_size=1, max_size=30),
    decorate=st.sampled_from([str.upper, str.lower, lambda text: f"  {text} ", lambda text: f"{text}."]),
    fraction=st.floats(0.05, 0.95),
    dedup=st.booleans(),
)
def test_curated_rows_never_straddle_and_counts_are_conserved(
    texts: list[str], decorate: Callable[[str], str], fraction: float, dedup: bool
) -> None:
    """Near copies of a prompt are on one side, ids are unique, every record is a row or a counted drop."""
    config = CurateConfig(
        kind="conversation",
        sources=[SourceConfig(path="x.jsonl")],
        dedup=dedup,
        split=SplitConfig(eval_fraction=fraction),
    )
    records = [_talk(text, "first") for text in texts]
    records += [
        _talk(decorate(text), f"answer {number}") for number, text in reversed(list(enumerate(texts)))
    ]
    done = chunked.curate(config, records, chunk=25)
    assert len(done.every) + len(done.rejects) == len(records)
    assert dedup or not done.rejects
    ids = [row["id"] for row in done.every]
    assert len(ids) == len(set(ids))
    asked = {
        name: {_words(row["messages"][0]["content"]) for row in rows} for name, rows in done.rows.items()
    }
    assert not asked["train"] & asked["eval"]


def _talk(question: str, answer: str) -> ConversationRecord:
    return ConversationRecord([Message("user", question), Message("assistant", answer)])


def _words(text: str) -> tuple[str, ...]:
    return tuple("".join(char if char.isalnum() else " " for char in text.lower()).split())


def test_the_share_of_groups_on_the_eval_side() -> None:
    """20,000 groups at 0.1: six standard deviations are 255."""
    held_out = sum(side(str(number), "posttrain", 0.1) == "eval" for number in range(20_000))
    assert abs(held_out - 2000) < 255
