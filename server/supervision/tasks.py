"""Tasks that nobody waits for: kept alive, and looked at when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

_running: set[asyncio.Task[Any]] = set()
"""The loop itself keeps no task alive."""


class Pauses:
    """Growing pauses before something that failed is tried again, in seconds: each twice as long as the one before."""

    def __init__(self, first: float = 0.05, longest: float = 5.0) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def next(self) -> float:
        """The pause before the next attempt."""
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause

    def reset(self) -> None:
        """It went well: the next pause is the shortest again."""
        self._next = self._first


def start(
    work: Coroutine[Any, Any, Any], name: str, failed: Callable[[BaseException], None] | None = None
) -> asyncio.Task[Any]:
    """Runs `work` as a task that nobody waits for.

    Args:
        work: What the task does.
        name: What it is, for the log.
        failed: Called with the error that ended it, after that was logged; not where it was cancelled.
    """
    task = asyncio.get_running_loop().create_task(work, name=name)
    _running.add(task)

    def over(_: asyncio.Task[Any]) -> None:
        _running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("%s ended with an error", name, exc_info=error)
            if failed is not None:
                failed(error)

    task.add_done_callback(over)
    return task


async def together(*works: Coroutine[Any, Any, Any]) -> list[Any]:
    """What several works return. Where one fails the others are ended before its error is raised.

    What asyncio.gather() leaves running may still wait for a socket that is closed then. The loop goes on watching its
    number, and asyncio's never looks at the next socket that gets it.
    """
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(work) for work in works]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in running]


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event is set within that time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def keep(work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[Any]:
    """Runs `work` as a task until it returns or is cancelled; where it raises it runs again, after a growing pause."""

    async def again() -> None:
        pauses = Pauses(0.1, 30.0)
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                await work()
            except Exception:
                if loop.time() - begun > 60:
                    pauses.reset()
                pause = pauses.next()
                log.exception("%s failed; it goes on in %.1f s", name, pause)
                await asyncio.sleep(pause)
            else:
                return

    return start(again(), name)
