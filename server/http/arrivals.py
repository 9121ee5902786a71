"""Bodies that have not wholly come: together they hold only so much while some of them pause."""

from __future__ import annotations

import asyncio
from typing import Protocol

MOST_BYTES = 192 * 2**20
"""What the unfinished bodies of a port may hold together before those that pause make room for those that come."""
PAUSE_SECONDS = 0.1
"""Who has sent nothing for so long pauses."""


class Sender(Protocol):
    """A connection whose request is coming."""

    def end(self, why: str) -> None:
        """Gives it up."""


class Arrivals:
    """The unfinished bodies of one port, on its event loop. A body that never ends costs its client nothing.

    Attributes:
        held: Bytes that they hold together.
    """

    def __init__(self) -> None:
        self.held = 0
        self._loop = asyncio.get_running_loop()
        # The one that has sent nothing for the longest time is the first.
        self._bodies: dict[Sender, tuple[int, float]] = {}

    def came(self, sender: Sender, count: int) -> None:
        """Counts bytes of a body; above MOST_BYTES others that pause are given up."""
        now = self._loop.time()
        size, _ = self._bodies.pop(sender, (0, now))
        self._bodies[sender] = size + count, now
        self.held += count
        while self.held > MOST_BYTES:
            slowest, (_, since) = next(iter(self._bodies.items()))
            if slowest is sender or now - since < PAUSE_SECONDS:
                return  # what comes in one go may be as much as --max-inflight-bytes allows
            self.over(slowest)
            slowest.end("the body paused while others took more than unfinished bodies may hold; try again")

    def over(self, sender: Sender) -> None:
        """The body is whole, or nobody waits for it any more."""
        self.held -= self._bodies.pop(sender, (0, 0.0))[0]
