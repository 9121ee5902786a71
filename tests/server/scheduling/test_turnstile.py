"""Turns at a shared device, in virtual time: everybody gets its share of the seconds."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from convoynet.server.scheduling.turnstile import Turnstile
from tests.server.virtual_time import VirtualTimeLoop, run

SECONDS = 60.0


class Device:
    """Counts the seconds that each key has used."""

    def __init__(self, loop: VirtualTimeLoop, slots: int = 1) -> None:
        self.loop = loop
        self.turnstile = Turnstile(slots, loop.time)
        self.used: Counter[str] = Counter()
        self.busy = 0
        self.most = 0

    async def client(self, key: str, takes: float, weight: float = 1.0, since: float = 0.0, pause: float = 0.0) -> None:
        """Wants its next turn as soon as one ended, or after a pause."""
        await asyncio.sleep(since)
        while self.loop.time() < SECONDS:
            async with self.turnstile.turn(key, weight):
                self.busy += 1
                self.most = max(self.most, self.busy)
                await asyncio.sleep(takes)
                self.busy -= 1
            self.used[key] += takes  # type: ignore[assignment]
            if pause:
                await asyncio.sleep(pause)


def share(used: Counter[str], key: str) -> float:
    return used[key] / sum(used.values())


def test_a_model_with_ten_times_the_load_gets_its_half_alone() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop)

    async def main() -> None:
        await asyncio.gather(*(device.client("greedy", 0.01) for _ in range(10)), device.client("modest", 0.01))

    run(main(), loop)
    assert share(device.used, "modest") == pytest.approx(0.5, abs=0.02)
    assert sum(device.used.values()) == pytest.approx(SECONDS, rel=0.01)
    assert device.most == 1


def test_long_turns_do_not_earn_more_seconds() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop)

    async def main() -> None:
        await asyncio.gather(*(device.client(k, t) for k, t in (("long", 0.2), ("short", 0.01)) for _ in range(3)))

    run(main(), loop)
    assert share(device.used, "short") == pytest.approx(0.5, abs=0.02)


def test_seconds_follow_the_weights() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop, slots=2)

    async def main() -> None:
        clients = [device.client(k, 0.02, w) for k, w in (("a", 3.0), ("b", 1.0)) for _ in range(4)]
        await asyncio.gather(*clients)

    run(main(), loop)
    assert share(device.used, "a") == pytest.approx(0.75, abs=0.03)
    assert sum(device.used.values()) == pytest.approx(2 * SECONDS, rel=0.01)
    assert device.most == 2


def test_long_turns_of_one_model_do_not_take_every_slot() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop, slots=2)
    running: list[float] = []
    both = 0.0

    async def long_turns() -> None:
        nonlocal both
        while loop.time() < SECONDS:
            async with device.turnstile.turn("long"):
                running.append(loop.time())
                await asyncio.sleep(2.0)
                if len(running) == 2:
                    both += loop.time() - running[1]
                running.pop(0)  # the older one ends first

    async def main() -> None:
        await asyncio.gather(*(long_turns() for _ in range(4)), *(device.client("short", 0.1) for _ in range(4)))

    run(main(), loop)
    assert both < 0.1 * SECONDS
    assert device.used["short"] == pytest.approx(SECONDS, rel=0.05)


def test_a_lone_model_gets_everything() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop)

    async def main() -> None:
        await asyncio.gather(*(device.client("only", 0.05) for _ in range(3)))

    run(main(), loop)
    assert device.used["only"] == pytest.approx(SECONDS, rel=0.01)


def test_who_wants_less_than_its_share_gets_it_and_the_rest_is_used() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop)

    async def main() -> None:
        await asyncio.gather(device.client("rare", 0.01, pause=0.09), *(device.client("busy", 0.01) for _ in range(5)))

    run(main(), loop)
    assert sum(device.used.values()) == pytest.approx(SECONDS, rel=0.01)
    assert share(device.used, "rare") == pytest.approx(0.095, abs=0.01)  # its pauses, and one turn to wait for


def test_idle_time_is_no_credit() -> None:
    loop = VirtualTimeLoop()
    device = Device(loop)
    at_return: Counter[str] = Counter()

    async def main() -> None:
        loop.call_at(SECONDS / 2, lambda: at_return.update(device.used))
        await asyncio.gather(
            *(device.client("steady", 0.01) for _ in range(2)),
            *(device.client("back", 0.01, since=SECONDS / 2) for _ in range(2)),
        )

    run(main(), loop)
    assert at_return["steady"] == pytest.approx(SECONDS / 2, rel=0.01)
    assert share(device.used - at_return, "back") == pytest.approx(0.5, abs=0.02)


def test_a_cancelled_turn_frees_its_place() -> None:
    loop = VirtualTimeLoop()
    turnstile = Turnstile(1, loop.time)
    order: list[str] = []

    async def client(key: str) -> None:
        async with turnstile.turn(key):
            order.append(key)
            await asyncio.sleep(1)

    async def main() -> None:
        running, waiting, granted, last = (asyncio.ensure_future(client(k)) for k in "abcd")
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.sleep(0)  # the turn is c's now, and c has not run yet
        granted.cancel()
        done = await asyncio.gather(running, waiting, granted, last, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in done] == [True, True, True, False]
        async with turnstile.turn("e"):
            order.append("e")

        await asyncio.sleep(10)
        async with turnstile.turn("f"):
            assert set(turnstile._flows) == {"f"}, "nothing is kept of who wants nothing"

    run(main(), loop)
    assert order == ["a", "d", "e"]


def test_an_error_in_a_turn_gives_the_slot_back() -> None:
    loop = VirtualTimeLoop()
    turnstile = Turnstile(1, loop.time)

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(KeyError):
                async with turnstile.turn("a"):
                    raise KeyError

    run(main(), loop)


def test_turns_take_as_many_slots_as_they_need() -> None:
    loop = VirtualTimeLoop()
    turnstile = Turnstile(4, loop.time)
    busy: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def client(key: str, size: int) -> None:
        while loop.time() < SECONDS:
            async with turnstile.turn(key, size=size):
                busy[key] += min(size, 4)
                busy["all"] += min(size, 4)
                most.update({k: max(0, busy[k] - most[k]) for k in (key, "all")})
                await asyncio.sleep(0.1)
                busy[key] -= min(size, 4)
                busy["all"] -= min(size, 4)

    async def main() -> None:
        await asyncio.gather(client("wide", 9), *(client("narrow", 1) for _ in range(6)), client("none", 0))

    run(main(), loop)
    assert most == Counter({"wide": 4, "narrow": 4, "all": 4, "none": 0})
