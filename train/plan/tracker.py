"""Live bytes of a computation on tensors without data, by what they are for.

torch's own allocator counts storages when they are made and when they die; so does `MemoryTracker`, a
dispatch mode that sees every operation before FakeTensorMode answers it with a shape. What a forward pass, a
backward pass and an optimizer step would hold is thereby the outcome of the very code that trains, not of a
formula for an architecture. Unseen are buffers that a kernel allocates inside one operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, MODELS, GRADIENTS, OPTIMIZER = "weights", "other_models", "gradients", "optimizer"
CASTS, ACTIVATIONS, LOGITS, KV_CACHE, STEP = "casts", "activations", "logits", "kv_cache", "step"
STANDING = (WEIGHTS, MODELS, OPTIMIZER)
"""Held throughout; the others come and go within a step."""


@dataclass(frozen=True)
class Point:
    """A moment: bytes of gradients, and of each category that comes and goes."""

    gradients: int
    others: dict[str, int]

    @property
    def passing(self) -> int:
        """Bytes of what comes and goes, gradients apart."""
        return sum(self.others.values())


@dataclass
class Trace:
    """What a stage holds: bytes that stand, and the worst moments for every amount of gradients."""

    standing: dict[str, int]
    points: list[Point]


@dataclass
class MemoryTracker(TorchDispatchMode):
    """Counts live storages by category. `category` is that of what is allocated next."""

    category: str = ACTIVATIONS
    totals: dict[str, int] = field(default_factory=dict)
    worst: dict[int, dict[str, int]] = field(default_factory=dict)
    noting: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        category = self.category
        if func is torch.ops.aten._to_copy.default and self._of(args[0]) in (WEIGHTS, MODELS):
            category = CASTS
        elif func is torch.ops.aten.cat.default and self._of(args[0][0]) == KV_CACHE:
            category = KV_CACHE
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf, category)
        return result

    def see(self, tensor: Tensor, category: str) -> None:
        """Count the tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0:
            return

        def dead(_: Any) -> None:
            _, count, kind = self._live.pop(key)
            self.totals[kind] -= count

        self._live[key] = (weakref.ref(storage, dead), size, category)
        self.totals[category] = self.totals.get(category, 0) + size
        self._note()

    def move(self, tensor: Tensor, category: str) -> None:
        """Count the tensor's storage under another category from now on."""
        key = tensor.untyped_storage()._cdata
        reference, size, before = self._live[key]
        self._live[key] = (reference, size, category)
        self.totals[before] -= size
        self.totals[category] = self.totals.get(category, 0) + size
        self._note()

    def hold(self, modules: Iterable[nn.Module], category: str) -> None:
        """Count the parameters and buffers of these modules, and the gradients that reach them."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self.see(tensor, category)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._graded)

    def separate_head(self, backbone: nn.Module) -> None:
        """What is allocated between the backbone's output and its gradient counts as logits and loss."""

        def before(*_: Any) -> None:
            self.category = ACTIVATIONS

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.category = LOGITS
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                hidden.register_hook(before)

        backbone.register_forward_pre_hook(before)
        backbone.register_forward_hook(after)

    @contextmanager
    def counting_as(self, category: str) -> Iterator[None]:
        """Inside, what is allocated counts under this category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def forget_peaks(self) -> None:
        """From now on look for the worst moments anew."""
        self.worst = {}
        self._note()

    def trace(self) -> Trace:
        """The worst moments since `forget_peaks`; a moment is left out where another is as bad in both its
        gradients and the rest.
        """
        points: list[Point] = []
        for gradients in sorted(self.worst, reverse=True):
            point = Point(gradients, {k: v for k, v in self.worst[gradients].items() if v})
            if not points or point.passing > points[-1].passing:
                points.append(point)
        return Trace({name: self.totals.get(name, 0) for name in STANDING}, points)

    def _graded(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.move(parameter.grad, GRADIENTS)

    def _of(self, tensor: Tensor) -> str | None:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[2] if entry else None

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """Inside, no moment is looked at: for what only prepares another one."""
        self.noting = False
        try:
            yield
        finally:
            self.noting = True

    def _note(self) -> None:
        if not self.noting:
            return
        passing = {k: v for k, v in self.totals.items() if k not in STANDING and k != GRADIENTS}
        gradients = self.totals.get(GRADIENTS, 0)
        before = self.worst.get(gradients)
        if before is None or sum(passing.values()) > sum(before.values()):
            self.worst[gradients] = passing
