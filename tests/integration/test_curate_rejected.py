"""rejected.jsonl: every dropped row in full, by any cut into chunks, redacted where an operation redacts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.integration import curate_golden
from tests.integration.test_curate_sharded import PINNED, curated, pinned

SECRETS = ("ann@shop.example", "bob@x.example")


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def lines(out: Path, name: str = "rejected.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def test_every_dropped_row_is_there_in_full_and_nothing_else_changes(golden: Path, tmp_path: Path) -> None:
    """In one chunk, in many, and by two processes."""
    found = []
    for number, (rows, workers) in enumerate(((5_000, 1), (13, 1), (50, 2))):
        out = tmp_path / str(number)
        curated(golden, out, rows, workers=workers, rejected_rows=True, filters={"min_chars": 90})
        found.append(contents(out))
    assert found[0] == found[1] == found[2]
    said = lines(tmp_path / "0")
    drops = Counter(at["reason"] for at in lines(tmp_path / "0", "rejects.jsonl"))
    in_full = Counter(at["reason"] for at in said)
    assert drops - in_full == Counter({name: drops[name] for name in drops if name not in in_full})
    assert set(drops) - set(in_full) <= {"malformed_json", "empty_content", "identical_sides"}
    names = [each["op"] for each in curate_golden.OPERATIONS]
    for at in said:
        assert list(at) == ["file", "line", "step", "operation", "reason", "detail", "row"]
        assert at["operation"] == (
            {"duplicate": "dedup", "too_short": "filters"}.get(at["reason"])
            if at["step"] == 0
            else [*names, "split"][at["step"] - 1]
        )
        assert set(at["row"]) == {"id", "source", "group", "meta", "prompt", "chosen", "rejected"}
        assert at["row"]["source"] == f"{at['file']}:{at['line']}"
    assert {"dedup", "filters", "near_duplicates", "preference_checks"} <= {at["operation"] for at in said}


def test_off_writes_what_it_wrote(golden: Path, tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        curated(golden, tmp_path / name, 50, rejected_rows=on)
        assert pinned(tmp_path / name) == PINNED["all"]
    without, with_rows = contents(tmp_path / "off"), contents(tmp_path / "on")
    assert set(with_rows) - set(without) == {"rejected.jsonl"}
    assert without.items() <= with_rows.items()


def test_planted_secrets_are_redacted_in_every_column(golden: Path, tmp_path: Path) -> None:
    """Without a redacting operation they are there, ids, groups and meta of dropped rows included."""
    curated(golden, tmp_path / "redacted", 50, rejected_rows=True)
    for file in sorted((tmp_path / "redacted").iterdir()):
        assert not [secret for secret in SECRETS if secret.encode() in file.read_bytes()], file.name
    plain = [each for each in curate_golden.OPERATIONS if each["op"] not in ("pii", "decontaminate")]
    curated(golden, tmp_path / "plain", 50, rejected_rows=True, operations=plain)
    text = (tmp_path / "plain" / "rejected.jsonl").read_text(encoding="utf-8")
    assert all(secret in text for secret in SECRETS)
    redacted = lines(tmp_path / "redacted")
    assert "[EMAIL_1]" in json.dumps([at["row"]["prompt"] for at in redacted])
    assert "..." in json.dumps([at["row"]["prompt"] for at in redacted])
