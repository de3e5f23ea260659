"""`posttrain drift`, from a data set and a day of traffic to verdict, exit code, report and metrics."""

from __future__ import annotations

import json
import random
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from drift_world import SHIFTS, desk
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import UserError
from serving.drift import baseline as baselines
from serving.drift.compare import compare
from serving.drift.instruments import Settings, load_instruments
from serving.drift.measure import measure
from serving.drift.records import Record

DAY = 400


@pytest.fixture(scope="module")
def baseline():
    return baselines.fit(
        desk(2000, seed=1),
        {"path": "desk", "kind": "conversation", "content_hash": "0" * 64},
        load_instruments(Settings.of()),
    )


@pytest.fixture(scope="module")
def clean_day():
    return desk(DAY, seed=2)


def compared(baseline, records, **options):
    instruments = load_instruments(baseline.settings)
    return compare(baseline, baseline.complete(measure(records, instruments)), **options)


def write_jsonl(path: Path, records: Sequence[Record], **more) -> Path:
    rows = [{"messages": record.messages, "answer": record.answer} | more for record in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, baseline):
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    baselines.save(baseline, path)
    return path


def drift(*arguments):
    return CliRunner().invoke(app, ["drift", *map(str, arguments)])


def test_a_day_like_the_reference_does_not_alarm(baseline, clean_day):
    result = compared(baseline, clean_day)
    assert result.alarms == [] and len(result.findings) > 10
    assert "finish_reason" not in result.left_out


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_alarms_on_the_feature_that_it_changes(baseline, clean_day, name):
    shift, feature = SHIFTS[name]
    result = compared(baseline, shift(clean_day, random.Random(3)))
    assert feature in {finding.feature for finding in result.alarms}


def test_a_difference_that_is_sure_and_trivial_is_no_alarm(baseline):
    """2,000 records of which 2 % are in German: significant, under the floor of PSI. With 20 %, over it."""
    records, (shift, _) = desk(2000, seed=5), SHIFTS["language"]
    columns = {rows: [*shift(records[:rows], random.Random(3)), *records[rows:]] for rows in (200, 2000)}
    found = {
        rows: next(
            f for f in compared(baseline, mixed, correction="bh").findings if f.feature == "prompt_language"
        )
        for rows, mixed in columns.items()
    }
    assert found[200].p_corrected < 0.001 and found[2000].p_corrected < 0.001
    assert (found[200].verdict, found[2000].verdict) == ("small", "drift")


def test_a_saved_baseline_gives_the_same_and_holds_no_text(baseline, saved, clean_day):
    again = baselines.load(saved)
    shifted = SHIFTS["topic"][0](clean_day, random.Random(3))
    assert compared(again, shifted).as_json() == compared(baseline, shifted).as_json()
    text = saved.read_text()
    assert not any(word in text for word in ("parcel", "refund", "delivery", "Sorry"))
    assert again.source["content_hash"] == "0" * 64


