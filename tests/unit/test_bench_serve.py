"""The statistics and the verdicts of the load test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_serve
import bench_serve_checks as checks
from bench_serve_client import read_answer, read_events
from bench_serve_common import Sample, Settings, count_for, middle, percentile, slope, statistics
from bench_serve_report import summarise, table


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int):
    values = np.random.default_rng(count).random(count).tolist()
    for q in (0, 50, 95, 99, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_there_is_no_percentile_of_nothing():
    assert percentile([], 50) is None


def test_latencies_come_from_the_times_of_events():
    samples = [
        Sample(10.0, ended=10.9, events=[10.2, 10.3, 10.5, 10.8], tokens=4),
        Sample(10.1, ended=12.0, events=[10.4, 11.9], tokens=6),
        Sample(10.0, ended=14.0, tokens=3, error="503: full"),
    ]
    found = statistics(samples)
    assert (found["requests"], found["errors"], found["messages"]) == (3, 1, ["503: full"])
    # Tokens of a failed answer do not count; the time it took does.
    assert (found["tokens"], found["seconds"]) == (10, pytest.approx(4.0))
    assert found["tokens_per_second"] == pytest.approx(2.5)
    assert found["requests_per_second"] == pytest.approx(0.5)
    assert found["events_per_token"] == pytest.approx(0.6)
    assert found["ttft_ms"]["p50"] == pytest.approx(250)
    gaps_ms = [100, 200, 300, 1500]
    for q in (50, 95, 99):
        assert found["itl_ms"][f"p{q}"] == pytest.approx(np.percentile(gaps_ms, q))
    assert found["tpot_ms"]["p50"] == pytest.approx(np.median([600 / 3, 1500 / 5]))
    assert found["latency_ms"]["p99"] == pytest.approx(np.percentile([900, 1900], 99))


def test_what_is_not_streamed_has_no_time_between_tokens():
    found = statistics([Sample(0.0, ended=2.0, tokens=8)], streamed=False)
    assert found["tokens_per_second"] == pytest.approx(4)
    assert "itl_ms" not in found
    assert "ttft_ms" not in found


def test_a_slope_is_that_of_least_squares():
    x, y = [1.0, 2.0, 4.0, 7.0], [3.0, 1.0, 4.0, 9.0]
    assert slope(list(zip(x, y, strict=True))) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_repeats_are_reduced_to_medians_of_their_numbers():
    runs = [{"a": value, "b": {"p50": value * 2}, "c": None} for value in (1.0, 9.0, 2.0)]
    assert middle(runs) == {"a": 2.0, "b": {"p50": 4.0}, "c": None}


def test_more_requests_for_more_places():
    settings = Settings(per_slot=3, min_requests=8)
    assert [count_for(settings, concurrency) for concurrency in (1, 4, 16)] == [8, 12, 48]


def chunk(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = 'data: {"choices":[{"text":" caf\u00e9","finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
USAGE = 'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_a_stream_is_read_the_same_however_it_is_cut(size: int):
    stream = HEAD + chunk(FIRST) + chunk(FIRST) + chunk(LAST) + chunk(USAGE) + b"0\r\n\r\n"
    pieces = [(float(at), stream[at : at + size]) for at in range(0, len(stream), size)]
    sample = Sample(0.0)
    read_answer(sample, pieces)
    assert (sample.text, sample.tokens, sample.error) == (" caf\u00e9 caf\u00e9", 2, None)
    ends = [stream.index(chunk(FIRST)) + len(chunk(FIRST)), stream.rindex(chunk(FIRST)) + len(chunk(FIRST))]
    # The time of an event is that of the piece which brought its chunk's last byte.
    assert sample.events == [float((end - 1) // size * size) for end in ends]


def test_a_refusal_and_a_broken_stream_are_errors():
    refused = b'HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\n"no"'
    assert read_events([(1.0, refused)]) == (503, [(1.0, '"no"')])
    sample = Sample(0.0)
    read_answer(sample, [(1.0, refused)])
    assert sample.error == '503: "no"'
    sample = Sample(0.0)
    read_answer(sample, [(1.0, HEAD + chunk(FIRST) + b"0\r\n\r\n")])
    assert sample.error == "the stream ended without a finish_reason"
    sample = Sample(0.0)
    read_answer(sample, [(1.0, HEAD + chunk(FIRST) + chunk('data: {"error":{"message":"gone"}}\n\n'))])
    assert "gone" in str(sample.error)


def summary(**rates: dict[int, float]) -> dict[str, dict[int, dict[str, Any]]]:
    return {
        side: {n: {"tokens_per_second": rate, "errors": 0, "requests": 8} for n, rate in levels.items()}
        for side, levels in rates.items()
    }


def passed(
    found: dict[str, Any], short: list[dict[str, Any]] | None = None, soaked: dict[str, Any] | None = None
) -> list[bool | None]:
    return [verdict.passed for verdict in checks.verdicts(found, short or [], soaked)]


def test_the_bars_are_where_the_issue_puts_them():
    good = summary(generate={1: 50}, engine={1: 52, 16: 400}, gateway={1: 45, 16: 330})
    short = [{"seconds": 0.1, "error": None}, {"seconds": 0.29, "error": None}]
    rows = [{"requests": n, "stub": 1e8 + n} for n in (100, 200, 1000, 2000)]
    soaked = {"requests": 2000, "errors": 0, "processes": checks.growth(rows, 200)}
    assert passed(good, short, soaked) == [True] * 6

    assert passed(summary(generate={1: 56}, engine={}, gateway={1: 45, 16: 330}))[0] is False
    assert passed(summary(generate={1: 50}, engine={}, gateway={1: 60, 16: 330}))[0] is False
    assert passed(good, [*short, {"seconds": 0.31, "error": None}])[1] is False
    assert passed(good, [*short, {"seconds": 0.1, "error": "503"}])[1] is False
    assert passed(summary(engine={16: 400}, gateway={16: 319}))[2] is False
    assert passed(summary(engine={1: 52}, gateway={1: 41}))[3] is False
    assert passed(good, short, soaked | {"errors": 1})[4] is False
    good["engine"][16]["errors"] = 1
    assert passed(good)[5] is False


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert passed(summary(engine={4: 100})) == [None] * 5 + [True]


def test_memory_that_leaks_is_not_flat_and_memory_that_swings_is():
    leak = [{"requests": n, "stub": 1e8 + 2000 * n} for n in range(100, 2001, 100)]
    swing = [{"requests": n, "stub": 1e8 + 3e6 * (-1) ** (n // 100)} for n in range(100, 2001, 100)]
    assert checks.growth(leak, 200)["stub"]["per_1000"] == pytest.approx(2e6)
    for rows, flat in ((leak, False), (swing, True)):
        soaked = {"requests": 2000, "errors": 0, "processes": checks.growth(rows, 200)}
        assert passed({}, soaked=soaked)[4] is flat


def test_the_table_has_a_line_a_side_and_concurrency():
    runs = []
    for rate in (1.0, 3.0, 2.0):
        found = statistics([Sample(0.0, ended=1.0 / rate, events=[0.1, 0.2], tokens=2)])
        found |= {"cpu_seconds": {"client": 0.1}, "cpu_ms_per_token": {"client": 50.0}, "load_before": 0.0}
        runs.append({"side": "engine", "concurrency": 4, "repeat": 0, "same_text": [1, 1], **found})
    shown = table(summarise(runs))
    assert "| the engine in one process | 4 | 4 | 2.00 | 100 / 100 / 100 |" in shown
    assert summarise(runs)["engine"][4]["requests"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--concurrency", "0"], "at least 1"),
        (["--soak", "10"], "at least 400"),
        (["--soak", "2000", "--sides", "engine"], "the side `gateway`"),
        (["--prompt-min", "9", "--prompt-max", "8"], "--prompt-min is from 1 to --prompt-max"),
        (["--export", "/nowhere"], "no such directory"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        bench_serve.parse(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
