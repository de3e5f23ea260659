"""The bars of drift on real conversations: few false alarms, and every large shift found in a day."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from scipy.stats import binom

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT / "../shared/data"))
ROUNDS, CLEAN_DAYS = 4, 10


@pytest.fixture(scope="module")
def bench():
    if not (SHARED / "gsm8k").is_dir():
        pytest.skip(f"{SHARED} is not here; set POSTTRAIN_SHARED_DATA to the folder of shared test data")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "scripts"))
    patch.setenv("POSTTRAIN_SHARED_DATA", str(SHARED))
    spec = importlib.util.spec_from_file_location("bench_drift", ROOT / "scripts" / "bench_drift.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("bench_drift_world", None)
    patch.undo()


@pytest.mark.slow
def test_clean_days_rarely_alarm_and_large_shifts_always_do(bench):
    """40 days like the reference and 4 of each shift, on other shuffles than the published figures."""
    world = bench.world
    pool = [*world.maths(), *world.chat(), *world.instructions()]
    instruments = bench.load_instruments(bench.Settings.of())
    bars = {name: shift for name, shift in bench.shifts().items() if shift[0]}
    days = []
    for seed in range(100, 100 + ROUNDS):
        days += bench.one_round(pool, 6000, CLEAN_DAYS, bars, seed, instruments)
    rates = bench.summary(days)["shifts"]
    # More than this many of 40 days, at 5 % each, once in a thousand such tests.
    assert rates["none"]["found"] <= binom.isf(1e-3, ROUNDS * CLEAN_DAYS, 0.05)
    assert {name: rates[name]["found"] for name in bars} == dict.fromkeys(bars, ROUNDS)
    # The p-values themselves, before any floor: each feature's level, over the 40 days.
    below = bench.summary(days)["uncorrected_below_alpha"]
    assert max(below.values()) <= binom.isf(1e-4, ROUNDS * CLEAN_DAYS, 0.05) / (ROUNDS * CLEAN_DAYS)
