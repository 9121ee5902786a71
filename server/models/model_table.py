"""The models of one server as requests see them: by name and version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from convoynet.server.errors import LOADING_S, InvalidModel, ModelNotReady, UnknownModel
from convoynet.server.models.servable import Servable
from convoynet.server.repository.overlay import remove_overlay
from convoynet.server.repository.specs import Found, ModelConfig

log = logging.getLogger(__name__)


class IndexEntry(NamedTuple):
    """One line of the repository's index; version and state are "" for a model that was never loaded."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Origin:
    """What a load takes the model from, where that is not the repository alone."""

    config: Mapping[str, Any] | None = None
    folder: Path | None = None

    @property
    def overrides(self) -> bool:
        """Whether it takes anything from elsewhere."""
        return self.config is not None or self.folder is not None


REPOSITORY = Origin()


@dataclass(frozen=True)
class Served:
    """One version that is served, and what it was made of."""

    found: Found
    model: Servable


@dataclass
class Entry:
    """One model by name.

    Attributes:
        lock: Held by whoever changes the model.
        versions: What requests see, oldest first.
        failed: Why versions could not be loaded; "" stands for the whole model.
        loading: Versions that are being loaded.
        starting: The models of these.
        unloaded: Versions that were unloaded.
        unloading: Whether it is being unloaded: only ensembles that hold it may still ask it.
        retiring: Versions that nobody sees any more and that still answer what they admitted.
        fingerprint: Of its folder when it was last read; None where nobody wants the model.
        steps: The models of its steps, as they were last read.
        overridden: Whether it was loaded with a config or files of a load request.
        overlay: The folder of those files.
        held: Requests of ensembles that need the model.
        released: Set when there are none any more.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    versions: dict[str, Served] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    loading: list[str] = field(default_factory=list)
    starting: list[Servable] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    unloading: bool = False
    retiring: list[Servable] = field(default_factory=list)
    fingerprint: str | None = None
    steps: frozenset[str] = frozenset()
    overridden: bool = False
    overlay: Path | None = None
    held: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def index(self, name: str) -> list[IndexEntry]:
        """Its lines of the index, oldest version first."""
        lines = {v: IndexEntry(name, v, "UNAVAILABLE", "unloaded") for v in self.unloaded}
        # What fails as a whole while it is served is told of each version that serves on.
        failed = {v: why for v, why in self.failed.items() if v or not self.versions}
        lines |= {v: IndexEntry(name, v, "UNAVAILABLE", why) for v, why in failed.items()}
        lines |= {m.spec.version: IndexEntry(name, m.spec.version, "UNLOADING", "") for m in self.retiring}
        lines |= {v: IndexEntry(name, v, "LOADING", "") for v in self.loading}
        lines |= {v: self._line(name, served.model) for v, served in self.versions.items()}
        return sorted(lines.values(), key=lambda line: int(line.version or 0)) or [IndexEntry(name, "", "", "")]

    def _line(self, name: str, model: Servable) -> IndexEntry:
        version = model.spec.version
        if self.unloading:
            return IndexEntry(name, version, "UNLOADING", "")
        if model.state == "ready":
            why = self.failed.get(version) or self.failed.get("")
            return IndexEntry(name, version, "READY", f"the reload failed: {why}" if why else "")
        state = {"loading": "LOADING", "draining": "UNLOADING"}.get(model.state, "UNAVAILABLE")
        return IndexEntry(name, version, state, model.reason)

    def drop_overlay(self) -> None:
        """Removes the files that a load request brought along."""
        if self.overlay is not None:
            remove_overlay(self.overlay)
            self.overlay = None

    async def unheld(self) -> None:
        """Waits until no request of an ensemble needs the model."""
        while self.held:
            self.released.clear()
            await self.released.wait()


class ModelTable:
    """Finds models for requests. Who changes the entries is the core."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Servable]:
        """Every version that is served, whether it is ready or not, by name: many load at once, in no order."""
        entries = [entry for _, entry in sorted(self._entries.items())]
        return (served.model for entry in entries for served in entry.versions.values())

    @property
    def failed(self) -> dict[tuple[str, str], str]:
        """Why versions could not be loaded, by (name, version); version "" stands for the whole model."""
        return {(name, v): why for name, e in list(self._entries.items()) for v, why in e.failed.items()}

    @property
    def loading(self) -> list[str]:
        """The names of those that are being loaded or changed now."""
        return sorted(name for name, entry in self._entries.items() if entry.lock.locked())

    def abandon(self, name: str = "") -> None:
        """Lets the loads that are under way end soon, and fail, where they may take long: of one model, or of all."""
        for entry in [self._entries[name]] if name else self._entries.values():
            for model in entry.starting:
                model.abandon()

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are served, oldest first.

        Raises:
            UnknownModel: There is no such model.
            ModelNotReady: It is loading or unloading, or it could not be loaded.
        """
        self.model(name)
        return list(self._entries[name].versions)

    def lines(self) -> list[IndexEntry]:
        """Every version that was loaded, or could not be, as the index has it, in order of name and version."""
        return [line for name, entry in sorted(self._entries.items()) for line in entry.index(name)]

    def found(self, name: str, version: str) -> Found:
        """What one version that is served was made of, whatever its state is now; raises KeyError for any other."""
        return self._entries[name].versions[version].found

    def config(self, name: str, version: str = "") -> ModelConfig:
        """The complete config of one version, "" for the newest that is ready.

        Raises:
            UnknownModel, ModelNotReady: As model() does.
        """
        served = self._entries[name].versions[self.model(name, version).spec.version]
        if served.found.config is None:
            raise AssertionError("what is served has a config")
        return served.found.config

    def model(self, name: str, version: str = "") -> Servable:
        """One version, "" for the newest that is ready. To be asked for inference before anything is awaited.

        Raises:
            UnknownModel: There is no such model or version.
            ModelNotReady: It is loading or unloading, or it could not be loaded.
        """
        if name in self._entries and self._entries[name].unloading:
            raise ModelNotReady(f"model '{name}' is being unloaded")
        return self.held_model(name, version)

    def held_model(self, name: str, version: str = "") -> Servable:
        """As model(), for a request that holds the model: it may ask it while the model is being unloaded."""
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownModel(name)
        if version in entry.versions:
            return entry.versions[version].model
        if version or not entry.versions:
            which = f"model '{name}' version {version}" if version else f"model '{name}'"
            if version in entry.loading or (entry.loading and not version):
                raise ModelNotReady(f"{which} is loading", LOADING_S)
            if version in entry.failed or (entry.failed and not version):
                raise ModelNotReady(f"{which} failed to load")
            raise UnknownModel(name, version)
        for served in reversed(entry.versions.values()):
            if served.model.state == "ready":
                return served.model
        return next(reversed(entry.versions.values())).model

    def ready_model(self, name: str, version: str = "") -> Servable:
        """One version that is ready now, "" for the newest. Looks at the state of each once: an ensemble's takes time.

        Raises:
            UnknownModel: There is no such model or version.
            ModelNotReady: It is not ready.
        """
        entry = self._entries.get(name)
        state = "being unloaded"
        if entry is None or not (version in entry.versions if version else entry.versions):
            state = self.held_model(name, version).state
        elif not entry.unloading:
            for served in [entry.versions[version]] if version else reversed(entry.versions.values()):
                state = served.model.state
                if state == "ready":
                    return served.model
        raise ModelNotReady(f"model '{name}' is {state}")

    def hold(self, names: frozenset[str]) -> AbstractContextManager[object]:
        """Keeps models from being unloaded while a request of an ensemble needs them; they may still be replaced.

        Args:
            names: What model() has just given, with nothing awaited in between.
        """
        stack = ExitStack()
        for name in names:
            stack.enter_context(_held(self._entries[name]))
        return stack

    def _check_cycle(self, name: str, steps: Iterable[str]) -> None:
        """Follows steps through the ensembles that are loaded; raises InvalidModel where one leads back to `name`."""
        paths = {step: f"{name} -> {step}" for step in steps}
        for step in (left := list(paths)):
            if step == name:
                raise InvalidModel(f"its steps lead back to it: {paths[step]}")
            for served in self._entries.get(step, Entry()).versions.values():
                for further in served.model.spec.steps:
                    if further.model not in paths:
                        paths[further.model] = f"{paths[step]} -> {further.model}"
                        left.append(further.model)


@contextmanager
def _held(entry: Entry) -> Iterator[None]:
    entry.held += 1
    try:
        yield
    finally:
        entry.held -= 1
        if not entry.held:
            entry.released.set()


def unchanged(entry: Entry, found: Found) -> Served | None:
    """What is served of a version, where it is ready and was made of the very same files and config."""
    served = entry.versions.get(found.version)
    return served if served is not None and served.found == found and served.model.state == "ready" else None


async def release(models: Iterable[Servable]) -> None:
    """Lets models answer what they admitted, and frees them; an error in one is logged and does not stop others."""
    for outcome in await asyncio.gather(*(model.drain() for model in models), return_exceptions=True):
        if isinstance(outcome, BaseException):
            log.error("a model could not be freed", exc_info=outcome)
