"""How the models of one server come and go. Knows no transport and no engine."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from convoynet.server.errors import Draining, InvalidModel, LoadFailed, LoadNotAllowed, UnknownModel
from convoynet.server.models.model_changes import ModelChanges
from convoynet.server.models.model_table import REPOSITORY, Entry, IndexEntry, Origin, release
from convoynet.server.models.nesting import needed
from convoynet.server.models.servable import Servable
from convoynet.server.repository.layout import check_name
from convoynet.server.repository.overlay import remove_overlay, write_overlay
from convoynet.server.repository.repository import Repository
from convoynet.server.spec import ModelSpec
from convoynet.server.supervision import tasks
from convoynet.server.supervision.threads import SECONDS

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Models that are loaded at a time."""
_LOOK_S = 0.1


class Core(ModelChanges):
    """Answers what every front end asks. Lives on one event loop.

    A change of a model is never seen half: new versions load and warm up beside the old, and requests see them from
    the moment on when all of them are ready. Changes of one model happen one after another, those of different ones
    side by side. They are finished even where their caller is cancelled.
    """

    def __init__(
        self,
        repository: Repository,
        make: Callable[[ModelSpec], Servable],
        control: str = "none",
        changed: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Makes a core without models; start() loads them.

        Args:
            repository: Where the models are.
            make: Makes one version, which is then loaded.
            control: Who loads and unloads.
            changed: Called with the name of a model whose readiness may have changed.
        """
        super().__init__(repository, make, changed)
        self._control = control
        self._tasks: set[asyncio.Task[None]] = set()
        self.reachable: Callable[[], bool] = lambda: True  # whether anything takes calls

    @property
    def ready(self) -> bool:
        """Whether the start is over, nothing is stopping, and a model can be served (or clients load them later)."""
        serving = self._control == "explicit" or any(m.state == "ready" for m in self)
        return self._loaded and not self._draining and serving and self.reachable()

    async def index(self, ready_only: bool = False) -> list[IndexEntry]:
        """Every version of every model that is in the repository or was loaded, in order of name and version.

        States are READY, UNAVAILABLE, LOADING and UNLOADING; reasons are for clients.
        """
        known = set() if ready_only else await self._repository.names()
        names = sorted(known | self._entries.keys())
        lines = [line for name in names for line in self._entries.get(name, Entry()).index(name)]
        return [line for line in lines if line.state == "READY" or not ready_only]

    async def start(self, names: Collection[str] = (), patience: float = math.inf) -> None:
        """Loads every model, or with explicit control those of `names` ("*" for every one).

        What cannot be loaded is in `failed`, and in the log.

        Args:
            names: What explicit control loads at the start.
            patience: Once a model is ready, others are waited for so many seconds from the beginning on.

        Raises:
            OSError: The repository cannot be read.
        """
        begun = time.monotonic()
        await self._repository.sync()
        if self._control != "explicit" or "*" in names:
            names = await self._repository.names()
        loads = tasks.start(self._load_all(names), "the first load of the models")
        while not loads.done():
            left = begun + patience - time.monotonic()
            if left <= 0 and any(model.state == "ready" for model in self):
                break
            await asyncio.wait([loads], timeout=None if patience == math.inf else max(left, _LOOK_S))
        self._loaded = True

    async def load(
        self, name: str, config_override: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Loads a model, or brings it up to date: versions whose files and config are unchanged stay as they are.

        Args:
            name: The model.
            config_override: The JSON form of its config, instead of its config.pbtxt.
            files: Its files, by `<version>/<name>`, instead of its folder.

        Raises:
            LoadNotAllowed, Draining: Clients do not control this server's models, or not any more.
            LoadFailed: It, or one of its versions, could not be loaded. What was served before still is.
        """
        self._check_control()
        await self._finish(self._load_request(name, config_override, files or {}))

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Answers what was admitted to a model, then frees it. Does nothing where it is not loaded.

        An ensemble that needs it answers what it has begun, and is not ready until the model is back.

        Args:
            name: The model.
            unload_dependents: Of an ensemble, its steps' models as well, where no other ensemble uses them.

        Raises:
            LoadNotAllowed, Draining: Clients do not control this server's models, or not any more.
            UnknownModel: The repository has no such model.
        """
        self._check_control()
        if name not in self._entries and name not in await self._repository.names():
            raise UnknownModel(name)
        await self._finish(self._unload(name, unload_dependents))

    async def reload(self, name: str) -> None:
        """Loads every version of a model anew from the repository, beside the old ones, and then switches.

        Raises:
            LoadFailed: One could not be loaded; what was served before still is.
        """
        await self._finish(self._reload(name))

    async def refresh(self, fingerprints: Mapping[str, str] | None = None) -> None:
        """One pass over the repository: loads what is new or changed and unloads what is gone.

        With explicit control nothing new is loaded and nothing unloaded. A model that was loaded with files or a
        config of its own is left alone, and so is one that failed and has not changed. What fails is in the log and
        in index().

        Args:
            fingerprints: The models that are there, as Repository.fingerprints() tells; read where it is None.

        Raises:
            OSError: The repository cannot be read.
        """
        if fingerprints is None:
            await self._repository.sync()
            fingerprints = await self._repository.fingerprints()
        known = {name: e for name, e in self._entries.items() if e.fingerprint is not None}
        explicit = self._control == "explicit"
        # A model that is being changed is left for the next look: that may take long.
        busy = set(self.loading)
        changed = [n for n, mark in fingerprints.items() if self._differs(n, mark) and (n in known or not explicit)]
        changed = [name for name in changed if name not in busy]
        gone = [] if explicit else [name for name in known.keys() - fingerprints.keys() if name not in busy]
        await asyncio.gather(self._load_all(changed), *(self._attempt(self._unload(n)) for n in gone))
        # An ensemble may have failed for want of a model that is there only now.
        waiting = [n for n, e in self._entries.items() if e.failed and n not in changed and e.steps & set(changed)]
        await self._load_all(waiting)

    def fingerprint(self, name: str) -> str | None:
        """Of a model's folder when it was last read, or None where nobody wants the model."""
        return self._entries[name].fingerprint if name in self._entries else None

    def begin_drain(self) -> None:
        """From now on the server says that it is not ready, while it still answers."""
        self._draining = True
        self.abandon()

    async def drain(self) -> None:
        """Answers what was admitted, then frees every model. Loads that are under way are given up."""
        self.begin_drain()
        if self._tasks:
            await asyncio.wait(self._tasks)

        async def drain(entry: Entry) -> None:
            await entry.unheld()
            await release(served.model for served in entry.versions.values())
            entry.drop_overlay()

        await asyncio.gather(*map(drain, self._entries.values()))

    def _check_control(self) -> None:
        if self._draining:
            raise Draining
        if self._control != "explicit":
            why = "polling is enabled" if self._control == "poll" else "model control is disabled"
            raise LoadNotAllowed(f"explicit model load / unload is not allowed if {why}")

    def _differs(self, name: str, mark: str) -> bool:
        entry = self._entries.get(name)
        return entry is None or (entry.fingerprint != mark and not entry.overridden)

    async def _finish(self, change: Coroutine[Any, Any, None]) -> None:
        """Runs a change to its end, also where the caller goes away meanwhile."""
        task = asyncio.ensure_future(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _load_all(self, names: Collection[str]) -> None:
        """Loads models, some at a time: a repository may hold as many folders as it likes."""
        left = iter(sorted(set(names)))

        async def work() -> None:
            for name in left:
                if self._draining:
                    return
                await self._attempt(self._load(name))

        await asyncio.gather(*(work() for _ in range(min(_AT_ONCE, len(names)))))

    async def _attempt(self, change: Coroutine[Any, Any, None]) -> None:
        """Runs a change whose failure must not stop others, and is logged."""
        try:
            await self._finish(change)
        except Exception as error:
            if not isinstance(error, LoadFailed):  # which was logged
                log.exception("a model could not be changed")

    async def _load_request(self, name: str, config: Mapping[str, Any] | None, files: Mapping[str, bytes]) -> None:
        if not files:
            await self._look_for(name)
        folder = None
        if files:
            try:
                check_name(name)
                folder = await self._repository.threads.run(SECONDS, write_overlay, files)
            except (InvalidModel, OSError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise LoadFailed(f"failed to load '{name[:200]}', {why}") from error
        try:
            await self._load(name, Origin(config, folder))
        finally:
            if folder is not None and self._entries.get(name, Entry()).overlay != folder:
                await self._repository.threads.run(SECONDS, remove_overlay, folder)

    async def _reload(self, name: str) -> None:
        await self._look_for(name)
        await self._load(name, force=True)

    async def _look_for(self, name: str) -> None:
        """Brings the repository up to date; raises LoadFailed, with Triton's text, where it has no such model."""
        try:
            await self._repository.sync()
            known = name in await self._repository.names()
        except OSError as error:
            log.error("%s", error)
            raise LoadFailed(f"failed to load '{name[:200]}', the model repository cannot be read") from error
        if not known:
            raise LoadFailed(f"failed to load '{name[:200]}', failed to poll from model repository")

    async def _load(self, name: str, origin: Origin = REPOSITORY, *, force: bool = False) -> None:
        """Loads a model from its origin; before it, the models that its steps need and that are not loaded yet.

        No lock is held while another model loads: two ensembles may have each other as steps.

        Args:
            name: The model.
            origin: What it is read from.
            force: Whether versions that have not changed are loaded anew as well.
        """

        async def steps_of(step: str) -> frozenset[str]:
            served = self._entries.get(step, Entry()).versions.values()
            return frozenset(s.model for v in served for s in v.model.spec.steps) or await self._repository.steps(step)

        circle: InvalidModel | None = None
        try:
            steps = await self._repository.steps(name, origin.config, origin.folder)
            for level in await needed(name, steps, steps_of):
                await asyncio.gather(*(self._attempt(self._load_one(step, nested=True)) for step in level))
        except InvalidModel as error:
            circle = error
        await self._load_one(name, origin, force=force, refused=circle)
