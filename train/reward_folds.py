"""Cross-validation of a reward model: every training pair scored by a model that saw none of its group."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.errors import RequeueError, UserError
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import atomic_write_json, atomic_write_text
from posttrain.stage import StageContext
from train.reward_pairs import LabelledPairs

TrainFold = Callable[[int, PreemptionFlag, LabelledPairs, LabelledPairs], tuple[torch.Tensor, torch.Tensor]]
"""(number of the fold, SIGTERM, pairs to train on, held-out pairs) -> scores of the chosen and of the
rejected held-out side."""


@dataclass(frozen=True)
class Predictions:
    """Scores of N pairs by models that have not trained on them; float32, shape (N,).

    `groups` of the pairs, and the `fold` that scored each; None where one model scored them all.
    """

    groups: list[str]
    fold: list[int] | None
    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def margins(self) -> np.ndarray:
        """Score of chosen less score of rejected, shape (N,)."""
        return (self.chosen - self.rejected).double().numpy()


def cross_validate(
    context: StageContext, folds: int, seed: int, pairs: LabelledPairs, train_fold: TrainFold
) -> Predictions:
    """Score every pair by a model trained on the other folds; ``folds.jsonl`` keeps the scores.

    A finished fold is kept in ``checkpoints/folds``, so that an interrupted run does not train it again.

    Raises:
        UserError: the data has fewer groups than folds.
        RequeueError: SIGTERM came; finished folds are kept, and a checkpoint of the one being trained.
    """
    fold_of = assign_folds(pairs.groups, folds, seed)
    store = context.checkpoints / "folds"
    store.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with PreemptionFlag() as flag, context.progress("folds", total=folds) as bar:
        for fold in range(folds):
            done = store / f"fold-{fold}.json"
            if not done.exists():
                held_out = pairs.take([i for i, number in enumerate(fold_of) if number == fold])
                seen = pairs.take([i for i, number in enumerate(fold_of) if number != fold])
                chosen_N, rejected_N = train_fold(fold, flag, seen, held_out)
                columns = (held_out.names, held_out.groups, chosen_N.tolist(), rejected_N.tolist())
                atomic_write_json(
                    done,
                    [
                        {"id": name, "group": group, "fold": fold, "chosen": chosen, "rejected": rejected}
                        for name, group, chosen, rejected in zip(*columns, strict=True)
                    ],
                )
            rows += json.loads(done.read_text(encoding="utf-8"))
            bar.advance()
            if flag.requested:
                raise RequeueError(f"fold {fold + 1} of {folds}")
    atomic_write_text(context.run_dir / "folds.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return Predictions(
        [row["group"] for row in rows],
        [row["fold"] for row in rows],
        torch.tensor([row["chosen"] for row in rows]),
        torch.tensor([row["rejected"] for row in rows]),
    )


def assign_folds(groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """A fold in [0, folds) for each row: a group is never split, and folds are about equally large.

    Raises:
        UserError: there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < folds:
        raise UserError(f"folds: {folds} folds need as many groups, the data has {len(sizes)}; lower `folds`")

    def draw(group: str) -> str:
        return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()

    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], draw(group))):
        smallest = filled.index(min(filled))
        fold_of[group] = smallest
        filled[smallest] += sizes[group]
    return [fold_of[group] for group in groups]
