"""Token batches: prompts followed by responses, padded on the right, grouped by length.

A row is contiguous, so that a causal model needs neither an attention mask nor position ids of its own:
what stands right of a token is never seen by it. Only the positions that predict a response token are ever
turned into log-probabilities or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Prompt and response of each row, then padding.

    input_ids_BT, attention_mask_BT: long, T the longest row. response_mask_BR: bool, a non-empty prefix of
    each row. Per response token, rows in order: predict_N, the place in the flattened [B * T] positions from
    which it is predicted; target_N, its id. N is the number of response tokens.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
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
    ) -> Self:
        """Pad to the longest row. No prompt and no response may be empty."""
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        width, width_r = max(lengths), max(map(len, responses))
        ids = [[*p, *r, *[pad_id] * (width - n)] for p, r, n in zip(prompts, responses, lengths, strict=True)]
        columns = torch.arange(width)
        mask_BT = (columns < torch.tensor(lengths).unsqueeze(1)).long()
        mask_BR = torch.arange(width_r) < torch.tensor([len(r) for r in responses]).unsqueeze(1)
        starts = torch.tensor([row * width + len(p) - 1 for row, p in enumerate(prompts)])
        predict_N = (starts.unsqueeze(1) + torch.arange(width_r))[mask_BR]
        target_N = torch.tensor([token for response in responses for token in response])
        return cls(
            torch.tensor(ids, device=device),
            mask_BT.to(device),
            mask_BR.to(device),
            predict_N.to(device),
            target_N.to(device),
        )

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask_BT.sum())


def length_buckets(
    lengths: Sequence[int], rows: Sequence[int], max_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """Cut `rows` into groups of similar length, longest first: at most max_tokens tokens, padding included,
    and max_rows rows each.

    lengths: tokens of every row of the rollout, indexed by the entries of `rows`. A row longer than
    max_tokens
    is a group of its own. Longest first, so that what does not fit in memory shows in the first step.
    """
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        group = groups[-1] if groups else []
        full = (len(group) + 1) * lengths[group[0]] > max_tokens if group else True
        if full or len(group) == max_rows:
            groups.append([row])
        else:
            group.append(row)
    return groups
