"""Every row format: what it makes of a good row, and the reason it gives for a bad one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_prep.formats import FORMATS, detect
from data_prep.projections import project
from data_prep.records import (
    ConversationRecord,
    InvalidRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    TextRecord,
    UnpairedPreferenceRecord,
)

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
WORSE = {"role": "assistant", "content": "What?"}
SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = PreferenceRecord(
    [Message("user", "Hi")], [Message("assistant", "Hello")], [Message("assistant", "What?")]
)
TALK = ConversationRecord([Message("user", "Hi"), Message("assistant", "Hello")])
GUIDED = ConversationRecord([Message("system", "Be kind."), *TALK.messages])
GOOD_ANSWER = UnpairedPreferenceRecord(TALK.messages[:1], TALK.messages[1:], True)
BAD_ANSWER = UnpairedPreferenceRecord(TALK.messages[:1], TALK.messages[1:], False)
HH = "\n\nHuman: Hi\n\nAssistant: "

GOOD: list[tuple[str, dict[str, Any], Any]] = [
    ("messages", {"messages": [USER, ANSWER]}, TALK),
    ("messages", {"messages": [SYSTEM, USER, ANSWER]}, GUIDED),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]}, TALK),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "system": "Be kind.",
        },
        GUIDED,
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
        ConversationRecord([*TALK.messages, Message("user", "Add\n\n1 2"), Message("assistant", "3")]),
    ),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, TALK),
    ("prompt_completion", {"prompt": [SYSTEM, USER], "response": [ANSWER]}, GUIDED),
    ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, PAIR),
    ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, PAIR),
    ("preference", {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, PAIR),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, PAIR),
    (
        "preference",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
        PAIR,
    ),
    ("hh", {"chosen": HH + "Hello", "rejected": HH + "What?"}, PAIR),
    ("unpaired_preference", {"prompt": "Hi", "completion": "Hello", "label": True}, GOOD_ANSWER),
    ("unpaired_preference", {"prompt": [USER], "completion": [ANSWER], "label": False}, BAD_ANSWER),
    ("unpaired_preference", {"messages": [USER, ANSWER], "label": False}, BAD_ANSWER),
    ("unpaired_preference", {"messages": [USER, ANSWER], "kto_tag": True}, GOOD_ANSWER),
    ("unpaired_preference", {"instruction": "Hi", "output": "Hello", "kto_tag": False}, BAD_ANSWER),
    (
        "unpaired_preference",
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "label": True,
        },
        GOOD_ANSWER,
    ),
    ("unpaired_preference", {"question": "Hi", "answer": "Hello", "label": False}, BAD_ANSWER),
    (
        "unpaired_preference",
        {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}], "label": True},
        GOOD_ANSWER,
    ),
    ("text", {"text": "Once."}, TextRecord("Once.")),
    ("text", {"text": "Once.", "label": True}, TextRecord("Once.")),
    ("prompt", {"prompt": "Hi"}, PromptRecord([Message("user", "Hi")])),
    ("prompt", {"prompt": [USER]}, PromptRecord([Message("user", "Hi")])),
    ("prompt", {"prompt": "Hi", "question": "Hi", "answer": "4"}, PromptRecord([Message("user", "Hi")])),
    ("preference", {"chosen_messages": [USER, ANSWER], "rejected_messages": [USER, WORSE]}, PAIR),
    ("question_answer", {"question": "Hi", "answer": "Hello"}, TALK),
    ("self_instruct", {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]}, TALK),
    ("instruction", {"instruction": "Add", "input": "1"}, PromptRecord([Message("user", "Add\n\n1")])),
    (
        "turns",
        {"turns": ["Hi", "And then?"]},
        PromptRecord([Message("user", "Hi")], meta='{"turns": ["Hi", "And then?"]}'),
    ),
]


@pytest.mark.parametrize(("form", "row", "record"), GOOD)
def test_good_row(form: str, row: dict[str, Any], record: Any) -> None:
    assert FORMATS[form].parse(row) == record
    assert FORMATS[form].native == record.kind
    assert detect(row) == form


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("messages", {"messages": [{"role": "wizard", "content": "Hi"}, ANSWER]}, "unknown_role", "'wizard'"),
    ("messages", {"messages": [{"role": ["user"], "content": "Hi"}, ANSWER]}, "unknown_role", "user"),
    ("messages", {"messages": [USER]}, "last_turn_not_assistant", "'user'"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_content", "assistant"),
    ("messages", {"messages": [USER, {"role": "assistant"}]}, "empty_content", "assistant"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": 7}]}, "wrong_type", "int"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        "invalid_unicode",
        "surrogate",
    ),
    ("messages", {"messages": []}, "no_turns", "empty"),
    ("messages", {"messages": [SYSTEM]}, "no_turns", "user turn"),
    ("messages", {"messages": "Hi"}, "wrong_type", "str"),
    ("messages", {"messages": ["Hi"]}, "wrong_type", "object"),
    ("messages", {"message": [USER]}, "missing_field", "the row has message"),
    ("messages", {"messages": [ANSWER]}, "first_turn_not_user", "'assistant'"),
    ("messages", {"messages": [USER, USER, ANSWER]}, "roles_not_alternating", "turn 2"),
    ("messages", {"messages": [USER, ANSWER, ANSWER]}, "roles_not_alternating", "turn 3"),
    (
        "messages",
        {"messages": [USER, {"role": "tool", "content": "1"}, ANSWER]},
        "roles_not_alternating",
        "tool",
    ),
    ("messages", {"messages": [USER, SYSTEM, ANSWER]}, "misplaced_system", "system"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "unsupported_content",
        "'image'",
    ),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "Hi"}]}, "unknown_role", "'alien'"),
    ("alpaca", {"instruction": "", "output": "Hello"}, "empty_content", "user"),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "history": ["Hi"]}, "wrong_type", "history"),
    ("alpaca", {"instruction": "Hi"}, "missing_field", "'output'"),
    ("prompt_completion", {"prompt": "Hi", "completion": ""}, "empty_content", "assistant"),
    ("prompt_completion", {"prompt": [USER, ANSWER], "completion": "x"}, "roles_not_alternating", "turn 3"),
    ("preference", {"prompt": "Hi", "chosen": "Same ", "rejected": "Same"}, "identical_sides", "Same"),
    ("question_answer", {"question": "Hi", "answer": " "}, "empty_content", "assistant"),
    ("self_instruct", {"instruction": "Hi", "instances": []}, "wrong_type", "list of objects"),
    ("instruction", {"input": "1"}, "missing_field", "'instruction'"),
    ("instruction", {"instruction": 7}, "wrong_type", "int"),
    ("turns", {"turns": "Hi"}, "wrong_type", "list of the user's questions"),
    ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": None}, "missing_field", "'rejected'"),
    ("preference", {"chosen": "Hello", "rejected": "What?"}, "missing_field", "no prompt"),
    ("preference", {"prompt": "Ho", "chosen": [USER, ANSWER], "rejected": "x"}, "prompt_mismatch", "'Hi'"),
    (
        "preference",
        {"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
        "prompt_mismatch",
        "rejected",
    ),
    (
        "preference",
        {"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"},
        "prompt_not_ending_in_user",
        "assi",
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": [USER], "rejected": "b"},
        "side_not_one_assistant_turn",
        "chosen",
    ),
    ("hh", {"chosen": HH + "Hello", "rejected": "\n\nHuman: Ho\n\nAssistant: x"}, "prompt_mismatch", "'Ho'"),
    (
        "hh",
        {"chosen": HH + "a\n\nHuman: b\n\nAssistant: c", "rejected": HH + "a"},
        "prompt_mismatch",
        "turns",
    ),
    ("hh", {"chosen": HH, "rejected": HH + "What?"}, "empty_content", "assistant"),
    ("hh", {"chosen": "Hello", "rejected": HH}, "not_a_transcript", "Hello"),
    (
        "hh",
        {"chosen": HH + "a\n\nAssistant: b", "rejected": HH + "a\n\nAssistant: c"},
        "prompt_not_ending_in_user",
        "a",
    ),
    (
        "hh",
        {"chosen": HH + "Hi\n\nHuman: x", "rejected": HH + "Hi\n\nHuman: y"},
        "prompt_not_ending_in_user",
        "a",
    ),
    ("hh", {"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: y"}, "no_turns", "one turn"),
    (
        "unpaired_preference",
        {"messages": [USER, ANSWER], "label": "true"},
        "label_not_boolean",
        "true or false, got str: true",
    ),
    ("unpaired_preference", {"messages": [USER, ANSWER], "label": 1}, "label_not_boolean", "got int: 1"),
    ("unpaired_preference", {"messages": [USER, ANSWER], "label": None}, "missing_field", "'kto_tag'"),
    ("unpaired_preference", {"messages": [USER], "label": True}, "last_turn_not_assistant", "'user'"),
    ("unpaired_preference", {"prompt": "Hi", "label": True}, "missing_field", "'completion'"),
    ("text", {"text": "  "}, "empty_content", "text"),
    ("text", {"text": 3}, "wrong_type", "int"),
    ("prompt", {"prompt": [USER, ANSWER]}, "prompt_not_ending_in_user", "'assistant'"),
]


@pytest.mark.parametrize(("form", "row", "reason", "says"), BAD)
def test_bad_row(form: str, row: dict[str, Any], reason: str, says: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        FORMATS[form].parse(row)
    assert caught.value.reason == reason
    assert says in str(caught.value)


def test_every_format_has_good_and_bad_rows() -> None:
    assert {form for form, *_ in GOOD} == {form for form, *_ in BAD} == set(FORMATS)


def test_tool_calls_of_both_conventions_read_alike() -> None:
    call = {"name": "age", "arguments": {"born": 1990}}
    tools = [{"name": "age"}]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "My age?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "31"},
            {"from": "gpt", "value": "31."},
        ],
        "tools": tools,
    }
    arguments = json.dumps(call["arguments"])
    openai = {
        "messages": [
            {"role": "user", "content": "My age?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "age", "arguments": arguments}}],
            },
            {"role": "tool", "content": "31"},
            {"role": "assistant", "content": "31."},
        ],
        "tools": tools,
    }
    record = FORMATS["sharegpt"].parse(sharegpt)
    assert record == FORMATS["messages"].parse(openai)
    assert [role for role, _ in record.turns()] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(record.meta) == {"tools": tools}


def test_several_tool_results_may_follow_each_other() -> None:
    tool = {"role": "tool", "content": "1"}
    assert FORMATS["messages"].parse({"messages": [USER, ANSWER, tool, tool, ANSWER]}).kind == "conversation"


def test_transcript_keeps_speaker_names_inside_a_turn() -> None:
    row = {"chosen": HH + "I am no Human: I think", "rejected": HH + "Fine.\nAssistant: yes"}
    record = FORMATS["hh"].parse(row)
    assert record.chosen[0].content == "I am no Human: I think"
    assert record.rejected[0].content == "Fine.\nAssistant: yes"


def test_what_is_asked_for_decides_where_no_label_says_so() -> None:
    """A label that is missing, or no boolean, is then an error of its row and not another format."""
    for row in ({"messages": [USER, ANSWER], "label": 1}, {"prompt": "Hi", "completion": "Hello"}):
        assert detect(row, "unpaired_preference") == "unpaired_preference"
        assert detect(row) in ("messages", "prompt_completion")
    assert detect({"prompt": "Hi", "label": True}) == "unpaired_preference"


@pytest.mark.parametrize("row", [{"question": "Hi"}, {}, {"text": None}])
def test_detection_refuses_what_it_does_not_know(row: dict[str, Any]) -> None:
    assert detect(row) is None


def test_a_labelled_answer_becomes_a_prompt_and_nothing_else() -> None:
    assert project(BAD_ANSWER, "prompt").turns() == [("user", "Hi")]
    with pytest.raises(ValueError, match="unpaired_preference record cannot become conversation"):
        project(BAD_ANSWER, "conversation")


def test_projections_of_a_pair() -> None:
    pair = PreferenceRecord(PAIR.prompt, PAIR.chosen, PAIR.rejected, source="f:1", group="g", meta='{"a": 1}')
    talk = project(pair, "conversation")
    assert (talk.source, talk.group, talk.meta) == ("f:1", "g", '{"a": 1}')
    assert talk.turns() == TALK.turns()
    assert project(pair, "conversation", "rejected").turns()[-1] == ("assistant", "What?")
    assert project(pair, "prompt").turns() == [("user", "Hi")]
    assert project(pair, "text").content_columns() == {"text": "Hi\n\nHello"}
    assert project(talk, "prompt").turns() == [("user", "Hi")]
    with pytest.raises(ValueError, match="text record cannot become prompt"):
        project(TextRecord("Once."), "prompt")
