"""The curate configuration, files and dataset directories: what is read, what is refused, in which words."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_prep.config import CurateConfig, FilterConfig, SourceConfig
from data_prep.curate import check
from data_prep.dataset import read_split
from data_prep.files import BadRow, display_names, expand, read_rows
from posttrain.errors import DataError

ROW = {"text": "Once."}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "exactly one of `path` and `generator`"),
        ({"path": "a.jsonl", "generator": "support_desk", "rows": 1}, "exactly one of"),
        ({"generator": "suport_desk", "rows": 1}, "did you mean 'support_desk'"),
        ({"generator": "support_desk"}, "needs `rows`"),
        ({"generator": "support_desk", "rows": 1, "format": "hh"}, "belong to `path`"),
        ({"path": "a.jsonl", "options": {"a": 1}}, "belong to `generator`"),
        ({"path": "a.jsonl", "rows": 0}, "greater than 0"),
        ({"path": "a.jsonl", "split": "test"}, "belong to `hub`"),
        ({"path": "hub:a/b", "hub": "a/b"}, "give the data set once"),
        ({"hub": "a/b@v1", "revision": "v1"}, "give the revision once"),
        ({"hub": "a/b", "read": {"header": True}}, "`read` belongs to `path`"),
        ({"path": "a.csv", "read": {"encoding": "latin-9000"}}, "no text encoding 'latin-9000'"),
        ({"path": "a.csv", "read": {"encoding": "hex"}}, "no text encoding 'hex'"),
        ({"path": "a.jsonl", "formatt": "hh"}, "formatt"),
        ({"path": "a.jsonl", "format": "csv"}, "'messages'"),
    ],
)
def test_source_is_refused(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SourceConfig.model_validate(source)


@pytest.mark.parametrize("block", [{"sources": []}, {"kind": "chat"}, {"split": {"eval_fraction": 1.0}}])
def test_curate_is_refused(block: dict[str, Any]) -> None:
    good = {"kind": "text", "sources": [{"path": "a.jsonl"}]}
    CurateConfig.model_validate(good)
    with pytest.raises(ValidationError):
        CurateConfig.model_validate(good | block)


def test_filter_bounds_must_be_ordered() -> None:
    with pytest.raises(ValidationError, match="larger than max_chars"):
        FilterConfig(min_chars=9, max_chars=3)


def test_a_hub_source_in_its_spellings() -> None:
    for source in (
        {"path": "hub:owner/name", "revision": "v1"},
        {"hub": "owner/name", "revision": "v1"},
        {"hub": "owner/name@v1"},
    ):
        config = SourceConfig.model_validate({**source, "split": "test"})
        assert (config.hub, config.path, config.revision) == ("owner/name@v1", None, None)
        assert SourceConfig.model_validate(config.model_dump()) == config


def test_check_names_the_options_of_a_generator() -> None:
    source = {"generator": "support_desk", "rows": 3, "options": {"label_nois": 0.1}}
    config = CurateConfig.model_validate({"kind": "preference", "sources": [source]})
    (problem,) = check(config, "tiny.yaml: stages.prefs")
    assert problem.where == "tiny.yaml: stages.prefs.sources.0.options"
    assert "label_nois" in problem.message and "label_noise" in problem.message


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=f"did you mean {tmp_path / 'train.jsonl'}"):
        expand(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=f"did you mean {tmp_path}"):
        expand(f"{tmp_path}x/train.jsonl")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*.parquet", "no file matches"),
        ("", "is a folder without data files .it holds broken.jsonl, loop.jsonl, notes.md"),
        ("notes.md", "cannot read this file type"),
        ("pipe.jsonl", "neither a regular file nor a folder"),
        ("broken.jsonl", "is a link to nowhere, which is not there"),
        ("loop.jsonl", "is a link that leads to itself"),
    ],
)
def test_expand_refuses(tmp_path: Path, pattern: str, says: str) -> None:
    (tmp_path / "notes.md").write_text("x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match=says):
        expand(str(tmp_path / pattern))


def test_globs_are_sorted_and_names_do_not_depend_on_the_place(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "a/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = expand(str(tmp_path / "**/*.jsonl"))
    assert list(display_names(files).values()) == ["a/1.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert list(display_names(files[:1]).values()) == ["1.jsonl"]


def _save(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = ".jsonl" in path.name
    raw = ("\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": "ä"}, {"text": "b"}]
    assert [row for _, row in read_rows(_save(tmp_path / name, rows))] == rows


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert list(read_rows(file)) == [(1, {"text": "a"}), (3, {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b"[1]", "not_an_object"),
        (b"\x00", "malformed_json"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    (_, first), (number, bad), (_, last) = read_rows(file)
    assert (first, last, number) == ({"text": "a"}, {"text": "b"}, 2)
    assert isinstance(bad, BadRow) and bad.reason == reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", b'{"text": "a"}\n', "damaged or truncated gzip"),
        ("a.json", b'{"text": "a"\n', "rename it to .jsonl"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of objects: a, b"),
        ("a.json", b'{"text": "a"}', "holds one dict, not a list"),
        ("a.json", b'{"a": "\xff"}', "not UTF-8"),
        ("a.csv", b"q,q\n1,2\n", "names 'q' more than once"),
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / name))


def test_read_split(conversation_data: Path) -> None:
    data = read_split(conversation_data, "eval", "conversation")
    assert data.num_rows == 16
    assert data[0]["messages"][-1]["role"] == "assistant"
    assert read_split(conversation_data, "train").num_rows == 48


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda at: (at / "eval.parquet").unlink(), "eval.parquet: no such file"),
        (lambda at: (at / "eval.parquet").write_bytes(b"x"), "cannot be read as parquet"),
        (lambda at: (at / "dataset.json").write_text("{"), "not valid JSON"),
        (
            lambda at: pq.write_table(pa.table({"text": ["a"]}), at / "eval.parquet"),
            "lacks the column messages",
        ),
        (
            lambda at: (at / "dataset.json").write_text('{"kind": "chat"}'),
            "holds chat rows, but conversation",
        ),
    ],
)
def test_read_split_refuses(
    tmp_path: Path,
    write_dataset: Callable[..., Path],
    make_rows: dict[str, Callable[..., list[dict[str, Any]]]],
    spoil: Callable[[Path], None],
    says: str,
) -> None:
    rows = make_rows["conversation"](4, 0)
    data = write_dataset(tmp_path / "data", "conversation", rows, rows)
    spoil(data)
    with pytest.raises(DataError, match=says):
        read_split(data, "eval", "conversation")


def test_read_split_wrong_kind_missing_directory_and_no_rows(
    tmp_path: Path,
    conversation_data: Path,
    write_dataset: Callable[..., Path],
    make_rows: dict[str, Callable[..., list[dict[str, Any]]]],
) -> None:
    with pytest.raises(DataError, match="holds conversation rows, but preference rows are needed"):
        read_split(conversation_data, "train", "preference")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="holds no known kind of rows"):
        read_split(tmp_path, "train")
    with pytest.raises(DataError, match="no such dataset directory"):
        read_split(conversation_data / "gone", "train", "preference")
    empty = write_dataset(tmp_path / "data", "text", make_rows["text"](2, 0), [])
    with pytest.raises(DataError, match="has no rows"):
        read_split(empty, "eval", "text")


def test_nothing_here_imports_torch() -> None:
    heavy = {
        "data_prep.dataset, data_prep.config, data_prep.tiny.world": {"pyarrow"},
        "data_prep.curate": {"torch", "transformers", "datasets", "scipy", "sklearn"},
    }
    for modules, names in heavy.items():
        code = f"import sys, {modules}; print(sorted({names} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