def test_exit_codes_are_for_cron(tmp_path, saved, clean_day):
    clean = write_jsonl(tmp_path / "clean.jsonl", clean_day)
    result = drift(clean, "--reference", saved, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["drift"] is False
    shifted = write_jsonl(tmp_path / "german.jsonl", SHIFTS["language"][0](clean_day, random.Random(3)))
    result = drift(shifted, "--reference", saved)
    assert result.exit_code == 3 and result.stdout.startswith("DRIFT: ")
    few = write_jsonl(tmp_path / "few.jsonl", clean_day[:20])
    result = drift(few, "--reference", saved)
    assert result.exit_code == 2 and "20 records" in result.stderr and "at least 50" in result.stderr
    for arguments, complaint in (
        ((clean,), "--reference"),
        ((tmp_path / "no.jsonl", "--reference", saved), "no such file"),
        ((clean, "--reference", tmp_path / "no"), "no such file or directory"),
        ((clean, "--reference", few), "20 records are too few for a reference"),
        ((clean, "--reference", saved, "--alpha", "2"), "--alpha 2"),
        ((clean, "--reference", saved, "--model", "desk"), "need the gateway's database"),
        ((clean, "--reference", saved, "--prometheus", tmp_path / "x.txt"), "ends in .prom"),
        (("baseline", clean), "a file to write"),
        ((clean, "--reference", saved, "--tag", "x"), "is not NAME=module:function"),
        ((clean, "--reference", saved, "--tag", "x=json:dumps"), "was made with the tags none"),
    ):
        result = drift(*arguments)
        assert (result.exit_code, complaint in result.stderr) == (2, True), result.output


def fill(path: Path, days: dict[str, list[Record]]) -> Path:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE samples(request_id TEXT PRIMARY KEY, day TEXT, time REAL, model TEXT, "
            "version TEXT, messages TEXT, answer TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, "
            "finish_reason TEXT, redactions TEXT, flag TEXT, comment TEXT)"
        )
        for day, records in days.items():
            rows = [
                (f"{day}-{i}", day, 1e9 + i, "desk", "1", json.dumps(r.messages), r.answer, "stop", "{}")
                for i, r in enumerate(records)
            ]
            columns = "request_id, day, time, model, version, messages, answer, finish_reason, redactions"
            database.executemany(
                f"INSERT INTO samples({columns}) VALUES({', '.join('?' * 9)})",
                rows,
            )
    return path


def test_the_gateways_database_gives_a_report_with_the_days_before_and_metrics(tmp_path, saved, clean_day):
    asked = [{"role": "user", "content": "<script>alert(1)</script> Zwölf Boxkämpfer jagen Viktor quer."}]
    shifted = [*(replace(record, messages=asked) for record in clean_day[:80]), *clean_day[80:]]
    days = {"2026-01-01": desk(DAY, seed=4), "2026-01-02": shifted}
    path = fill(tmp_path / "monitor.sqlite", days)
    options = ("--reference", saved, "--model", "desk", "--output", tmp_path / "out")
    result = drift(path, *options, "--prometheus", tmp_path / "drift.prom")
    assert result.exit_code == 3, result.output
    written = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert written["selection"] == "day 2026-01-02, model desk"
    assert written["left_out"]["finish_reason"] == "the reference lacks it"
    trend = {day: bool(found["alarms"]) for day, found in written["trend"].items()}
    assert trend == {"2026-01-01": False, "2026-01-02": True}
    report = tmp_path / "out" / "report.html"
    assert stat.S_IMODE(report.stat().st_mode) == 0o600, "it quotes what the database keeps for its owner"
    page = report.read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>" not in page
    assert "Boxkämpfer" in page and "http" not in page.replace("http-equiv", "")
    metrics = (tmp_path / "drift.prom").read_text()
    assert 'posttrain_drift_alarm{model="desk",version=""} 1.0' in metrics
    assert 'posttrain_drift_feature_alarm{feature="prompt_language",model="desk",version=""} 1.0' in metrics
    result = drift(path, *options, "--day", "2026-01-01", "--prometheus", tmp_path / "drift.prom")
    assert result.exit_code == 0, result.output
    assert 'posttrain_drift_alarm{model="desk",version=""} 0.0' in (tmp_path / "drift.prom").read_text()
    result = drift(path, *options, "--day", "2026-01-09")
    assert result.exit_code == 2 and "2026-01-01: 400" in result.stderr


def test_a_good_day_of_the_database_can_be_the_baseline(tmp_path):
    path = fill(tmp_path / "m.sqlite", {"2026-01-01": desk(DAY, seed=4), "2026-01-02": desk(DAY, seed=6)})
    made = tmp_path / "good.json"
    result = drift("baseline", path, "--day", "2026-01-01", "--output", made)
    assert result.exit_code == 0, result.output
    assert json.loads(made.read_text())["rows"] == DAY
    result = drift(path, "--reference", made, "--json")
    assert result.exit_code == 0, result.output
    assert "finish_reason" in json.loads(result.stdout)["left_out"]  # "stop" everywhere


def test_tokenizer_reward_model_and_tag_are_features(tmp_path, tiny_model_dir, tiny_reward_dir, clean_day):
    reference = write_jsonl(tmp_path / "reference.jsonl", desk(260, seed=1))
    shouting = [Record(r.messages, r.answer.upper()) for r in clean_day[:120]]
    traffic = write_jsonl(tmp_path / "traffic.jsonl", shouting)
    made = tmp_path / "baseline.json"
    things = ("--tokenizer", tiny_model_dir, "--reward-model", tiny_reward_dir)
    tag = ("--tag", "shouts=drift_tags:shouts")
    result = drift("baseline", reference, "--output", made, *things, *tag)
    assert result.exit_code == 0, result.output
    result = drift(traffic, "--reference", made, "--json")
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert {"tag_shouts", "score"} <= set(found["alarms"])
    baseline = baselines.load(made)
    with pytest.raises(UserError, match="--tokenizer .*: the baseline was made with another one"):
        Settings(tokenizer={"path": "x", "hash": "0"}).moved_to(tiny_model_dir, None, None)
    with pytest.raises(UserError, match="--embedding .*: the baseline was made without one"):
        baseline.settings.moved_to(None, tiny_model_dir, None)


def test_what_only_one_side_has_is_left_out_with_a_word(baseline, clean_day):
    prompts = [Record(record.messages, None) for record in clean_day]
    result = compared(baseline, prompts)
    assert result.alarms == []
    assert result.left_out["answer_tokens"] == result.left_out["answer_embedding"] == "these records lack it"
    scored = [Record(record.messages, record.answer, score=1.0) for record in clean_day]
    assert compared(baseline, scored).left_out["score"] == "the reference lacks it"
