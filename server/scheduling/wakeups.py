"""Tasks that wait for something to change, woken one at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf


class Wakeups:
    """A condition without a lock, for tasks of one event loop: who waits longest is woken first."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self, seconds: float = inf) -> None:
        """Until it is woken, at most `seconds`. One that is cancelled wakes the next instead."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.append(waiter)
        timer = loop.call_later(max(seconds, 0), _set, waiter) if seconds != inf else None
        try:
            await waiter
        except asyncio.CancelledError:
            self.wake()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def wake(self) -> None:
        """Wakes the first that waits, if anybody does."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def wake_all(self) -> None:
        """Wakes everybody."""
        for waiter in self._waiting:
            _set(waiter)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
