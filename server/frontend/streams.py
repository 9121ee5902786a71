"""One direction of a stream between two processes: at most WINDOW messages wait on the side that reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from convoynet.server.frontend.messages import WINDOW

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """What came and nobody took yet.

    Attributes:
        window: To acquire before a message is sent the other way.

    Args:
        taken: Called for each message that was taken.
    """

    def __init__(self, taken: Callable[[], None]) -> None:
        self.window = asyncio.Semaphore(WINDOW)
        self._taken = taken
        self._items: asyncio.Queue[Item | None] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """One more message."""
        self._items.put_nowait(item)

    def end(self) -> None:
        """No more messages."""
        self._items.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Item]:
        while (item := await self._items.get()) is not None:
            self._taken()
            yield item
