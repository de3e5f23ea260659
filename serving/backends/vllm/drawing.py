"""Drawing next tokens: many rows at a time, each with its own request's parameters and randomness."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serving.backends.vllm.sampling import SamplingParams

NUCLEUS_CANDIDATES = 1024


def draw(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """One token per row: temperature first, then top-k, then top-p on what is left, as vLLM orders them.

    What is drawn for a row depends on nothing but that row, its parameters and its generator.

    Args:
        logits_RV: raw next-token logits, float32, on the CPU.
        params: of each row; temperature, top_k and top_p are read.
        generators: of each row; a greedy row leaves its own untouched.
    """
    tokens: list[int] = logits_RV.argmax(dim=-1).tolist()
    groups: dict[int, list[int]] = {}
    for row, of_row in enumerate(params):
        if not of_row.greedy:
            groups.setdefault(_candidates(logits_RV[row], of_row), []).append(row)
    for candidates, rows in groups.items():
        drawn = _sample(
            logits_RV[rows], candidates, [params[row] for row in rows], [generators[row] for row in rows]
        )
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _candidates(logits_V: torch.Tensor, params: SamplingParams) -> int:
    """How many of the likeliest tokens have to be sorted: 0 for none, because all may be drawn."""
    size = len(logits_V)
    if params.top_k:
        return min(params.top_k, size)
    if params.top_p == 1.0:
        return 0
    if size > NUCLEUS_CANDIDATES:
        tempered_V = logits_V / params.temperature
        reached = tempered_V.topk(NUCLEUS_CANDIDATES).values.logsumexp(0) - tempered_V.logsumexp(0)
        if reached.exp() > params.top_p:
            return NUCLEUS_CANDIDATES
    return size


def _sample(
    logits_SV: torch.Tensor,
    candidates: int,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
) -> list[int]:
    tempered_SV = logits_SV / torch.tensor([[each.temperature] for each in params])
    ids_SK = None
    if not candidates:
        probs_SK = torch.softmax(tempered_SV.double(), dim=-1)
    else:
        top_SK, ids_SK = _top(tempered_SV, candidates)
        by_top_k = [[bool(each.top_k)] for each in params]
        total_S1 = torch.where(
            torch.tensor(by_top_k),
            top_SK.double().logsumexp(-1, keepdim=True),
            tempered_SV.double().logsumexp(-1, keepdim=True),
        )
        probs_SK = (top_SK.double() - total_S1).exp()
        before_SK = probs_SK.cumsum(dim=-1) - probs_SK
        limits_S1 = torch.tensor([[each.top_p] for each in params], dtype=torch.float64)
        outside_SK = before_SK >= limits_S1
        outside_SK[:, 0] = False
        probs_SK = probs_SK.masked_fill(outside_SK & (limits_S1 < 1.0), 0.0)
    sums_SK = probs_SK.cumsum(dim=-1)
    # In (0, 1], so that the first sum that reaches it belongs to a token of positive probability.
    uniform = [[1.0 - float(torch.rand((), generator=g, dtype=torch.float64))] for g in generators]
    wanted_S1 = torch.tensor(uniform, dtype=torch.float64) * sums_SK[:, -1:]
    at_S1 = torch.searchsorted(sums_SK, wanted_S1).clamp_(max=sums_SK.shape[1] - 1)
    drawn_S1 = at_S1 if ids_SK is None else ids_SK.gather(1, at_S1)
    drawn: list[int] = drawn_S1[:, 0].tolist()
    return drawn


def _top(logits_SV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if count < logits_SV.shape[1]:
        return logits_SV.topk(count, dim=-1)
    return logits_SV.sort(dim=-1, descending=True, stable=True)
