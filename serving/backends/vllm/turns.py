"""Requests taking turns, one forward pass each: for models that cannot compute several in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from serving.backends.vllm.batching import AdaptersLike, takes_logits_to_keep


@dataclass
class _Turn:
    pending: list[int]
    adapter: str | None
    cache: Any = field(default=None)


class Turns:
    """Same interface as PagedBatch. Each request keeps a cache of its own and is computed alone."""

    def __init__(self, model: Any, adapters: AdaptersLike | None) -> None:
        self.model = model
        self.adapters = adapters
        self._options = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        self._turns: dict[str, _Turn] = {}

    def add(self, key: str, prompt_ids: list[int], max_tokens: int, adapter: str | None) -> bool:
        """Take a request in; there is always room, for as many as the engine lets be active."""
        self._turns[key] = _Turn(prompt_ids, adapter)
        return True

    def step(self) -> tuple[list[str], torch.Tensor]:
        """Next-token logits (rows, vocabulary) in float32 on the CPU, and the requests they belong to."""
        # Requests of one adapter follow each other, so that adapters are switched once for each in use.
        keys = sorted(self._turns, key=lambda key: self._turns[key].adapter or "")
        return keys, torch.stack([self._logits(self._turns[key]) for key in keys])

    def extend(self, key: str, token: int) -> None:
        """Go on with this token."""
        self._turns[key].pending = [token]

    def remove(self, key: str) -> None:
        """Forget a request."""
        del self._turns[key]

    def _logits(self, turn: _Turn) -> torch.Tensor:
        if self.adapters is not None:
            self.adapters.use([(turn.adapter, len(turn.pending))])
        ids_1T = torch.tensor([turn.pending], device=self.model.device)
        output = self.model(input_ids=ids_1T, past_key_values=turn.cache, use_cache=True, **self._options)
        turn.cache = output.past_key_values
        logits_V: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits_V
