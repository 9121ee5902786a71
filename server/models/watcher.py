"""Polls the model repository and tells the core what changed, once the files are at rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from convoynet.server.models.core import Core
from convoynet.server.repository.repository import Repository
from convoynet.server.supervision import tasks

log = logging.getLogger(__name__)

_MOST_LOOKS = 8


class Watcher:
    """Looks at the repository every so often. A model that is being copied changes from look to look, and waits."""

    def __init__(
        self,
        repository: Repository,
        core: Core,
        seconds: float,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._repository = repository
        self._core = core
        self._seconds = seconds
        self._sleep = sleep
        self._seen: dict[str, str] | None = None

    async def run(self) -> None:
        """Polls until it is cancelled; what goes wrong is logged, and looked at again.

        A look that takes long, since a model is loaded for minutes, holds up only so many of those after it.
        """
        looks: set[asyncio.Task[Any]] = set()
        while True:
            await self._sleep(self._seconds)
            looks = {look for look in looks if not look.done()}
            if len(looks) < _MOST_LOOKS:
                looks.add(tasks.start(self._look(), "a look at the model repository"))
            await asyncio.wait(looks, timeout=self._seconds)

    async def _look(self) -> None:
        try:
            await self.poll()
        except OSError as error:
            log.warning("the model repository cannot be polled: %s", error)

    async def poll(self) -> None:
        """One look: what is as it was at the look before, and not as the core knows it, is brought up to date.

        Raises:
            OSError: The repository cannot be read.
        """
        await self._repository.sync()
        found = await self._repository.fingerprints()
        before, self._seen = self._seen, found
        if before is None:
            return
        at_rest = {name: mark for name, mark in found.items() if before.get(name) == mark}
        # What still moves stays as it is: for the core it looks unchanged.
        moving = {name: self._core.fingerprint(name) for name in (found.keys() | before.keys()) - at_rest.keys()}
        await self._core.refresh(at_rest | {name: mark for name, mark in moving.items() if mark is not None})
