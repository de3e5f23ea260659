"""Broken inputs, one a row of the tables: what is said, what is kept, and that nothing is lost.

Every row read is a record or a reject (in = out + rejects), and every reject names its line.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.config import SourceConfig
from data_prep.files import display_names, expand
from data_prep.ingest import Reject, read_file
from data_prep.records import Record
from posttrain.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TALK = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
MB = 1 << 20


def ingest(path: Path, kind: str, **source: Any) -> tuple[int, list[tuple[int, Record]], list[Reject]]:
    """(rows read, (line, record) pairs, rejects) of everything that `path` names."""
    config = SourceConfig.model_validate({"path": str(path), **source})
    files = expand(str(path))
    names = display_names(files)
    rows, kept, rejects = 0, [], []
    for file in files:
        report, pairs = read_file(config, kind, file, names[file], None)  # type: ignore[arg-type]
        for line, record in pairs:
            if isinstance(record, Reject):
                rejects.append(record)
            else:
                kept.append((line, record))
        rows += report.rows
    return rows, kept, rejects


def jsonl(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def incompressible(rows: int) -> bytes:
    return jsonl(*({"text": os.urandom(40).hex()} for _ in range(rows)))


def cut(packed: bytes) -> bytes:
    return packed[: len(packed) // 2]


def changed(packed: bytes) -> bytes:
    """With another checksum at its end."""
    return packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def text_jsonl(*middle: bytes) -> bytes:
    return b'{"text": "a"}\n' + b"".join(line + b"\n" for line in middle) + b'{"text": "b"}\n'


def text_list(*middle: bytes) -> bytes:
    return b"[" + b", ".join((b'{"text": "a"}', *middle, b'{"text": "b"}')) + b"]"


DEEP = b"[" * 10_000 + b"]" * 10_000
TOOL = {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}
DIFFERENT = {"chosen": [USER, ANSWER], "rejected": [ANSWER, ANSWER]}
Expected = list[tuple[int, str, str]]
ROWS: list[Any] = []


def bad(
    title: str,
    name: str,
    content: bytes,
    reason: str,
    words: str,
    *,
    kind: str = "text",
    kept: int = 2,
    line: int = 2,
    also: Expected | None = None,
    **source: Any,
) -> None:
    """One row of the table. kept: records, -1 for some; line: -1 for the one after the last record."""
    expected = [(line, reason, words), *(also or [])]
    ROWS.append(pytest.param(name, content, kind, source, kept, expected, id=title))


def bad_line(title: str, line: bytes, reason: str, words: str, **settings: Any) -> None:
    bad(title, "a.jsonl", text_jsonl(line), reason, words, **settings)


def bad_item(title: str, item: bytes, reason: str, words: str, **settings: Any) -> None:
    bad(title, "a.json", text_list(item), reason, words, **settings)


def bad_row(title: str, row: Any, reason: str, words: str, *, after: Any = TALK, **settings: Any) -> None:
    settings = {"kind": "conversation", "kept": 1, **settings}
    bad(title, "a.jsonl", jsonl(after, row), reason, words, **settings)


def bad_cells(title: str, rows: bytes, reason: str, words: str, **settings: Any) -> None:
    settings = {"kind": "conversation", "kept": 1, **settings}
    bad(title, "a.csv", b"prompt,completion\n" + rows, reason, words, **settings)


bad_line("bad JSON", b'{"text": ', "malformed_json", "Expecting")
bad_line("NUL byte", b'{"text": "a\0"}', "malformed_json", "NUL")
bad_line("only NULs", bytes(900), "malformed_json", "byte 0 is NUL")
bad_line("10k levels", b'{"text": ' + DEEP + b"}", "malformed_json", "nested too deeply")
bad_line("bad byte", b'{"text": "\xff"}', "invalid_utf8", "byte 10 is not UTF-8")
bad_line("latin-1 among UTF-8", '{"text": "ä"}'.encode("latin-1"), "invalid_utf8", "byte 10 is not UTF-8")
bad_line("a list", b"[1]", "not_an_object", "got list")
bad_line("a number", b"7", "not_an_object", "got int")
bad_line("null", b"null", "not_an_object", "NoneType")
bad_line("two objects in a line", b"{} {}", "malformed_json", "Extra data")
bad_line("50 MB line", b'{"text": "' + b"x" * 50 * MB + b'"}', "oversized_row", f"{50 * MB + 12:,} bytes")
bad_line("line over a limit", b'{"text": "' + b"x" * 99, "oversized_row", "is 90", read={"max_row_bytes": 90})
bad_line("huge number", b'{"text": ' + b"9" * 5000 + b"}", "malformed_json", "4300")
bad_line("lone surrogate", b'{"text": "\\ud800"}', "invalid_unicode", "surrogate")
bad("cut line", "a.jsonl", text_jsonl() + b'{"text": "c', "malformed_json", "Unterminated", line=3)

UTF16 = [text.encode("utf-16-le") for text in ("one\n", "two\n")]
bad("UTF-16, lone half", "a.txt", b"\xff\xfe" + b"\0\xd8\n\0".join(UTF16), "invalid_utf8", "not UTF-8")
bad("UTF-16, odd length", "a.txt", b"\xff\xfe" + b"".join(UTF16) + b"A", "invalid_utf8", "UTF-8", line=3)
bad("cp1252", "a.txt", b"1\n\x81\n\xe4\n", "invalid_utf8", "byte 0", read={"encoding": "cp1252"})
bad("NUL in a text", "a.txt", b"one\nt\0wo\nthree\n", "nul_byte", "character 1 is NUL")

GZ, ZST = gzip.compress(incompressible(2000)), zst(incompressible(9000))
BOMB = gzip.compress(b'{"text": "a"}\n' + b" " * 80 * MB)
bad("gzip cut", "a.jsonl.gz", cut(GZ), "truncated_file", "gzip file breaks off here", kept=-1, line=-1)
bad("gzip changed", "a.jsonl.gz", changed(GZ), "damaged_file", "incorrect data check", kept=1999, line=2000)
bad("zstd cut", "a.jsonl.zst", cut(ZST), "truncated_file", "zstd file breaks off", kept=-1, line=-1)
bad("gzip bomb", "a.jsonl.gz", BOMB, "decompression_ratio", "unpack to more than", kept=1)
bad("zstd bomb", "a.txt.zst", zst(b"one\n" + bytes(300 * MB)), "decompression_ratio", "ratio 250", kept=1)

bad_item("bad item", b'{"text": "x" "y"}', "malformed_json", "delimiter")
bad_item("item with a NUL", b'{"text": "x\0"}', "malformed_json", "NUL")
bad_item("item of 10k levels", b'{"text": ' + DEEP + b"}", "malformed_json", "nested too deeply")
bad_item("item with a bad byte", b'{"text": "\xff"}', "invalid_utf8", "character 10")
bad_item("item of 50 MB", b'{"text": "' + b"x" * 50 * MB + b'"}', "oversized_row", "read.max_row_bytes")
bad_item("item that is a list", b"[[], 3]", "not_an_object", "got list")
bad_item("item that is a text", b'"x, y]"', "not_an_object", "got str")
bad("list not closed", "a.json", text_list()[:-1], "truncated_file", "list is not closed", line=3)
bad("list cut in a row", "a.json", text_list()[:-6], "truncated_file", "breaks off in this row", kept=1)
bad("text after a list", "a.json", text_list() + b" and more", "malformed_json", "after the end", line=3)

bad_cells("quote never closed", b'1,"one\n2,two\n3,three\n', "malformed_csv", "unexpected end", kept=2)
bad_cells("text after a quote", b'1,"one"x\n2,two\n', "malformed_csv", "expected after")
bad_cells("short row", b'1,"one\nand more"\n2\n', "ragged_row", "1 cells, the header has 2", line=4)
bad_cells("long row", b"1,one\n2,two,three\n", "ragged_row", "3 cells, the header has 2", line=3)
bad_cells("bad byte in a cell", b"1,\xff\n2,two\n", "invalid_utf8", "byte 2")
bad_cells("NUL in a cell", b"1,\0\n2,two\n", "nul_byte", "character 2")
bad_cells("empty answer in a cell", b"1,\n2,two\n", "empty_content", "assistant")

bad_row("unknown role", talk(("wizard", "Hi"), ("assistant", "x")), "unknown_role", "'wizard'")
bad_row("no role", {"messages": [{"content": "Hi"}, ANSWER]}, "missing_field", "'role'")
bad_row("roles in a row", talk(("user", "a"), ("user", "b")), "roles_not_alternating", "turn 2 is 'user'")
bad_row("no turns", {"messages": []}, "no_turns", "empty list")
bad_row("empty message", talk(("user", " "), ("assistant", "x")), "empty_content", "user turn is empty")
bad_row("content is a number", talk(("user", 7), ("assistant", "x")), "wrong_type", "got int")
bad_row("messages are a text", {"messages": "Hi"}, "wrong_type", "got str")
bad_row("an image", talk(("user", [{"type": "image"}])), "unsupported_content", "'image'")
bad_row(
    "reasoning", talk(("user", [{"type": "reasoning", "value": "x"}])), "unsupported_content", "'reasoning'"
)
bad_row("no answer", {"messages": [USER]}, "last_turn_not_assistant", "'user'")
bad_row("tool call without a name", TOOL, "wrong_type", "needs a name")
bad_row(
    "sides equal", {**PAIR, "rejected": "Hello "}, "identical_sides", "Hello", after=PAIR, kind="preference"
)
bad_row("prompts differ", DIFFERENT, "prompt_mismatch", "differs", after=PAIR, kind="preference")
bad_row(
    "label is a text",
    {**TALK, "label": "good"},
    "label_not_boolean",
    "got str",
    after={**TALK, "label": True},
    kind="unpaired_preference",
)
bad_row(
    "no group",
    {"text": "b"},
    "missing_group",
    "'who'",
    after={"text": "a", "who": 1},
    kind="text",
    group_column="who",
)
bad_row(
    "nothing at a place",
    {"a": []},
    "missing_field",
    "'text'",
    after={"a": [{"b": "x"}]},
    kind="text",
    format="text",
    columns={"text": "a[0].b"},
)


@pytest.mark.parametrize(("name", "content", "kind", "source", "kept", "expected"), ROWS)
def test_bad_rows_are_rejected_and_good_ones_kept(
    tmp_path: Path,
    name: str,
    content: bytes,
    kind: str,
    source: dict[str, Any],
    kept: int,
    expected: Expected,
) -> None:
    (tmp_path / name).write_bytes(content)
    rows, records, rejects = ingest(tmp_path / name, kind, **source)
    assert rows == len(records) + len(rejects)
    assert len(records) == kept if kept >= 0 else records
    for reject, (line, reason, words) in zip(rejects, expected, strict=True):
        assert reject.file == name and reject.reason == reason and words in reject.detail
        assert reject.line == (line if line > 0 else records[-1][0] + 1)


def test_a_record_that_goes_on_too_long_costs_its_own_lines_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n1,"' + b"x\n" * 99 + b'"\n2,two\n')
    rows, records, rejects = ingest(tmp_path / "a.csv", "conversation", read={"max_row_bytes": 60})
    assert (rows, len(records), len(rejects)) == (101, 1, 100)
    assert {reject.reason for reject in rejects} == {"malformed_csv", "ragged_row"}


def test_the_data_behind_gzip_that_turns_to_noise_are_not_read_on_for_ever(tmp_path: Path) -> None:
    packed = gzip.compress(incompressible(30_000))
    middle = len(packed) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:middle] + bytes(64) + packed[middle + 64 :])
    rows, records, rejects = ingest(tmp_path / "a.jsonl.gz", "text")
    assert rows == len(records) + len(rejects) and len(records) > 10_000
    assert rejects[-1].reason == "damaged_file"


def table(tmp_path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def text_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def link(name: str, target: str) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        (tmp_path / name).symlink_to(target)
        return tmp_path / name

    return make


def footless(tmp_path: Path) -> Path:
    file = table(tmp_path, {"text": ["a"] * 100})
    file.write_bytes(file.read_bytes()[:-8])
    return file


FILES: list[tuple[str, Callable[[Path], Path], str, str]] = [
    ("not gzip", text_file("a.jsonl.gz", b'{"text": "a"}\n'), "text", "damaged or truncated gzip"),
    ("not zstd", text_file("a.jsonl.zst", b'{"text": "a"}\n'), "text", "damaged or truncated zstd"),
    ("one object", text_file("a.json", b'{"text": "a"}'), "text", "holds one dict, not a list"),
    ("two lists", text_file("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}'), "text", "several lists"),
    ("no JSON", text_file("a.json", b"text"), "text", "malformed JSON"),
    ("unknown fields", text_file("a.jsonl", b'{"body": "a"}\n'), "text", "cannot tell the format .* body"),
    (
        "ambiguous",
        text_file("a.jsonl", jsonl({**TALK, "prompt": "Hi", "completion": "Bye"})),
        "conversation",
        "ambiguous, the row can be read as messages and as prompt_completion",
    ),
    ("wrong kind", text_file("a.jsonl", b'{"text": "a"}\n'), "preference", "cannot become kind preference"),
    ("column named twice", text_file("a.csv", b"q,q\na,b\n"), "text", "'q' more than once"),
    ("unknown type", text_file("a.docx", b"x"), "text", "cannot read this file type"),
    ("parquet cut", footless, "text", "not a readable parquet file"),
    ("no parquet", text_file("a.parquet", b"PAR1 no"), "text", "not a readable parquet file"),
    ("unreadable", link("a.jsonl", "/proc/self/mem"), "text", "cannot be read .Input/output error"),
    ("link to itself", link("a.jsonl", "a.jsonl"), "text", "is a link that leads to itself"),
    ("link to nowhere", link("a.jsonl", "b.jsonl"), "text", "is a link to b.jsonl, which is not there"),
    (
        "parquet of another schema",
        lambda at: table(at, {"a": [1], "b": [2.0]}),
        "text",
        "from the fields a, b",
    ),
    ("empty folder", lambda at: at, "text", "a folder without data files"),
]


@pytest.mark.parametrize(("make", "kind", "says"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_unusable_files_are_refused_with_a_remedy(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, says: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        ingest(path, kind)
    assert str(tmp_path) in str(caught.value) and "\n    " in str(caught.value)


def test_parquet_with_wrong_types_and_bytes_that_are_not_text(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    rows, records, rejects = ingest(table(tmp_path, {"text": bad}), "text")
    assert (rows, len(records)) == (2, 1)
    assert [(at.line, at.reason) for at in rejects] == [(2, "invalid_utf8")]
    rows, records, rejects = ingest(table(tmp_path, {"text": [7, None]}), "text")
    assert (rows, len(records)) == (2, 0)
    assert [at.reason for at in rejects] == ["wrong_type", "missing_field"]


def test_a_large_parquet_row_is_rejected(tmp_path: Path) -> None:
    file = table(tmp_path, {"text": ["a", "x" * 5000, "b"]})
    rows, records, rejects = ingest(file, "text", read={"max_row_bytes": 4000})
    assert (rows, [record.turns()[0][1] for _, record in records]) == (3, ["a", "b"])
    assert [(at.line, at.reason) for at in rejects] == [(2, "oversized_row")]


def test_loops_of_links_are_entered_once(tmp_path: Path) -> None:
    """Two loops in each of two folders: `glob.glob` would find 2**40 paths."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "a"}\n')
        (tmp_path / name / "up").symlink_to("..")
        (tmp_path / name / "back").symlink_to(".")
    for pattern in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path / "**"):
        rows, records, rejects = ingest(pattern, "text")
        assert (rows, len(records), rejects) == (2, 2, [])


