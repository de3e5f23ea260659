"""How far a policy has moved from its reference, measured on the policy's own samples.

With lr_t = log p(token t) - log q(token t) for policy p and reference q, tokens drawn from p
(Schulman, "Approximating KL divergence", 2020):
    k1 = sum_t lr_t                          unbiased for KL(p || q) of whole sequences, may be negative
    k3 = sum_t (exp(-lr_t) - 1 + lr_t)       unbiased as well, never negative, less noisy when p is near q
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from eval.batching import length_sorted_batches, pad_rows, token_logprobs
from eval.generation import Generation


@torch.no_grad()
def response_logprobs(
    model: Any,
    generations: Sequence[Generation],
    *,
    pad_id: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[torch.Tensor]:
    """Log-probability of each response token, one float32 CPU tensor of shape (len(ids),) per answer."""
    model.eval()
    rows = [generation.prompt_ids + generation.ids for generation in generations]
    result: dict[int, torch.Tensor] = {}
    for batch in length_sorted_batches([len(row) for row in rows], batch_size):
        ids_BT, mask_BT = pad_rows([rows[i] for i in batch], pad_id, "right", model.device)
        logprobs_BT = token_logprobs(model, ids_BT, mask_BT, temperature).cpu()
        for b, i in enumerate(batch):
            result[i] = logprobs_BT[b, len(generations[i].prompt_ids) - 1 : len(rows[i]) - 1].clone()
        on_batch(len(batch))
    return [result[i] for i in range(len(rows))]


def sequence_kl(policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """k1 and k3 per sequence in nats, from the log-probabilities of the same tokens under both models."""
    k1, k3 = [], []
    for policy_T, reference_T in zip(policy, reference, strict=True):
        ratio_T = (policy_T - reference_T).double()
        k1.append(float(ratio_T.sum()))
        k3.append(float((torch.exp(-ratio_T) - 1 + ratio_T).sum()))
    return {"k1": k1, "k3": k3}
