"""How one model changes: read, loaded beside what is served of it, switched, and let go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from convoynet.server.errors import InvalidModel, LoadFailed
from convoynet.server.models.model_table import (
    REPOSITORY,
    Entry,
    ModelTable,
    Origin,
    Served,
    release,
    unchanged,
)
from convoynet.server.models.servable import Servable
from convoynet.server.repository.overlay import remove_overlay
from convoynet.server.repository.repository import Repository
from convoynet.server.repository.specs import Found
from convoynet.server.spec import ModelSpec
from convoynet.server.supervision.threads import SECONDS

log = logging.getLogger(__name__)


class ModelChanges(ModelTable):
    """Changes the entries of the table, one change of a model after another. Who asks for changes is the core."""

    def __init__(
        self, repository: Repository, make: Callable[[ModelSpec], Servable], changed: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._repository = repository
        self._make = make
        self._changed = changed
        self._loaded = self._draining = False

    async def _load_one(
        self,
        name: str,
        origin: Origin = REPOSITORY,
        *,
        force: bool = False,
        nested: bool = False,
        refused: InvalidModel | None = None,
    ) -> None:
        """Loads a model whose steps' models have been loaded, if it has steps.

        Args:
            name: The model.
            origin: What it is read from.
            force: Whether versions that have not changed are loaded anew as well.
            nested: Whether an ensemble needs it: then what is loaded stays as it is.
            refused: Why it cannot be loaded, where that is known.
        """
        entry = self._entries.setdefault(name, Entry())
        async with entry.lock:
            if nested and (entry.versions or (entry.failed and not self._loaded)):
                return
            found = await self._read(name, entry, origin, refused)
            entry.steps = frozenset(step.model for f in found if f.spec is not None for step in f.spec.steps)
            await self._replace(name, entry, found, origin, force)

    async def _read(self, name: str, entry: Entry, origin: Origin, refused: InvalidModel | None) -> list[Found]:
        # Before its files are read: what is written meanwhile is seen at the next look.
        mark = entry.fingerprint
        try:
            if not origin.overrides:
                mark = await self._repository.fingerprint(name)
            if refused is not None:
                raise refused
            found = await self._repository.read(name, origin.config, origin.folder)
            self._check_cycle(name, {s.model for f in found if f.spec is not None for s in f.spec.steps})
        except Exception as error:
            if not isinstance(error, InvalidModel):
                log.exception("model %r: reading failed", name[:200])
            reason = str(error) if isinstance(error, InvalidModel) else f"{type(error).__name__} (see the log)"
            self._note_failure(name, entry, {"": reason})
            raise LoadFailed(
                f"failed to load '{name[:200]}', failed to poll from model repository: {reason}"
            ) from error
        finally:
            entry.fingerprint = mark
        return found

    async def _replace(self, name: str, entry: Entry, found: list[Found], origin: Origin, force: bool) -> None:
        """Loads what is new beside what is served, then switches, then lets the old ones go."""
        bad = {f.version: f.reason for f in found if f.spec is None}
        kept = {f.version: served for f in found if not force and (served := unchanged(entry, f)) is not None}
        fresh: dict[str, Served] = {}
        if not (bad and entry.versions):
            fresh, broken = await self._load_versions(
                name, entry, [f for f in found if f.version not in {**kept, **bad}]
            )
            bad |= broken
        if bad and entry.versions:
            self._note_failure(name, entry, bad)
            await release(served.model for served in fresh.values())
            raise LoadFailed.of(name, bad)
        old = [s.model for v, s in entry.versions.items() if kept.get(v) is not s]
        entry.versions = dict(sorted({**kept, **fresh}.items(), key=lambda item: int(item[0])))
        overlay, entry.overlay = entry.overlay, origin.folder if entry.versions else None
        entry.overridden = origin.overrides and bool(entry.versions)
        entry.failed, entry.unloaded, entry.retiring = {}, [], old
        if bad:
            self._note_failure(name, entry, bad)
        self._notify(name)
        await release(old)
        entry.retiring = []
        if overlay is not None:
            await self._repository.threads.run(SECONDS, remove_overlay, overlay)
        if bad:
            raise LoadFailed.of(name, bad)

    async def _load_versions(
        self, name: str, entry: Entry, found: list[Found]
    ) -> tuple[dict[str, Served], dict[str, str]]:
        """Loads versions side by side: those that are ready, and the reasons of the others, which are freed."""
        entry.loading = [f.version for f in found]
        try:
            self._notify(name)
            outcomes = await asyncio.gather(*(self._load_version(f, entry) for f in found))
        finally:
            entry.loading, entry.starting = [], []
        ready = {s.found.version: s for s in outcomes if isinstance(s, Served)}
        return ready, {f.version: o for f, o in zip(found, outcomes, strict=True) if isinstance(o, str)}

    async def _load_version(self, found: Found, entry: Entry) -> Served | str:
        """One version once it is ready, or why it is not."""
        if found.spec is None:
            raise AssertionError("only what has a spec is loaded")
        if self._draining:
            return "the server is stopping"
        try:
            model = self._make(found.spec)
            entry.starting.append(model)
            await model.load()
        except Exception as error:
            log.exception("model %s version %s: loading failed", found.name, found.version)
            return f"loading failed: {type(error).__name__} (see the log)"
        if model.state == "ready":
            return Served(found, model)
        reason = model.reason
        await release([model])
        return reason

    async def _unload(self, name: str, dependents: bool = False) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        self.abandon(name)
        async with entry.lock:
            models = [served.model for served in entry.versions.values()]
            steps = {step.model for m in models for step in m.spec.steps}
            entry.unloading = bool(models)
            self._notify(name)
            await entry.unheld()
            await release(models)
            entry.unloaded = list(entry.versions)
            entry.versions, entry.failed = {}, {}
            entry.fingerprint, entry.unloading, entry.overridden = None, False, False
            entry.drop_overlay()
            self._notify(name)
            log.info("model %s is unloaded", name)
        if dependents:
            free = steps - {step.model for m in self for step in m.spec.steps}
            await asyncio.gather(*(self._unload(step, dependents=True) for step in free))

    def _note_failure(self, name: str, entry: Entry, reasons: Mapping[str, str]) -> None:
        entry.failed = dict(reasons)
        for version, reason in reasons.items():
            served = "; what was served before still is" if entry.versions else ""
            log.error("model %s cannot be loaded: %s%s", f"{name[:200]!r} {version}".strip(), reason, served)

    def _notify(self, name: str) -> None:
        """Tells of a model, and of every ensemble that is ready only while the model is."""
        told = [name]
        for each in told:
            self._changed(each)
            users = {m.spec.name for m in self if any(step.model == each for step in m.spec.steps)}
            told += sorted(users.difference(told))
