"""What people voted for trains: the exported directory goes into the `reward` and `dpo` stages as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.database import Database
from eval.annotate.export import export
from eval.annotate.store import add_annotator, create_study
from eval.annotate.study import Item, Loaded, StudyConfig
from eval.annotate.votes import Opinion

BETTER = "The refund takes five days."
WORSE = "I do not know that."


@pytest.fixture(scope="module")
def human(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 preferences, as one annotator gave them."""
    folder = tmp_path_factory.mktemp("human")
    items = [
        Item(
            f"q{n}",
            [{"role": "user", "content": f"How long does refund {n} take?"}],
            (f"{BETTER} {n}", f"{WORSE} {n}"),
            ("one", "two"),
        )
        for n in range(24)
    ]
    database = Database(str(folder / "study.db"))
    study = create_study(database, StudyConfig(name="refunds", items="-"), Loaded(items))
    add_annotator(database, study, "ann")
    with database.reading() as session:
        ann = session.run("SELECT id FROM annotators")[0]["id"]
    while True:
        with database.writing() as session:
            task = assignments.current(session, study, ann, 1.8e9)
        if task is None:
            break
        choice = "a" if task.answers[0].startswith(BETTER) else "b"
        votes.vote(database, study, ann, task.assignment, task.nonce, choice, Opinion(), 1.8e9 + 1)
    lineage = export(database, study, folder / "preferences")
    database.close()
    assert lineage["output"]["rows"] == 24
    return folder / "preferences"


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_the_exported_directory_trains(
    stage: str, human: Path, tmp_path: Path, tiny_model_dir: Path, run_stage: Callable[..., dict[str, Any]]
) -> None:
    trainer = {"max_steps": 1, "per_device_train_batch_size": 4}
    metrics = run_stage(stage, tmp_path / "run", model=tiny_model_dir, data=human, trainer=trainer)
    assert math.isfinite(metrics["train_loss"])
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
