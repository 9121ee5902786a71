"""The models of one server, by name and version. Knows no transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor

from server.errors import ModelNotReady, UnknownModel
from server.metrics import Metrics
from server.model import Model
from server.repository import Found

log = logging.getLogger(__name__)


class Core:
    """Answers what every front end asks.

    Attributes:
        failed: Versions that cannot be served, by (name, version), with the reason.
    """

    def __init__(self, found: Iterable[Found], metrics: Metrics, decoders: Executor, max_pixels: int) -> None:
        self._models: dict[str, dict[str, Model]] = {}
        self.failed: dict[tuple[str, str], str] = {}
        self._loaded = False
        self._draining = False
        for one in found:
            if one.spec is None:
                self.failed[one.name, one.version] = one.reason
                log.error("model %s cannot be served: %s", f"{one.name} {one.version}".strip(), one.reason)
            else:
                model = Model(one.spec, metrics, decoders, max_pixels)
                self._models.setdefault(one.name, {})[one.version] = model

    def __iter__(self) -> Iterator[Model]:
        """Every version of every model, whatever its state."""
        return (model for versions in self._models.values() for model in versions.values())

    @property
    def ready(self) -> bool:
        """Whether every model is loaded or known to be broken, one at least can be served, and nothing is stopping."""
        return self._loaded and not self._draining and any(m.state == "ready" for m in self)

    async def load(self, changed: Callable[[Model], None]) -> None:
        """Loads every model at once; calls `changed` for each as it becomes ready or fails."""

        async def load(model: Model) -> None:
            await model.load()
            if model.state == "failed":
                self.failed[model.spec.name, model.spec.version] = model.reason
            changed(model)

        await asyncio.gather(*(load(m) for m in self))
        self._loaded = True

    def begin_drain(self) -> None:
        """From now on the server says that it is not ready, while it still answers."""
        self._draining = True

    async def drain(self) -> None:
        """Answers what was admitted, then stops every engine."""
        await asyncio.gather(*(m.drain() for m in self))

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are known, oldest first.

        Raises:
            UnknownModel: There is no such model.
        """
        if name not in self._models:
            raise UnknownModel(name)
        return list(self._models[name])

    def model(self, name: str, version: str = "") -> Model:
        """One version, "" for the newest that is ready.

        Raises:
            UnknownModel: There is no such model or version.
            ModelNotReady: It is in the repository but could not be read.
        """
        versions = self._models.get(name)
        if versions is None:
            if any(broken == name for broken, _ in self.failed):
                raise ModelNotReady(f"model '{name}' failed to load")
            raise UnknownModel(name)
        if version:
            if version not in versions:
                raise UnknownModel(name, version)
            return versions[version]
        newest = list(versions.values())[::-1]
        return next((m for m in newest if m.state == "ready"), newest[0])
