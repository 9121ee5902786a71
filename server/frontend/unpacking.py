"""Messages of gRPC that their client has compressed."""

from __future__ import annotations

import asyncio

from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.memory.budget import Budget
from convoynet.server.memory.inflating import Broken, TooLarge, inflated

_AT_ONCE = 4096
"""What is unpacked on the event loop: more has a thread."""


async def unpacked(payload: bytes | memoryview, largest: int, budget: Budget) -> bytes:
    """A message as it was; while it is unpacked, what comes out counts for the budget.

    Raises:
        Oversize: More than `largest` bytes come out.
        OverBudget: There is no room for it.
        InvalidRequest: It is neither gzip nor zlib.
    """
    held = 0

    def hold(size: int) -> None:
        nonlocal held
        budget.take(size)
        held += size

    try:
        if len(payload) <= _AT_ONCE:
            return inflated(payload, largest, hold)
        return await asyncio.to_thread(inflated, payload, largest, hold)
    except TooLarge as error:
        raise Oversize(f"SERVER: Received message {error}") from None
    except Broken as error:
        raise InvalidRequest(f"the compressed message {error}") from None
    finally:
        budget.give(held)


def looks_packed(payload: bytes) -> bool:
    """Whether a message begins as gzip or zlib do: no message of the protocol does, whatever it says."""
    return payload[:2] == b"\x1f\x8b" or (payload[:1] == b"\x78" and int.from_bytes(payload[:2], "big") % 31 == 0)
