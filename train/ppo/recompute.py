"""Activation checkpointing for networks whose adapters are switched between forward and backward.

Each decoder layer keeps its input alone and is computed again in the backward pass (Chen et al. 2016,
Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174). By then another adapter may be switched on
and another batch be packed, so what the forward pass ran under is put back around the layer while it is
computed again. transformers' own switch asks for training mode, which would bring dropout back; this one
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import UserError

Restore = Callable[[nn.Module], AbstractContextManager[object]]
"""Puts back, for one layer, what a forward pass ran under."""
_restore: ContextVar[Restore] = ContextVar("restore")


@contextmanager
def restored_by(restore: Restore) -> Iterator[None]:
    """Layers that run inside are computed again under `restore(layer)`."""
    token = _restore.set(restore)
    try:
        yield
    finally:
        _restore.reset(token)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """From now on the layers of `model` keep no activations for the backward pass, only their inputs.

    Raises UserError for a model whose layers transformers does not mark as recomputable.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"activation_checkpointing: {type(model).__name__} has no layers that can be computed again\n"
            "    set activation_checkpointing: false and lower micro_batch_tokens instead"
        )
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    restore = _restore.get()
    # Nothing in the networks is random: dropout is off.
    return checkpoint(
        plain,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), restore(layer)),
        **kwargs,
    )
