"""Warnings of a PPO run: each symptom once, none for healthy runs, the same after a resume."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from train.ppo.config import PpoStageConfig
from train.ppo.history import Thresholds
from train.ppo.symptoms import SYMPTOMS
from train.ppo.watch import RunWarning, Watch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = """\
score score_std kl eos_rate response_length entropy rollout_gap explained_variance clipfrac ratio_deviation
"""
RECORDED = """\
0.306 1.21 0 1 23.3 0.509 0.00064 -2.73 0.0128 4.26
0.426 0.871 -0.00644 1 23.1 0.506 0.00069 -0.871 0.0123 1.6
0.637 1.05 0.165 1 22.6 0.457 0.000749 -0.0104 0.0128 0.932
0.562 0.868 0.408 1 21.4 0.407 0.000443 -0.0915 0.0131 1.07
0.64 0.759 0.347 1 21.1 0.367 0.000327 0.00165 0.0102 5
0.775 0.629 0.658 1 20.8 0.352 0.000692 -0.273 0.00564 0.574
0.659 0.768 0.94 1 20.4 0.347 0.000254 0.0536 0.00669 1.2
0.798 0.67 1.13 1 20 0.352 0.000534 0.189 0.00585 0.623
0.713 0.639 0.768 0.984 21.2 0.346 0.000507 0.285 0.00662 0.564
0.863 0.627 1.65 1 21 0.35 0.00046 -0.116 0.00446 1.34
0.805 0.515 1.54 1 21.2 0.353 0.000648 -0.155 0.00979 0.715
0.875 0.618 1.35 1 21.5 0.353 0.000554 -0.0149 0.00744 0.779
0.861 0.678 1.36 1 21.8 0.347 0.000684 0.0313 0.0043 1.44
0.834 0.53 1.15 1 21.6 0.341 0.00072 -0.0363 0.00109 0.502
0.903 0.592 1.67 1 21.8 0.325 0.000604 -0.0426 0.00449 0.945
0.976 0.678 1.59 1 21.3 0.321 0.00039 0.0585 0.000366 0.26
0.916 0.616 1.71 1 21.7 0.305 0.000637 0.0491 0.00234 0.555
0.959 0.635 2.41 1 22.9 0.311 0.000645 0.0148 0.0029 0.644
0.926 0.699 2.79 1 22.1 0.297 0.000557 0.144 0.00212 0.616
1.06 0.605 3.56 1 24.6 0.305 0.000636 0.0684 0.000159 0.202
"""
"""The 20 updates of configs/tiny/pipeline.yaml, seed 0, target 8, max_new_tokens 64: noisy and healthy."""

Rows = list[dict[str, float]]


def healthy(count: int = 40) -> Rows:
    """Score -0.2 to 1.2, KL 0 to 4, entropy 0.5 to 0.35, explained variance 0.1 to 0.7, length 25 to 23, with
    the scatter of a batch of 64."""
    noise = random.Random(0)
    rows = []
    for index in range(count):
        done = index / (count - 1)
        rows.append(
            {
                "step": index + 1,
                "score": -0.2 + 1.4 * done + noise.gauss(0, 0.05),
                "score_std": 0.8 + noise.gauss(0, 0.05),
                "kl": 4 * done + noise.gauss(0, 0.3),
                "kl_coef": 0.05,
                "eos_rate": 1 - noise.choice((0, 0, 1, 2)) / 64,
                "response_length": 25 - 2 * done + noise.gauss(0, 0.5),
                "entropy": 0.5 - 0.15 * done + noise.gauss(0, 0.02),
                "distinct_responses": 0.95 + noise.gauss(0, 0.02),
                "explained_variance": 0.1 + 0.6 * done + noise.gauss(0, 0.15),
                "clipfrac": 0.08 + noise.gauss(0, 0.02),
                "ratio_deviation": 1.5 + noise.random() * 3,
                "ratio_deviation_first": 0.0,
                "rollout_gap": 0.0006 + noise.random() * 0.0003,
                "reward/gold": 0.3 + 0.4 * done + noise.gauss(0, 0.02),
            }
        )
    return rows


def recorded() -> Rows:
    names = COLUMNS.split()
    return [
        {"step": step, **dict(zip(names, map(float, line.split()), strict=True))}
        for step, line in enumerate(RECORDED.splitlines(), start=1)
    ]


def watched(rows: Rows, watch: Watch | None = None, *, kl_target: float | None = 8.0) -> list[RunWarning]:
    watch = watch or Watch(kl_target=kl_target, max_new_tokens=64)
    return [warning for row in rows for warning in watch.observe(int(row["step"]), row)]


def changed(rows: Rows, start: int = 1, stop: int = 1000, **columns: float | Callable[[int], float]) -> Rows:
    """The rows with columns replaced, by a value or a function of the step, in steps start .. stop."""
    return [
        row
        if not start <= row["step"] <= stop
        else row
        | {name: value(int(row["step"])) if callable(value) else value for name, value in columns.items()}
        for row in rows
    ]


def test_healthy_runs_are_left_in_peace() -> None:
    assert watched(healthy()) == []
    assert watched(healthy(400)) == []
    assert watched(healthy(), kl_target=None) == []
    assert watched(recorded()) == []


CASES: dict[str, tuple[Rows, int]] = {
    "entropy_collapse": (changed(healthy(), 11, entropy=0.01), 15),
    "repeated_responses": (changed(healthy(), 21, distinct_responses=0.1), 23),
    "length_hacking": (changed(healthy(), 11, response_length=lambda step: 25 + 2 * (step - 10)), 19),
    "length_at_limit": (changed(healthy(), eos_rate=0.75, response_length=62), 5),
    "eos_falling": (changed(healthy(), 11, eos_rate=lambda step: 1 - 0.02 * (step - 10)), 23),
    "missing_eos": (changed(healthy(), eos_rate=0.02, response_length=64), 3),
    "kl_above_target": (changed(healthy(), 21, kl=lambda step: 9.7), 25),
    "value_not_fitting": (changed(healthy(), explained_variance=-0.5), 15),
    "clip_fraction": (changed(healthy(), 5, clipfrac=0.4), 7),
    "ratio_extreme": (changed(healthy(), 5, ratio_deviation=30.0), 7),
    "first_ratio": (changed(healthy(), 4, ratio_deviation_first=0.02), 4),
    "constant_rewards": (changed(healthy(), 9, score_std=1e-7), 11),
    "rollout_gap": (changed(healthy(), 9, rollout_gap=0.2), 10),
}
"""By kind: rows that show it, and the update that reports it."""


@pytest.mark.parametrize("kind", CASES)
def test_each_symptom_is_reported_once_at_the_expected_update(kind: str) -> None:
    rows, step = CASES[kind]
    assert [(warning.step, warning.kind) for warning in watched(rows)] == [(step, kind)]


def test_growing_kl_without_a_target() -> None:
    rows = changed(healthy(), kl=lambda step: 0.5 * 1.15**step)
    [warning] = watched(rows, kl_target=None)
    # 0.5 nats x 24 tokens = 12. The mean of five steps up to s is 0.5 x 1.15^s x 0.771: 11.03 for s = 24 and
    # 12.69 for s = 25. It grows by 1.15^5 = 2.01 in five steps, more than the 1.3 asked for.
    assert (warning.step, warning.kind) == (25, "kl_unbounded")
    settled = changed(healthy(), kl=20.0)
    assert watched(settled, kl_target=None) == []


def test_gold_reward_that_turns_while_the_score_rises() -> None:
    rows = changed(healthy(60), 31, **{"reward/gold": lambda step: 0.5 - 0.02 * (step - 30)})
    [warning] = watched(rows)
    assert warning.kind == "over_optimisation"
    assert 31 < warning.step < 50
    both_fall = changed(rows, 31, score=lambda step: 0.3 - 0.02 * (step - 30))
    assert watched(both_fall) == []
    assert watched([{name: row[name] for name in row if name != "reward/gold"} for row in rows]) == []


@pytest.mark.parametrize("seed", range(10))
def test_gold_reward_that_only_scatters_is_no_over_optimisation(seed: int) -> None:
    noise = random.Random(seed)
    assert watched(changed(healthy(300), **{"reward/gold": lambda step: 0.5 + noise.gauss(0, 0.1)})) == []


def test_every_symptom_has_a_case() -> None:
    assert {*CASES, "kl_unbounded", "over_optimisation"} == set(SYMPTOMS)


def every_warning() -> list[RunWarning]:
    found = [warning for rows, _ in CASES.values() for warning in watched(rows)]
    found += watched(changed(healthy(), kl=lambda step: 0.5 * 1.15**step), kl_target=None)
    return found + watched(changed(healthy(60), 31, **{"reward/gold": lambda step: 0.5 - 0.02 * (step - 30)}))


def test_messages_show_a_number_and_name_keys_that_exist() -> None:
    messages = {warning.kind: warning.message for warning in every_warning()}
    assert set(messages) == set(SYMPTOMS)
    for kind, message in messages.items():
        assert re.search(r"\d", message), kind
        keys = re.findall(r"`([^`]+)`", message)
        assert keys, kind
        for key in keys:
            model: type[BaseModel] = PpoStageConfig
            for part in key.split("."):
                assert part in model.model_fields, f"{kind}: {key}"
                annotation = model.model_fields[part].annotation
                model = (
                    annotation
                    if isinstance(annotation, type) and issubclass(annotation, BaseModel)
                    else model
                )


def test_messages_by_hand() -> None:
    [entropy] = watched(changed(healthy(), 1, entropy=lambda step: 0.5 if step < 6 else 0.01))
    assert (entropy.step, entropy.kind) == (10, "entropy_collapse")
    assert entropy.message.startswith("entropy is 0.01 nats per token, 2% of the 0.5 at the start. ")
    [kl] = watched(changed(healthy(), 21, kl=12.0))
    assert kl.message.startswith("KL to the reference is 12 nats per response, 1.5 times the target 8. ")
    assert "Raise `kl_coef` (now 0.05)" in kl.message


def test_a_short_spell_is_not_reported() -> None:
    assert watched(changed(healthy(), 21, 24, kl=20.0)) == []
    assert [warning.step for warning in watched(changed(healthy(), 21, 25, kl=20.0))] == [25]


def test_reported_again_only_after_it_was_away_for_a_while() -> None:
    away = Thresholds().quiet_rows
    short = changed(changed(healthy(60), 5, 10, clipfrac=0.5), 10 + away, 40, clipfrac=0.5)
    assert [warning.step for warning in watched(short)] == [7]
    long = changed(changed(healthy(60), 5, 10, clipfrac=0.5), 11 + away, 40, clipfrac=0.5)
    assert [warning.step for warning in watched(long)] == [7, 13 + away]


def test_thresholds_can_be_set() -> None:
    rows = changed(healthy(), 5, clipfrac=0.25)
    strict = Watch(kl_target=8.0, max_new_tokens=64, thresholds=Thresholds(clip_fraction=0.2))
    assert watched(rows) == []
    assert [warning.kind for warning in watched(rows, strict)] == ["clip_fraction"]


@pytest.mark.parametrize("cut", [1, 6, 14, 24, 39])
def test_resumed_run_warns_as_an_uninterrupted_one(cut: int) -> None:
    rows = changed(changed(healthy(), 5, 20, clipfrac=0.5), 21, kl=12.0, entropy=0.01)
    rows[17]["score"] = math.nan
    whole = watched(rows)
    assert len(whole) == 3
    on_disk = json.loads(
        json.dumps([{k: v if v == v else None for k, v in row.items()} for row in rows[:cut]])
    )
    resumed = Watch(kl_target=8.0, max_new_tokens=64)
    resumed.replay(on_disk)
    assert watched(rows[cut:], resumed) == [warning for warning in whole if warning.step > cut]


def test_rows_without_a_metric_are_gaps() -> None:
    assert watched([{"step": step} for step in range(1, 30)]) == []
    assert watched(changed(healthy(), score=math.nan, kl=math.nan)) == []


def test_no_torch_is_imported() -> None:
    code = "import sys, train.ppo.watch\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
