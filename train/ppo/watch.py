"""Warnings in words when a PPO run goes wrong, from its metric rows alone (torch-free, deterministic).

    watch = Watch(kl_target=8.0, max_new_tokens=64)
    watch.replay(rows_of_an_earlier_attempt)
    for warning in watch.observe(step, row):
        print(f"update {warning.step}: {warning.message}")

What is looked for is in `train.ppo.symptoms`; from which value on, and why, in `train.ppo.history`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from train.ppo.history import History, Thresholds
from train.ppo.symptoms import SYMPTOMS

__all__ = ["RunWarning", "Thresholds", "Watch"]


class RunWarning(NamedTuple):
    """kind: a key of `symptoms.SYMPTOMS`; message: one sentence or more, without the step."""

    step: int
    kind: str
    message: str


class Watch:
    """Reads the rows of a run one by one and says once what is wrong with it.

    A kind is reported when its symptom is there for as many updates in a row as it has patience, and again
    only after the symptom was away for `thresholds.quiet_rows` updates in a row.
    """

    def __init__(
        self, *, kl_target: float | None, max_new_tokens: int, thresholds: Thresholds | None = None
    ) -> None:
        """kl_target: nats per response, None where nothing bounds KL. max_new_tokens: longest response."""
        self._thresholds = thresholds or Thresholds()
        self._history = History(kl_target, max_new_tokens, self._thresholds)
        self._present = dict.fromkeys(SYMPTOMS, 0)
        self._absent = dict.fromkeys(SYMPTOMS, 0)
        self._reported: set[str] = set()

    def observe(self, step: int, row: Mapping[str, Any]) -> list[RunWarning]:
        """Take in the metrics of update `step` and return what is new. Metrics that are missing, null or not
        finite are gaps.
        """
        self._history.add(row)
        found = []
        for kind, symptom in SYMPTOMS.items():
            message = symptom.test(self._history)
            if message is None:
                self._present[kind] = 0
                self._absent[kind] += 1
                if self._absent[kind] >= self._thresholds.quiet_rows:
                    self._reported.discard(kind)
                continue
            self._absent[kind] = 0
            self._present[kind] += 1
            if self._present[kind] >= symptom.patience and kind not in self._reported:
                self._reported.add(kind)
                found.append(RunWarning(step, kind, message))
        return found

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows of an earlier attempt (metrics.jsonl, each with its "step") without a word, so
        that a resumed run warns as an uninterrupted one would.
        """
        for row in rows:
            self.observe(int(row["step"]), row)
