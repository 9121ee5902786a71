"""Unfinished bodies: what they hold together, and who makes room."""

from __future__ import annotations

import asyncio

from convoynet.server.http.arrivals import MOST_BYTES, PAUSE_SECONDS, Arrivals
from tests.server.virtual_time import VirtualTimeLoop, run

PART = MOST_BYTES // 4


class Sender:
    """A connection that was given up, or not."""

    def __init__(self) -> None:
        self.ended = ""

    def end(self, why: str) -> None:
        self.ended = why


def test_those_that_pause_make_room_the_longest_first() -> None:
    async def main() -> None:
        arrivals, paused, later, busy = Arrivals(), Sender(), Sender(), Sender()
        arrivals.came(paused, 2 * PART)
        await asyncio.sleep(PAUSE_SECONDS)
        arrivals.came(later, PART)
        arrivals.came(busy, PART)
        assert not paused.ended  # as much as there may be
        arrivals.came(busy, PART)
        assert paused.ended.startswith("the body paused")
        assert not later.ended
        assert arrivals.held == 3 * PART
        await asyncio.sleep(PAUSE_SECONDS)
        arrivals.came(busy, 2 * PART)
        assert later.ended
        assert not busy.ended

    run(main(), VirtualTimeLoop())


def test_bodies_that_come_without_a_pause_and_those_that_are_whole_stay() -> None:
    async def main() -> None:
        arrivals, senders = Arrivals(), [Sender() for _ in range(8)]
        for sender in senders:
            arrivals.came(sender, PART)
        assert not any(sender.ended for sender in senders)
        for sender in senders:
            arrivals.over(sender)
            arrivals.over(sender)
        assert arrivals.held == 0
        await asyncio.sleep(PAUSE_SECONDS)
        arrivals.came(senders[0], 8 * PART)
        assert not senders[0].ended  # alone

    run(main(), VirtualTimeLoop())
