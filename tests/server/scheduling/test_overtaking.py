"""A turn that never ends holds nobody up; a queue that nobody will serve is ended."""

from __future__ import annotations

import asyncio
import time

import pytest

from convoynet.server.errors import ModelNotReady
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import BatchPolicy
from tests.server.scheduling.entries import new, put
from tests.server.virtual_time import VirtualTimeLoop, run


def test_a_turn_that_hangs_lets_the_others_go_on() -> None:
    loop = VirtualTimeLoop()
    turnstile = Turnstile(2, loop.time)
    times: list[float] = []

    async def hang() -> None:
        async with turnstile.turn("hung", size=2):
            await asyncio.sleep(100)

    async def go(count: int) -> None:
        for _ in range(count):
            async with turnstile.turn("good", size=2):
                await asyncio.sleep(0.1)
            times.append(loop.time())

    async def main() -> None:
        await asyncio.gather(hang(), go(20))
        # As it was: one at a time again.
        assert turnstile._free == 2
        assert not turnstile._turns

    run(main(), loop)
    assert times[0] == pytest.approx(1.25 + 0.1)
    assert times[-1] == pytest.approx(1.25 + 20 * 0.1)


def test_a_turn_that_is_long_as_always_is_not_overtaken() -> None:
    loop = VirtualTimeLoop()
    turnstile = Turnstile(1, loop.time)
    busy = most = 0

    async def go(key: str, takes: float, count: int) -> None:
        nonlocal busy, most
        for _ in range(count):
            async with turnstile.turn(key):
                busy += 1
                most = max(most, busy)
                await asyncio.sleep(takes)
                busy -= 1

    async def main() -> None:
        await go("long", 0.9, 1)  # now it is known how long it takes
        await asyncio.gather(go("long", 5.0, 3), go("short", 0.01, 200))

    run(main(), loop)
    assert most == 1


def test_what_waits_for_a_model_without_engines_is_told() -> None:
    scheduler = Scheduler(BatchPolicy(4, 0.0, 100), clock=time.monotonic)
    queued = [put(scheduler, new()), put(scheduler, new(2))]
    scheduler.refuse(ModelNotReady("no engine"))
    assert all(isinstance(one.result.exception(), ModelNotReady) for one in queued)
    assert (len(scheduler), scheduler.rows, scheduler.nbytes) == (0, 0, 0)
