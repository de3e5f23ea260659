"""Cross-validation of a reward model: every training pair scored by a model that saw none of its group."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from posttrain.errors import RequeueError, UserError
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import atomic_write_json, atomic_write_text
from posttrain.stage import StageContext
from train.reward_scores import Pair, pair_accuracy

TrainFold = Callable[[int, PreemptionFlag, Sequence[Pair], Sequence[Pair]], tuple[torch.Tensor, torch.Tensor]]
"""(number of the fold, SIGTERM, pairs to train on, held-out pairs) -> scores of the chosen and of the
rejected held-out side."""


def cross_validate(
    context: StageContext,
    folds: int,
    seed: int,
    rows: Sequence[dict],
    pairs: Sequence[Pair],
    train_fold: TrainFold,
) -> dict[str, Any]:
    """Write ``folds.jsonl`` (id, group, fold, chosen, rejected) and return the accuracy as ``cv_*``.

    A finished fold is kept in ``checkpoints/folds``, so that an interrupted run does not train it again.

    Raises:
        UserError: the data has fewer groups than folds.
        RequeueError: SIGTERM came; finished folds are kept, and a checkpoint of the one being trained.
    """
    fold_of = assign_folds([row["group"] for row in rows], folds, seed)
    store = context.checkpoints / "folds"
    store.mkdir(parents=True, exist_ok=True)
    predictions: list[dict[str, Any]] = []
    with PreemptionFlag() as flag, context.progress("folds", total=folds) as bar:
        for fold in range(folds):
            done = store / f"fold-{fold}.json"
            if not done.exists():
                seen = [pair for pair, number in zip(pairs, fold_of, strict=True) if number != fold]
                indices = [index for index, number in enumerate(fold_of) if number == fold]
                chosen_N, rejected_N = train_fold(fold, flag, seen, [pairs[index] for index in indices])
                scores = zip(indices, chosen_N.tolist(), rejected_N.tolist(), strict=True)
                atomic_write_json(
                    done,
                    [
                        {
                            "id": rows[i]["id"],
                            "group": rows[i]["group"],
                            "fold": fold,
                            "chosen": c,
                            "rejected": r,
                        }
                        for i, c, r in scores
                    ],
                )
            predictions += json.loads(done.read_text(encoding="utf-8"))
            bar.advance()
            if flag.requested:
                raise RequeueError(f"fold {fold + 1} of {folds}")
    lines = "".join(json.dumps(row) + "\n" for row in predictions)
    atomic_write_text(context.run_dir / "folds.jsonl", lines)
    chosen = torch.tensor([row["chosen"] for row in predictions])
    rejected = torch.tensor([row["rejected"] for row in predictions])
    return {f"cv_{name}": value for name, value in pair_accuracy(chosen, rejected).items()}


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
