"""Token batches: prompts followed by responses, padded on the right or packed end to end, grouped by length.

A row is contiguous, so that a causal model needs no attention mask: what stands right of a token is never
seen by it. Only the positions that predict a response token are ever turned into log-probabilities or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Prompt and response of each row.

    input_ids_BT: long; padded, T is the longest row; packed, B is 1 and T the sum of the lengths. Places
    count
    in the flattened [B * T]. Per row: lengths, and last_B, the place of its last token. response_mask_BR:
    bool,
    a non-empty prefix of each row. Per response token, rows in order: predict_N, the place from which it is
    predicted; target_N, its id. N is the number of response tokens.
    """

    input_ids_BT: Tensor
    lengths: tuple[int, ...]
    packed: bool
    last_B: Tensor
    response_mask_BR: Tensor
    predict_N: Tensor
    target_N: Tensor

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device | str,
        *,
        packed: bool = False,
    ) -> Self:
        """Pad to the longest row, or pack. No prompt and no response may be empty."""
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        lengths = tuple(map(len, rows))
        width, width_r = max(lengths), max(map(len, responses))
        if packed:
            ids = [[token for row in rows for token in row]]
            starts = [0, *accumulate(lengths[:-1])]
        else:
            ids = [row + [pad_id] * (width - len(row)) for row in rows]
            starts = [row * width for row in range(len(rows))]
        mask_BR = torch.arange(width_r) < torch.tensor([len(r) for r in responses]).unsqueeze(1)
        firsts = torch.tensor([start + len(p) - 1 for start, p in zip(starts, prompts, strict=True)])
        return cls(
            torch.tensor(ids, device=device),
            lengths,
            packed,
            torch.tensor([start + n - 1 for start, n in zip(starts, lengths, strict=True)], device=device),
            mask_BR.to(device),
            (firsts.unsqueeze(1) + torch.arange(width_r))[mask_BR].to(device),
            torch.tensor([token for response in responses for token in response], device=device),
        )

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)


@dataclass(frozen=True)
class MicroBatch:
    """Responses that go through the networks together: in the scoring pass and in every epoch alike.

    rows: their indices in the process's rollout, [B].
    """

    rows: Tensor
    tokens: TokenBatch

    def take(self, whole_BR: Tensor) -> Tensor:
        """This batch's response tokens out of a tensor of the whole rollout, rows in order, [N]."""
        mask = self.tokens.response_mask_BR
        return whole_BR[self.rows, : mask.shape[1]][mask]

    def put(self, whole_BR: Tensor, values_N: Tensor) -> None:
        """The reverse of `take`, in place."""
        mask = self.tokens.response_mask_BR
        part = torch.zeros(mask.shape, dtype=whole_BR.dtype, device=whole_BR.device)
        part[mask] = values_N.to(whole_BR.dtype)
        whole_BR[self.rows, : mask.shape[1]] = part


def length_buckets(
    lengths: Sequence[int],
    rows: Sequence[int],
    max_tokens: int,
    max_rows: int | None = None,
    *,
    packed: bool = False,
) -> list[list[int]]:
    """Cut `rows` into groups of similar length, longest first: at most max_tokens tokens, padding included
    unless packed, and max_rows rows each.

    lengths: tokens of every row of the rollout, indexed by the entries of `rows`. A row longer than
    max_tokens
    is a group of its own. Longest first, so that what does not fit in memory shows in the first step.
    """
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        # In a padded group every row takes as much as the first one, the longest.
        size = lengths[row] if packed or not groups else lengths[groups[-1][0]]
        if not groups or tokens + size > max_tokens or len(groups[-1]) == max_rows:
            groups.append([row])
            tokens = lengths[row]
        else:
            groups[-1].append(row)
            tokens += size
    return groups


def micro_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: Sequence[int],
    pad_id: int,
    device: torch.device | str,
    max_tokens: int,
    max_rows: int | None = None,
    *,
    packed: bool = False,
) -> list[MicroBatch]:
    """The given rows of a rollout in groups that go through a network together, see `length_buckets`."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    return [
        MicroBatch(
            torch.tensor(group, device=device),
            TokenBatch.build(
                [prompts[i] for i in group], [responses[i] for i in group], pad_id, device, packed=packed
            ),
        )
        for group in length_buckets(lengths, rows, max_tokens, max_rows, packed=packed)
    ]