def test_a_folder_leaves_out_licences_and_hidden_files(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "README.txt", ".hidden.jsonl", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a"}\n')
    assert [file.name for file in expand(str(tmp_path))] == ["a.jsonl"]


def test_an_unreadable_file_in_a_folder_stops_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
        ingest(tmp_path, "text")


def test_a_labelled_row_makes_its_file_one_of_labelled_answers(tmp_path: Path) -> None:
    """Read as a conversation, the bad answer would become a demonstration."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TALK, TALK, {**TALK, "label": False}))
    with pytest.raises(
        DataError, match="holds unpaired_preference rows, which cannot become kind conversation"
    ):
        ingest(tmp_path / "a.jsonl", "conversation")
    rows, records, rejects = ingest(tmp_path / "a.jsonl", "prompt")
    assert (rows, [line for line, _ in records], len(rejects)) == (3, [3], 2)


def test_a_file_that_begins_with_many_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 150_000 + jsonl(TALK))
    rows, records, rejects = ingest(tmp_path / "a.jsonl", "conversation")
    assert (rows, [line for line, _ in records], len(rejects)) == (150_001, [150_001], 150_000)


def test_most_rows_decide_the_format_and_the_others_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"prompt": "Hi"}, TALK, TALK, {"x": 1}))
    source = SourceConfig.model_validate({"path": str(tmp_path / "a.jsonl")})
    report, pairs = read_file(source, "conversation", tmp_path / "a.jsonl", "a.jsonl", None)
    found = [record.reason if isinstance(record, Reject) else record.kind for _, record in pairs]
    assert found == ["missing_field", "conversation", "conversation", "missing_field"]
    assert report.format == "messages"
    assert report.why.startswith("messages, because 2 of the first 4 rows have messages")
    assert "1 prompt, 1 no known format" in report.why
