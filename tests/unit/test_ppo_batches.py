"""Token batches by hand: padding, the positions that predict, buckets of similar length, what is trained
on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.ppo.batches import MicroBatch, TokenBatch, length_buckets
from train.ppo.config import PpoStageConfig
from train.ppo.experience import Rollout, loss_mask, split_rollout
from train.ppo.packing import packed_positions


def config(**overrides: Any) -> PpoStageConfig:
    return PpoStageConfig(**({"model": "m", "reward": "r", "data": "d", "batch_size": 6} | overrides))


def test_rows_are_contiguous_and_padded_on_the_right() -> None:
    batch = TokenBatch.build([[5, 6, 7], [8]], [[9, 1], [4, 3, 1]], pad_id=0, device="cpu")
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 9, 1], [8, 4, 3, 1, 0]]
    assert batch.lengths == (5, 4)
    assert batch.last_B.tolist() == [4, 8]
    assert batch.response_mask_BR.tolist() == [[True, True, False], [True, True, True]]
    assert batch.target_N.tolist() == [9, 1, 4, 3, 1]
    # 9 is predicted from column 2 of row 0, the first token of row 1 from its column 0, which is place 5.
    assert batch.predict_N.tolist() == [2, 3, 5, 6, 7]
    assert batch.real_tokens == 9


def test_packed_rows_stand_end_to_end() -> None:
    batch = TokenBatch.build([[5, 6, 7], [8]], [[9, 1], [4, 3, 1]], pad_id=0, device="cpu", packed=True)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 9, 1, 8, 4, 3, 1]]
    assert batch.lengths == (5, 4)
    assert batch.last_B.tolist() == [4, 8]
    assert batch.predict_N.tolist() == [2, 3, 5, 6, 7]
    assert batch.target_N.tolist() == [9, 1, 4, 3, 1]
    assert packed_positions(batch.lengths).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]


@pytest.mark.parametrize("packed", [False, True])
def test_each_target_follows_the_position_that_predicts_it(packed: bool) -> None:
    prompts, responses = [[5, 6, 7], [8], [2, 2]], [[9], [4, 3, 1], [1, 1]]
    batch = TokenBatch.build(prompts, responses, pad_id=0, device="cpu", packed=packed)
    flat = batch.input_ids_BT.flatten()
    assert torch.equal(flat[batch.predict_N + 1], batch.target_N)


def test_take_and_put_are_inverse() -> None:
    tokens = TokenBatch.build([[5, 6], [8]], [[9, 1], [4, 3, 1]], pad_id=0, device="cpu")
    micro = MicroBatch(torch.tensor([2, 0]), tokens)
    whole = torch.arange(12.0).reshape(3, 4)
    assert micro.take(whole).tolist() == [8.0, 9.0, 0.0, 1.0, 2.0]
    empty = torch.zeros(3, 4)
    micro.put(empty, micro.take(whole))
    assert empty.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [8, 9, 0, 0]]


@pytest.mark.parametrize(
    ("max_tokens", "max_rows", "expected"),
    [
        (100, None, [[5, 0, 2, 4, 3, 1]]),
        (100, 4, [[5, 0, 2, 4], [3, 1]]),
        (12, None, [[5, 0], [2, 4, 3], [1]]),
        (6, None, [[5], [0], [2], [4, 3], [1]]),
        (1, None, [[5], [0], [2], [4], [3], [1]]),
    ],
)
def test_buckets_hold_no_more_than_their_tokens(
    max_tokens: int, max_rows: int | None, expected: list[list[int]]
) -> None:
    lengths = [5, 1, 4, 2, 3, 6]
    assert length_buckets(lengths, range(6), max_tokens, max_rows) == expected


def test_packed_buckets_count_no_padding() -> None:
    lengths = [5, 1, 4, 2, 3, 6]
    assert length_buckets(lengths, range(6), 11, packed=True) == [[5, 0], [2, 4, 3, 1]]
    assert length_buckets(lengths, range(6), 11) == [[5], [0, 2], [4, 3, 1]]
    assert length_buckets(lengths, range(6), 100, 4, packed=True) == [[5, 0, 2, 4], [3, 1]]


def test_mini_batches_keep_their_rows() -> None:
    lengths = [5, 1, 4, 2, 3, 6]
    rollout = Rollout(
        [[7]] * 6, [[9] * n for n in lengths], [False] * 6, [[0.0] * n for n in lengths], list(range(6))
    )
    mini_batches = split_rollout(
        rollout, config(num_mini_batches=2, micro_batch_size=2), 0, torch.device("cpu")
    )
    rows = [[micro.rows.tolist() for micro in mini] for mini in mini_batches]
    assert rows == [[[0, 2], [1]], [[5, 4], [3]]]
    assert mini_batches[1][0].tokens.input_ids_BT.shape == (2, 1 + 6)


def test_what_truncation_leaves_to_train_on() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    finished = torch.tensor([False, True])
    assert loss_mask(mask, finished, "keep").tolist() == mask.tolist()
    assert loss_mask(mask, finished, "mask").tolist() == [[False] * 3, [True, True, False]]
    assert loss_mask(mask, finished, "mask_last").tolist() == [[True, True, False], [True, True, False]]
