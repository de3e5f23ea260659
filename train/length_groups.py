"""Rows of similar length in one batch: less padding, and a run that is resumed sees the same batches.

transformers' own ``train_sampling_strategy: group_by_length`` draws its order from the global random state,
so that a run resumed in a later epoch would see other batches, and walks through each group of batches from
long rows to short ones. Here the order follows from seed and epoch alone, and batches come at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from trl import SFTTrainer

WINDOW = 50
"""Batches that are sorted by length together (transformers takes as many)."""


def length_grouped_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row indices of one epoch, each once: every `batch_size` of them in turn are of similar length.

    The rows are shuffled, sorted within windows of WINDOW batches, and the batches shuffled. The one with the
    longest row comes first, so that what does not fit in memory fails in the first step; rows that do not
    fill a batch come last.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(order) - len(order) % batch_size
    batches: list[list[int]] = []
    for start in range(0, whole, WINDOW * batch_size):
        window = sorted(order[start : min(start + WINDOW * batch_size, whole)], key=lengths.__getitem__)
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if batches:
        longest = max(range(len(batches)), key=lambda i: lengths[batches[i][-1]])
        batches[0], batches[longest] = batches[longest], batches[0]
    return [row for batch in batches for row in batch] + order[whole:]


class LengthGroupedSampler(Sampler[int]):
    """`length_grouped_order` as a sampler. epoch: tells which one begins when it is iterated."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_grouped_order(self._lengths, self._batch_size, self._seed, self._epoch()))


class GroupedSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer, whose ``group_by_length`` is the order above.

    The rows of an optimizer step are of similar length, and the same however it is divided into accumulation
    steps and processes. Evaluation reads its rows in order whatever the strategy: ``eval_loss`` is a mean
    over batches, and would change with the way they are made.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            [len(ids) for ids in rows["input_ids"]],
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            self.args.seed,
            # Asked at the start of an epoch and when one is resumed; the state counts in parts of epochs.
            lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
