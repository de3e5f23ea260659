"""`report_to`: real tensorboard events, a resumed run in them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from posttrain.errors import UserError
from posttrain.rundir import describe_outputs
from train.ppo.reporting import REPORTERS, Reporter, check_reporters

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"kl_coef": 0.05, "kl_controller": {"type": "adaptive", "target": 8.0}}


def row(step: int) -> dict[str, Any]:
    return {
        "score": 0.1 * step,
        "reward/gold": -1.0 / step,
        "episodes": 64 * step,
        "note": "text",
        "gap": None,
    }


def report(run_dir: Path, first: int, last: int, total: int = 8, offset: float = 0.0) -> None:
    reporter = Reporter(["tensorboard"], run_dir, "tiny/ppo", CONFIG)
    reporter.begin(total, first - 1)
    for step in range(first, last + 1):
        reporter.log(step, row(step) | {"score": 0.1 * step + offset})
    reporter.end()
    reporter.end()


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    report(tmp_path, 1, 5)
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {"train/score", "train/reward/gold", "train/episodes"}
    # tensorboard stores float32
    assert scalars(tmp_path, "train/score") == [(step, float(np.float32(0.1 * step))) for step in range(1, 6)]
    assert scalars(tmp_path, "train/reward/gold") == [
        (step, float(np.float32(-1.0 / step))) for step in range(1, 6)
    ]
    assert scalars(tmp_path, "train/episodes") == [(step, 64.0 * step) for step in range(1, 6)]


def test_tensorboard_shows_the_settings_of_the_stage_and_no_others(tmp_path: Path) -> None:
    report(tmp_path, 1, 1)
    [event] = events(tmp_path).Tensors("args/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert '"target": 8.0' in text
    assert "per_device_train_batch_size" not in text


def test_resumed_run_goes_on_at_its_step_and_hides_what_is_made_again(tmp_path: Path) -> None:
    report(tmp_path, 1, 6, offset=100.0)
    report(tmp_path, 5, 8)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    expected = [(step, float(np.float32(0.1 * step + (100 if step <= 4 else 0)))) for step in range(1, 9)]
    assert scalars(tmp_path, "train/score") == expected


def test_events_are_no_output_of_the_stage(tmp_path: Path) -> None:
    (tmp_path / "value.txt").write_text("x")
    before = describe_outputs(tmp_path)
    report(tmp_path, 1, 1)
    assert (tmp_path / "tensorboard").is_dir()
    assert describe_outputs(tmp_path) == before


def test_the_running_accelerator_is_left_alone(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    state = dict(PartialState._shared_state)
    report(tmp_path, 1, 2)
    assert PartialState._shared_state == state
    assert accelerator.num_processes == 1


def test_nothing_is_imported_or_written_without_trackers(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom train.ppo.reporting import Reporter\n"
        f"reporter = Reporter([], Path({str(tmp_path)!r}), 'run', {{}})\n"
        "reporter.begin(3)\nreporter.log(1, {'score': 1.0})\nreporter.end()\n"
        "loaded = {'torch', 'transformers', 'tensorboard'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_tracker_that_is_not_installed_is_named_with_what_to_install(tmp_path: Path) -> None:
    absent = next(name for name in ("swanlab", "clearml", "neptune") if not installed(name))
    with pytest.raises(
        UserError, match=f"report_to: {absent} is not installed here, or not set up"
    ) as caught:
        Reporter([absent], tmp_path, "run", {})
    assert f"pip install {REPORTERS[absent]}, or choose from what is available: " in str(caught.value)
    assert "tensorboard" in str(caught.value)
    assert caught.value.exit_code == 2


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_unknown_tracker_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"there is no tracker 'tensorbord'\n    did you mean 'tensorboard'\?"
    ):
        check_reporters(["tensorbord"])
    with pytest.raises(UserError, match="choose from clearml, codecarbon, comet_ml"):
        check_reporters(["all"])


def test_settings_that_would_upload_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(
        UserError, match=r"WANDB_LOG_MODEL=end wants the model itself[\s\S]*unset WANDB_LOG_MODEL"
    ):
        check_reporters(["wandb"])


def test_every_tracker_is_one_of_transformers() -> None:
    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK) - {"azure_ml", "flyte", "kubeflow"}
