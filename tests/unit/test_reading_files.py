"""Reading good files of every kind: compression, encodings, layouts, tables, memory; nested columns."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.columns import lookup, prepared
from data_prep.config import ReadConfig, SourceConfig
from data_prep.files import BadRow, FileFacts, read_rows
from data_prep.json_rows import json_rows
from data_prep.streams import lines

ROWS = [{"text": 'one, "two"\nthree'}, {"text": "ä 漢 \U0001f600"}]


def facts_and_rows(path: Path, **read: Any) -> tuple[FileFacts, list[Any]]:
    facts = FileFacts()
    return facts, [row for _, row in read_rows(path, ReadConfig(**read), facts)]


def contents(suffix: str) -> str:
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, ROWS))
    if suffix == ".json":
        return json.dumps(ROWS, ensure_ascii=False, indent=2)
    quoted = (row["text"].replace('"', '""') for row in ROWS)
    return "text\n" + "".join(f'"{text}"\n' for text in quoted)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_compression_and_encoding_are_told_by_the_bytes(
    tmp_path: Path, suffix: str, packed: str, encoding: str
) -> None:
    raw = contents(suffix).encode(encoding)
    raw = gzip.compress(raw) if packed == ".gz" else raw
    raw = zstandard.ZstdCompressor().compress(raw) if packed == ".zst" else raw
    file = tmp_path / f"a{suffix}{packed}"
    file.write_bytes(raw)
    facts, rows = facts_and_rows(file)
    assert rows == ROWS
    assert facts.compression == {"": "none", ".gz": "gzip", ".zst": "zstd"}[packed]
    assert facts.encoding == {"utf-8-sig": "utf-8"}.get(encoding, encoding)


def test_a_configured_encoding_and_none_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text\nä\n".encode("latin-1"))
    assert facts_and_rows(file, encoding="latin-1")[1] == [{"text": "ä"}]
    (bad,) = facts_and_rows(file)[1]
    assert isinstance(bad, BadRow) and bad.reason == "invalid_utf8"


@pytest.mark.parametrize(
    ("name", "text", "layout", "rows"),
    [
        ("a.jsonl", '\n [\n {"x": 1},\n {"x": 2}]', "list", [{"x": 1}, {"x": 2}]),
        ("a.json", '{"x": 1}\n{"x": 2}\n', "lines", [{"x": 1}, {"x": 2}]),
        ("a.json", '{"version": "1", "data": [{"x": 1}, {"x": 2}]}', "object", [{"x": 1}, {"x": 2}]),
        ("a.json", '{"k": {"x": 1}, "l": {"x": 2}}', "object", [{"id": "k", "x": 1}, {"id": "l", "x": 2}]),
        ("a.json", "", "", []),
        ("a.json", "[]", "list", []),
        ("a.csv", "", "csv", []),
        ("a.csv", "a;b\n1;2,5\n", "csv", [{"a": "1", "b": "2,5"}]),
        ("a.csv", "a,b\r\n1,\r\n\r\n", "csv", [{"a": "1", "b": ""}]),
        ("a.csv", "a,b\r1,2\r3,4\r", "csv", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("a.csv", ",b\nx,y\n", "csv", [{"column_1": "x", "b": "y"}]),
        (
            "a.csv",
            "what is 2+2?,4\nand 3+3?,6\n",
            "csv",
            [{"column_1": "what is 2+2?", "column_2": "4"}, {"column_1": "and 3+3?", "column_2": "6"}],
        ),
        (
            "a.csv",
            "prompt,completion,label\nx,y,True\n",
            "csv",
            [{"prompt": "x", "completion": "y", "label": True}],
        ),
        ("a.txt", "one\r\n\n  \ntwo", "text", [{"text": "one"}, {"text": "two"}]),
    ],
)
def test_layouts(tmp_path: Path, name: str, text: str, layout: str, rows: list[Any]) -> None:
    (tmp_path / name).write_text(text, newline="")
    facts, found = facts_and_rows(tmp_path / name)
    assert (facts.layout, found) == (layout, rows)


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("line", [(2, "one"), (3, "two"), (5, "three")]),
        ("paragraph", [(2, "one\ntwo"), (5, "three")]),
        ("file", [(2, "one\ntwo\n\nthree")]),
    ],
)
def test_units_of_text(tmp_path: Path, unit: Any, rows: list[tuple[int, str]]) -> None:
    (tmp_path / "a.txt").write_text("\none\ntwo\n\nthree\n")
    read = list(read_rows(tmp_path / "a.txt", ReadConfig(text_unit=unit)))
    assert read == [(line, {"text": text}) for line, text in rows]


def test_a_text_that_is_too_large_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n" * 50)
    (bad,) = facts_and_rows(tmp_path / "a.txt", text_unit="file", max_row_bytes=99)[1]
    assert isinstance(bad, BadRow) and bad.reason == "oversized_row"


def test_a_header_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("2019,2020\n1,2\n")
    assert len(facts_and_rows(tmp_path / "a.csv")[1]) == 2
    assert facts_and_rows(tmp_path / "a.csv", header=True)[1] == [{"2019": "1", "2020": "2"}]


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(raw) + 1) for cut in cuts})
    return [raw[start:end] for start, end in zip([0, *places], [*places, len(raw)], strict=True)]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=6),
    st.lists(st.integers(0, 10_000), max_size=6),
    st.booleans(),
)
def test_a_list_reads_the_same_however_it_is_cut(rows: list[Any], cuts: list[int], escape: bool) -> None:
    """Chunks may end in the middle of an escape, of a character's bytes and of an item."""
    raw = json.dumps(rows, ensure_ascii=escape).encode()
    chunks = iter(pieces_of(raw, [cut + 1 for cut in cuts]))
    read = json_rows(Path("a.json"), chunks, 1 << 20, FileFacts())
    assert [row for _, row in read] == rows


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab\r", max_size=5), max_size=8), st.lists(st.integers(0, 99), max_size=4))
def test_lines_are_the_same_however_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    raw = "\n".join(["x", *texts]).encode()
    read = [line for _, line in lines(iter([raw[:2], *pieces_of(raw[2:], cuts)]), 1 << 20)]
    expected = raw.split(b"\n")
    assert read == (expected if expected[-1] else expected[:-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", {"b": [{"c": 1}]}),
        ("a.b[0].c", 1),
        ("x.y", 2),
        ("a.b[1].c", None),
        ("a.c.d", None),
        ("a[0]", None),
        ("a..b", None),
    ],
)
def test_lookup(name: str, value: Any) -> None:
    assert lookup({"a": {"b": [{"c": 1}]}, "x.y": 2}, name) == value


