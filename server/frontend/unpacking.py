"""Messages of gRPC that their client has compressed."""

from __future__ import annotations

import asyncio
import threading

from convoynet.server.errors import InvalidRequest, MessageTooLarge
from convoynet.server.memory.budget import Budget
from convoynet.server.memory.inflating import Broken, TooLarge, inflated

_AT_ONCE = 4096
"""What is unpacked on the event loop: more has a thread."""


async def unpacked(payload: bytes | memoryview, largest: int, budget: Budget) -> bytes:
    """A message as it was; while it is unpacked, what comes out counts for the budget.

    Raises:
        MessageTooLarge: More than `largest` bytes come out.
        OverBudget: There is no room for it.
        InvalidRequest: It is neither gzip nor zlib.
    """
    work = _Unpacking(budget)
    try:
        if len(payload) <= _AT_ONCE:
            return work.run(payload, largest)
        work.hold(len(payload))  # while it waits for a thread
        return await asyncio.to_thread(work.run, payload, largest)
    except TooLarge as error:
        raise MessageTooLarge(f"SERVER: Received message {error}") from None
    except Broken as error:
        raise InvalidRequest(f"the compressed message {error}") from None
    finally:
        work.end()


def looks_packed(payload: bytes) -> bool:
    """Whether a message begins as gzip or zlib do: no message of the protocol does, whatever it says."""
    return payload[:2] == b"\x1f\x8b" or (payload[:1] == b"\x78" and int.from_bytes(payload[:2], "big") % 31 == 0)


class _Unpacking:
    """A message that is inflated, maybe in a thread, and what it counts for until nobody waits for it any more."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._lock = budget, threading.Lock()
        self._held = 0
        self._ended = False

    def run(self, payload: bytes | memoryview, largest: int) -> bytes:
        """The message; raises OverBudget, TooLarge, Broken."""
        return inflated(payload, largest, self.hold)

    def hold(self, size: int) -> None:
        """Counts so many bytes more; raises OverBudget, and Broken where nobody waits."""
        with self._lock:
            if self._ended:
                raise Broken("is not waited for")
            self._budget.take(size, self._held + size)
            self._held += size

    def end(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._ended = True
            self._budget.give(self._held)
