"""What is measured on one record, and how records are read."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from posttrain.errors import DataError, UserError
from serving.drift import features
from serving.drift.baseline import _halves
from serving.drift.command import parse_selection, read_traffic
from serving.drift.embedding import LatentSemantics, count_matrix, decode, distance_to, encode
from serving.drift.instruments import load_tag, tag_values
from serving.drift.language import detector, script
from serving.drift.records import Record, Selection, read_jsonl, read_reference, read_samples

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Where is my parcel?"},
]


def test_numbers_and_categories_of_a_record():
    record = Record(ASKED, "It is here. It is here. It is here.")
    numbers = features.numbers(record, lambda text: len(text.split()))
    assert numbers["prompt_chars"] == 39 and numbers["prompt_tokens"] == 8
    assert numbers["answer_chars"] == 35 and numbers["answer_tokens"] == 9
    assert numbers["answer_repetition"] == pytest.approx(4 / 7)
    labels = features.categories(record, script)
    assert (labels["turns"], labels["system_message"]) == ("3", "yes")
    assert (labels["refusal"], labels["empty_answer"]) == ("no", "no")
    assert features.categories(Record(ASKED, " \n"), script)["empty_answer"] == "yes"
    assert set(features.numbers(Record(ASKED, None), len)) == {"prompt_chars", "prompt_tokens"}
    assert features.last_user_message(record) == "Where is my parcel?"


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide instructions for that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I am not able to share this.", True),
        ("That would be against our content policy.", True),
        ("Sorry to hear that! Your parcel arrives on Monday.", False),
        ("I can't wait to see it!", False),
        ("You cannot return it after 30 days.", False),
        ("x" * 300 + " I cannot help.", False),
    ],
)
def test_refusals_are_phrases_at_the_beginning(answer, refused):
    assert features.is_refusal(answer) is refused


def test_languages_by_script_and_by_py3langid():
    assert [script(text) for text in ("Hello", "Привет", "你好吗", "12 + 3")] == [
        "latin",
        "cyrillic",
        "cjk",
        "none",
    ]
    pytest.importorskip("py3langid")
    detect = detector("langid")
    assert detect("Where is my parcel, please? It should have arrived on Monday.") == "en"
    assert detect("Wo ist mein Paket, bitte? Es sollte am Montag ankommen.") == "de"
    assert detect("42") == "none"


def test_arrays_survive_their_way_through_json():
    floats = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3).astype(np.float16).astype(np.float32)
    again = decode(json.loads(json.dumps(encode(floats))))
    assert again.dtype == np.float32 and np.array_equal(again, floats)
    whole = np.array([0, 70_000], dtype=np.int32)
    assert np.array_equal(decode(encode(whole)), whole)


def test_a_text_of_unknown_words_has_a_short_vector():
    texts = [f"the parcel {i} arrives on monday" for i in range(50)]
    semantics = LatentSemantics.fit(count_matrix(texts, features.words))
    vectors = semantics.transform(count_matrix(["the parcel arrives", "zwölf Boxkämpfer"], features.words))
    assert np.linalg.norm(vectors[0]) > 0.7 > 0.1 > np.linalg.norm(vectors[1])
    assert distance_to(vectors[0], np.zeros_like(vectors))[0] == 1


def test_small_groups_stay_together_and_large_ones_are_split():
    rng = np.random.default_rng(0)
    small = [Record(ASKED, "a", group=str(i // 3)) for i in range(300)]
    first, second = _halves(small, rng)
    assert {i // 3 for i in first}.isdisjoint(i // 3 for i in second)
    assert sorted([*first, *second]) == list(range(300))
    large = [Record(ASKED, "a", group=str(i // 100)) for i in range(300)]
    assert {i // 100 for i in _halves(large, rng)[0]} == {0, 1, 2}


def test_a_jsonl_line_is_a_record_or_an_error_that_names_it(tmp_path):
    file = tmp_path / "traffic.jsonl"
    rows = [
        {"messages": ASKED, "answer": "Here.", "score": 1, "day": "2026-01-01", "team": "a"},
        {"messages": [*ASKED, {"role": "assistant", "content": "There."}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_jsonl(file)
    assert (first.answer, first.score, first.day, first.extra) == ("Here.", 1.0, "2026-01-01", {"team": "a"})
    assert (second.answer, len(second.messages)) == ("There.", 4)
    for line, complaint in (
        ("{", "traffic.jsonl:1: not valid JSON"),
        ('{"messages": "hi"}', "traffic.jsonl:1: messages is not a list"),
        (json.dumps({"messages": ASKED, "answer": 3}), "answer is int"),
        (json.dumps({"messages": ASKED, "answer": "a", "score": "high"}), "score is 'high'"),
    ):
        file.write_text(line)
        with pytest.raises(DataError, match=complaint):
            read_jsonl(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="neither UTF-8 text nor an SQLite database"):
        read_jsonl(file)


def test_every_kind_of_data_set_gives_records(
    conversation_data, preference_data, labelled_data, prompt_data, text_data
):
    for path, answered in ((conversation_data, True), (preference_data, True), (prompt_data, False)):
        records, source = read_reference(path)
        assert all((record.answer is not None) is answered for record in records)
        assert source["content_hash"] == json.loads((path / "dataset.json").read_text())["content_hash"]
    assert read_reference(labelled_data)[0]
    with pytest.raises(DataError, match="neither prompts nor answers"):
        read_reference(text_data)


def database(path, rows):
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE samples(request_id TEXT PRIMARY KEY, day TEXT, time REAL, model TEXT, "
            "version TEXT, messages TEXT, answer TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, "
            "finish_reason TEXT, redactions TEXT, flag TEXT, comment TEXT)"
        )
        for i, (day, model, version) in enumerate(rows):
            values = (str(i), day, 1e9 + i, model, version, json.dumps(ASKED), "Here.", 9, 2, "stop", "{}")
            connection.execute(f"INSERT INTO samples VALUES({', '.join('?' * 11)}, NULL, NULL)", values)
    connection.close()
    return path


def test_samples_are_chosen_by_day_model_and_version(tmp_path):
    days = ["2026-01-01", "2026-01-02"]
    path = database(tmp_path / "m.sqlite", [(day, "desk", version) for day in days for version in "12"])
    records, selection = read_traffic(path, Selection())
    assert len(records) == 4 and selection.day == "2026-01-02"
    assert records[0].finish_reason == "stop" and records[0].extra["version"] == "1"
    assert len(read_samples(path, Selection(version="2"))) == 2
    assert read_traffic(path, Selection(since=1e9 + 2))[1].day is None
    other = database(tmp_path / "two.sqlite", [("2026-01-01", "a", "1"), ("2026-01-01", "b", "1")])
    with pytest.raises(DataError, match="of the models a, b\n    choose one with --model"):
        read_traffic(other, Selection())
    assert len(read_traffic(other, Selection(model="b"))[0]) == 1
    empty = tmp_path / "empty.sqlite"
    with sqlite3.connect(empty) as connection:
        connection.execute("CREATE TABLE requests(id TEXT)")
    with pytest.raises(DataError, match="no such table: samples"):
        read_traffic(empty, Selection())


def test_options_that_choose_a_time():
    assert parse_selection("2026-02-03", None, None, "desk", None) == Selection("2026-02-03", model="desk")
    assert parse_selection(None, "1970-01-02", None, None, None).since == 86_400
    assert parse_selection(None, None, "24h", None, None).since is not None
    for wrong, complaint in (
        (("2026-02-30", None, None), "--day 2026-02-30"),
        ((None, "soon", None), "--since soon"),
        ((None, None, "1 day"), "--last 1 day"),
        (("2026-02-03", None, "24h"), "choose one"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_selection(*wrong, None, None)


def test_tags_are_all_flags_or_all_numbers():
    records = [Record(ASKED, "a"), Record(ASKED, "b")]
    assert tag_values("t", lambda record: record["answer"] == "a", records) == [True, False]
    assert tag_values("t", lambda record: np.float32(2), records) == [2.0, 2.0]
    with pytest.raises(DataError, match="--tag t: gave NoneType"):
        tag_values("t", lambda record: None, records)
    assert load_tag("n", "builtins:len") is len
    for target in ("len", "no_such_module_here:f", "json:no_such_function"):
        with pytest.raises(UserError, match="--tag n="):
            load_tag("n", target)
