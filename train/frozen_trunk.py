"""A trunk that is not trained needs to read each dialogue only once.

With a frozen model below a score head, the hidden state that the head reads is a constant of the dialogue.
`FrozenTrunk` takes the trunk's place in a sequence classifier, runs it on the dialogues it has not seen yet
and remembers the one state that is read of each. Training and cross-validating the head (a linear probe) then
costs one pass over the data, however many epochs and folds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

BATCH = 32
"""Dialogues that are read ahead together."""


class FrozenTrunk(nn.Module):
    """Last hidden states of a trunk without dropout or gradient, computed once per dialogue.

    It has no parameters: the trunk itself is neither trained nor saved with what it stands in.

    Args:
        trunk: called with ``input_ids`` and ``attention_mask``; moved to the GPU if there is one.
        bf16: run the trunk under bfloat16 autocast. States are kept in float32, on the CPU.
    """

    def __init__(self, trunk: nn.Module, bf16: bool) -> None:
        super().__init__()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run: Callable[..., Any] = trunk.eval().requires_grad_(False).to(self._device)
        self._run = [run]  # in a list, so that it does not become a submodule
        self._bf16 = bf16
        self._states: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        """Number of dialogues remembered."""
        return len(self._states)

    def read_ahead(self, dialogues: Sequence[list[int]], advance: Callable[[int], Any]) -> None:
        """Remember token ids to come, BATCH of like length at a time; `advance` is told how many."""
        ordered = sorted(map(tuple, dialogues), key=len)
        for start in range(0, len(ordered), BATCH):
            batch = [torch.tensor(ids) for ids in ordered[start : start + BATCH]]
            keys = [ids.numpy().tobytes() for ids in batch]
            self._states |= zip(keys, self._read(batch), strict=True)
            advance(len(batch))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """As the trunk's, but each row has the state of its last attended token at every position.

        input_ids, attention_mask: (batch, time), padded on either side. ``last_hidden_state``: (batch, time,
        width).
        """
        masks = attention_mask.bool().cpu()
        rows = [ids[mask] for ids, mask in zip(input_ids.cpu(), masks, strict=True)]
        keys = [row.numpy().tobytes() for row in rows]
        unseen = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._states}
        if unseen:
            self._states |= zip(unseen, self._read(list(unseen.values())), strict=True)
        states_BD = torch.stack([self._states[key] for key in keys]).to(input_ids.device)
        return BaseModelOutputWithPast(
            last_hidden_state=states_BD[:, None].expand(-1, input_ids.shape[1], -1)  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _read(self, dialogues: Sequence[Tensor]) -> Tensor:
        """State of the last token of each dialogue, (batch, width), on the CPU."""
        lengths = [len(ids) for ids in dialogues]
        padded_BT = nn.utils.rnn.pad_sequence(list(dialogues), batch_first=True).to(self._device)
        places_T = torch.arange(max(lengths), device=self._device)
        mask_BT = (places_T < torch.tensor(lengths, device=self._device)[:, None]).long()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            hidden_BTD = self._run[0](
                input_ids=padded_BT, attention_mask=mask_BT, use_cache=False
            ).last_hidden_state
        return hidden_BTD[torch.arange(len(lengths)), torch.tensor(lengths) - 1].float().cpu()


@contextmanager
def in_place_of_trunk(model: PreTrainedModel, frozen: FrozenTrunk | None) -> Iterator[None]:
    """While it lasts, the head of `model` reads `frozen`; with None the model is left as it is."""
    if frozen is None:
        yield
        return
    trunk = model.base_model
    setattr(model, model.base_model_prefix, frozen)
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, trunk)