@pytest.mark.parametrize(
    ("turn", "think", "drop"),
    [
        ({"content": "4", "reasoning_content": "2+2"}, "<think>\n2+2\n</think>\n\n4", "4"),
        (
            {"content": [{"type": "reasoning", "value": "2+2"}, {"type": "text", "value": "4"}]},
            [{"type": "text", "value": "<think>\n2+2\n</think>\n\n4"}],
            [{"type": "text", "value": "4"}],
        ),
        ({"content": "4"}, "4", "4"),
    ],
)
def test_reasoning(turn: dict[str, Any], think: Any, drop: Any) -> None:
    for mode, content in (("think_tags", think), ("drop", drop)):
        source = SourceConfig.model_validate({"path": "a.jsonl", "reasoning": mode})
        row = prepared({"messages": [{"role": "assistant", **turn}]}, source)
        assert row["messages"] == [{"role": "assistant", "content": content}]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A list of 60 MB is read in a process whose memory grows by less than 25 MB while it reads."""
    words = [str(random.Random(0).random()) for _ in range(1000)]
    with (tmp_path / "a.json").open("w") as stream:
        stream.write("[" + ",\n".join([json.dumps({"text": " ".join(words)})] * 3200) + "]")
    code = (
        "import re, sys; from pathlib import Path; from data_prep.files import read_rows\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); rows = sum(1 for _ in read_rows(Path(sys.argv[1])))\n"
        "print(rows, peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.json")], capture_output=True, text=True, check=True
    )
    rows, grown = map(int, done.stdout.split())
    assert (tmp_path / "a.json").stat().st_size > 55 << 20
    assert rows == 3200 and grown < 25 << 10
