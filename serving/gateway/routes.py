"""Which version answers: weights, stickiness, shadows, and the table that a reload or rollback swaps.

A table is never changed, only replaced; a request keeps the version it was given until it ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from serving.gateway.config import LimitsConfig, ModelConfig, VersionConfig
from serving.gateway.errors import ApiError, unknown_model
from serving.gateway.keys import ApiKey
from serving.gateway.prompts import Renderer, load_renderer
from serving.gateway.upstream import Target, Upstream

SEPARATOR = "@"


@dataclass(frozen=True)
class Version:
    """One version of a model, ready to be asked."""

    name: str
    config: VersionConfig
    renderer: Renderer
    upstream: Upstream
    target: Target


@dataclass(frozen=True)
class Model:
    """One public model name. weights: by version, in the order of `versions`."""

    name: str
    config: ModelConfig
    versions: dict[str, Version]
    weights: dict[str, float]

    def pick(self, point: float) -> Version:
        """The version at `point` of [0, 1): versions lie side by side, each as wide as its share.

        The order is the file's, so that a canary that grows from 10 % to 20 % keeps those it had.
        """
        total = sum(self.weights.values())
        reached = 0.0
        chosen = ""
        for name, weight in reversed(self.weights.items()):
            if weight > 0:
                chosen = name
                reached += weight / total
                if point < reached:
                    break
        return self.versions[chosen]


@dataclass(frozen=True)
class Table:
    """All models, and the Triton connections they use by url."""

    models: dict[str, Model] = field(default_factory=dict)
    upstreams: dict[str, Upstream] = field(default_factory=dict)

    def find(self, name: str, key: ApiKey) -> tuple[Model, str | None]:
        """The model called `name`, and the version where the name is model@version.

        Raises ApiError 404 when there is none or the key may not use it.
        """
        base, _, version = name.partition(SEPARATOR)
        model = self.models.get(base)
        if model is None or not allowed(key, base) or (SEPARATOR in name and version not in model.versions):
            raise unknown_model(name)
        return model, version or None


def allowed(key: ApiKey, model: str) -> bool:
    """Whether the key may use the model."""
    return key.models is None or model in key.models


def sticky_point(model: Model, key: ApiKey, user: str | None) -> float | None:
    """Where in [0, 1) this caller always lands for this model; None where nobody is kept."""
    if model.config.sticky == "none":
        return None
    who = [model.name, key.name] + ([user] if user and model.config.sticky == "user" else [])
    digest = hashlib.sha256("\0".join(who).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def load_renderers(
    models: Mapping[str, ModelConfig], threads: ThreadPoolExecutor
) -> dict[tuple[str, int | None], Renderer]:
    """One renderer for each version of an export that is served, by `export` and `model_version`.

    Raises UserError as `load_renderer`.
    """
    wanted = {(v.export, v.model_version): None for model in models.values() for v in model.versions.values()}
    return {(folder, version): load_renderer(Path(folder), version, threads) for folder, version in wanted}


class Router:
    """The table in force and the one before it."""

    def __init__(
        self, limits: LimitsConfig, threads: ThreadPoolExecutor, draw: Callable[[], float] = random.random
    ) -> None:
        self.limits = limits
        self.threads = threads
        self.draw = draw
        self.table = Table()
        self._previous: Table | None = None

    def choose(self, model: Model, version: str | None, key: ApiKey, user: str | None) -> Version:
        """The version that answers this request."""
        if version is not None:
            return model.versions[version]
        point = sticky_point(model, key, user)
        return model.pick(self.draw() if point is None else point)

    def shadow(self, model: Model, answering: Version) -> Version | None:
        """The version that gets a copy of this request, if any does."""
        shadow = model.config.shadow
        if shadow is None or shadow.version == answering.name or self.draw() >= shadow.fraction:
            return None
        return model.versions[shadow.version]

    async def load(self, models: Mapping[str, ModelConfig]) -> None:
        """Read every export and put the new table in force, or leave the old one and raise UserError."""
        renderers = await asyncio.to_thread(load_renderers, models, self.threads)
        upstreams: dict[str, Upstream] = {}
        built = {}
        for name, config in models.items():
            versions = {}
            for label, version in config.versions.items():
                upstream = upstreams.get(version.triton) or self._connection(version.triton)
                upstreams[version.triton] = upstream
                renderer = renderers[version.export, version.model_version]
                target = Target(version.model or renderer.name, str(version.model_version or ""))
                versions[label] = Version(label, version, renderer, upstream, target)
            weights = {label: version.weight for label, version in config.versions.items()}
            built[name] = Model(name, config, versions, weights)
        await self._replace(Table(built, upstreams))

    def _connection(self, url: str) -> Upstream:
        known = self.table.upstreams.get(url) or (self._previous and self._previous.upstreams.get(url))
        return known or Upstream(url, self.limits)

    async def reweigh(self, name: str, weights: Mapping[str, float]) -> None:
        """Put other weights of one model in force; versions that are not named get 0.

        Raises ApiError 400 or 404.
        """
        model = self.table.models.get(name)
        if model is None:
            raise ApiError(404, "there is no such model", param="model")
        if not weights.keys() <= model.versions.keys():
            raise ApiError(400, f"versions of this model: {', '.join(model.versions)}", param="weights")
        if not any(weight > 0 for weight in weights.values()):
            raise ApiError(400, "one weight must be above 0", param="weights")
        changed = {label: weights.get(label, 0.0) for label in model.versions}
        updated = Model(model.name, model.config, model.versions, changed)
        await self._replace(Table(self.table.models | {name: updated}, self.table.upstreams))

    async def rollback(self) -> None:
        """Put the table before this one in force again; once more undoes that. Raises ApiError 409."""
        if self._previous is None:
            raise ApiError(409, "there is nothing to roll back to", code="no_previous_routes")
        self.table, self._previous = self._previous, self.table

    async def _replace(self, table: Table) -> None:
        dropped = self._previous.upstreams if self._previous else {}
        self._previous = self.table if self.table.models else None
        self.table = table
        kept = table.upstreams | (self._previous.upstreams if self._previous else {})
        for url, upstream in dropped.items():
            if kept.get(url) is not upstream:
                await upstream.retire()

    async def ready(self) -> dict[str, bool]:
        """Whether each version that gets traffic can be asked, by "model@version"."""
        asked = {
            f"{model.name}{SEPARATOR}{label}": version
            for model in self.table.models.values()
            for label, version in model.versions.items()
            if model.weights[label] > 0
        }
        states = await asyncio.gather(*(v.upstream.ready(v.target) for v in asked.values()))
        return dict(zip(asked, states, strict=True))

    async def close(self) -> None:
        """Close every connection."""
        tables = [self.table, *([self._previous] if self._previous else [])]
        for upstream in {id(u): u for table in tables for u in table.upstreams.values()}.values():
            await upstream.retire()


def describe(table: Table) -> dict[str, dict[str, float]]:
    """{model: {version: share of the traffic}}."""
    shares = {}
    for model in table.models.values():
        total = sum(model.weights.values())
        shares[model.name] = {label: round(weight / total, 6) for label, weight in model.weights.items()}
    return shares
