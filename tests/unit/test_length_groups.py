"""The order of ``group_by_length``: every row once, similar lengths together, by seed and epoch alone."""

from __future__ import annotations

import random

import pytest

from train.length_groups import LengthGroupedSampler, length_grouped_order

rng = random.Random(0)
LENGTHS = [rng.randrange(5, 500) for _ in range(1003)]


def batches(order, size=8):
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order, size=8):
    cells = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches(order, size))
    return 1 - sum(LENGTHS) / cells


def test_every_row_comes_once_and_little_is_padding():
    order = length_grouped_order(LENGTHS, 8, seed=0, epoch=0)
    assert sorted(order) == list(range(len(LENGTHS)))
    assert padding(order) < 0.05 < 0.3 < padding(list(range(len(LENGTHS))))


def test_the_longest_batch_is_first_and_the_incomplete_one_last():
    order = length_grouped_order(LENGTHS, 8, seed=0, epoch=0)
    *whole, rest = batches(order)
    assert len(rest) == 3
    assert max(LENGTHS[row] for row in whole[0]) == max(LENGTHS[row] for batch in whole for row in batch)


def test_short_and_long_batches_are_mixed():
    lengths = [LENGTHS[batch[0]] for batch in batches(length_grouped_order(LENGTHS, 8, 0, 0))]
    falling = sum(after < before for before, after in zip(lengths, lengths[1:], strict=False))
    assert 0.35 < falling / len(lengths) < 0.65


def test_epochs_and_seeds_differ_and_repeat():
    orders = [length_grouped_order(LENGTHS, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert orders[3] == length_grouped_order(LENGTHS, 8, 1, 1)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
def test_few_rows(rows):
    assert sorted(length_grouped_order(LENGTHS[:rows], 8, 0, 0)) == list(range(rows))


def test_the_sampler_asks_for_the_epoch_when_it_is_iterated():
    epoch = 0
    sampler = LengthGroupedSampler(LENGTHS, 8, 3, lambda: epoch)
    first = list(sampler)
    epoch = 1
    assert len(sampler) == len(LENGTHS)
    assert list(sampler) == length_grouped_order(LENGTHS, 8, 3, 1) != first
