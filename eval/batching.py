"""Token rows into padded batches. Torch is imported by this module; nothing torch-free may import it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row indices in batches of similar length, longest first (running out of memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "right", device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both long (B, T), T the longest row; `side` is left or right."""
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for b, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BT[b, span] = torch.tensor(row, dtype=torch.long)
        mask_BT[b, span] = 1
    return ids_BT.to(device), mask_BT.to(device)


def token_logprobs(
    model: torch.nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p(token t | tokens before t) of right-padded rows, float32 of shape (B, T-1) for tokens 1..T-1.

    The distribution is softmax(logits / temperature). Values at padded positions are 0.
    """
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1].float() / temperature
    targets_BT = ids_BT[:, 1:]
    chosen_BT = logits_BTV.gather(-1, targets_BT[..., None])[..., 0] - logits_BTV.logsumexp(-1)
    return chosen_BT * mask_BT[:, 1:]
