"""Perplexity and bits per byte as a task, with intervals over rows (eval.perplexity has the definitions)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_prep.dataset import read_info
from eval.batching import length_sorted_batches, pad_rows, token_logprobs
from eval.generators.base import Output, Target
from eval.generators.local import LocalModel
from eval.held_out import load_scored_rows
from eval.statistics import Interval, bootstrap_limits
from eval.tasks.base import How, Measured, Result, Scored
from eval.tasks.config import PerplexityTask
from eval.tasks.items import Item
from posttrain.context import ProgressTracker
from posttrain.errors import DataError, UserError


class LanguageModelling:
    """perplexity (per token) and bits_per_byte, token-weighted over the whole set."""

    def __init__(self, config: PerplexityTask) -> None:
        self.config = config

    @torch.no_grad()
    def run(self, target: Target, path: Path, how: How, bar: ProgressTracker) -> Measured:
        """Raises UserError for a target that is no local model, DataError for data without scored tokens."""
        if not isinstance(target, LocalModel):
            raise UserError(f"targets.{target.name}: perplexity needs a target of kind `model`")
        kind = (read_info(path) or {}).get("kind")
        if kind not in ("text", "conversation"):
            raise DataError(f"{path}: holds rows of kind {kind}; perplexity reads text or conversation")
        limit = min(self.config.max_tokens, target.context_length() or self.config.max_tokens)
        wanted = self.config.limit or 2**31
        loaded = load_scored_rows(
            path, kind, target.tokenizer, wanted=wanted, max_tokens=limit, seed=how.seed
        )
        rows = [row for row in loaded if any(row.scored) and row.text_bytes]
        if not rows:
            raise DataError(f"{path}: none of {len(loaded)} rows has a token to score")
        pad = target.tokenizer.pad_token_id
        totals = np.zeros((len(rows), 3))
        for batch in length_sorted_batches([len(row.ids) for row in rows], target.batch_size):
            ids_BT, mask_BT = pad_rows([rows[i].ids for i in batch], pad, "right", target.model.device)
            scored_BT, _ = pad_rows(
                [[int(s) for s in rows[i].scored] for i in batch], 0, "right", target.model.device
            )
            nll_B = -(token_logprobs(target.model, ids_BT, mask_BT) * scored_BT[:, 1:]).double().sum(dim=1)
            for i, nll in zip(batch, nll_B.tolist(), strict=True):
                totals[i] = nll, sum(rows[i].scored), rows[i].text_bytes
            bar.advance(len(batch))
        target.usage.computed += len(rows)
        scores = {
            "perplexity": _ratio(totals, 1, np.exp, how),
            "bits_per_byte": _ratio(totals, 2, lambda ratio: ratio / math.log(2), how),
        }
        counts = {
            "items": len(rows),
            "tokens": int(totals[:, 1].sum()),
            "text_bytes": int(totals[:, 2].sum()),
            "rows_cut": sum(row.cut for row in rows),
        }
        results = [
            Result(
                Item(str(i), f"{path}: row {i}", [], "", {}),
                0,
                Output(""),
                Scored({"nll": nll, "tokens": tokens, "bytes": size}),
            )
            for i, (nll, tokens, size) in enumerate(totals.tolist())
        ]
        return Measured(scores, results, counts)


def _ratio(totals: np.ndarray, by: int, scale: Callable[[np.ndarray], np.ndarray], how: How) -> Interval:
    """scale(sum of nll / sum of column `by`), rows resampled."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.asarray(scale((weights @ totals[:, 0]) / (weights @ totals[:, by])))

    value = float(statistic(np.ones((1, len(totals))))[0])
    low, high, error = bootstrap_limits(
        statistic, len(totals), how.confidence, how.bootstrap_samples, how.seed
    )
    return Interval(value, float(low), float(high), len(totals), "bootstrap-bca", float(error))
