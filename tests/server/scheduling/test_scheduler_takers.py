"""Engines that wait for the scheduler's batches, in virtual time: when a batch comes, and who gets it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from convoynet.server.errors import Draining
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy
from tests.server.scheduling.entries import new, put, rows_of
from tests.server.virtual_time import VirtualTimeLoop, run


def test_take_gives_at_once_what_is_there_and_ends_when_it_is_closed() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(4, 0.0, 99), 2, loop.time)
        takers = [asyncio.ensure_future(scheduler.take()) for _ in range(3)]
        await asyncio.sleep(1)
        entries = [put(scheduler, new(3, loop)) for _ in range(2)]
        reserved = new(1, loop)
        scheduler.admit(reserved)
        await asyncio.sleep(0.1)
        done = [t.result() for t in takers if t.done()]
        assert done == [[entries[0]], [entries[1]]]
        scheduler.close()
        with pytest.raises(Draining):
            scheduler.admit(new(1, loop))
        await asyncio.sleep(0.1)
        (last,) = [t for t in takers if not t.done()]
        other = asyncio.ensure_future(scheduler.take())
        await asyncio.sleep(0.1)
        scheduler.put(reserved, {"x": np.zeros((1, 4), np.float32)})
        assert {tuple(got or ()) for got in await asyncio.gather(last, other)} == {(reserved,), ()}
        assert await scheduler.take() is None

    run(main(), loop)


def test_engines_that_wait_for_their_turn_leave_the_batch_to_the_first() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(4, 0.0, 99), 2, loop.time)
        for rows in (1, 2):
            scheduler.latency.ran(rows, 1.0, loop.time())  # the two are run sooner together
        got: dict[str, list[list[Entry]]] = {"slow": [], "fast": []}

        async def engine(name: str, turn: float) -> None:
            while await scheduler.due():
                await asyncio.sleep(turn)
                if batch := scheduler.form():
                    got[name].append(batch)

        engines = [asyncio.ensure_future(engine("slow", 5.0)), asyncio.ensure_future(engine("fast", 1.0))]
        await asyncio.sleep(0.1)
        entries = [put(scheduler, new(1, loop))]
        await asyncio.sleep(0.5)
        entries.append(put(scheduler, new(1, loop)))  # joins while both wait for their turn
        await asyncio.sleep(9)
        scheduler.close()
        await asyncio.gather(*engines)
        assert got == {"slow": [], "fast": [entries]}

    run(main(), loop)


@pytest.mark.parametrize(
    ("arrivals", "taken"),
    [
        ([(0.0, 1)], [(1.0, 1)]),  # alone: after the delay
        ([(0.0, 1), (0.5, 1)], [(1.0, 2)]),
        ([(0.0, 1), (0.2, 1), (0.3, 2)], [(0.3, 4)]),  # the preferred size
        ([(0.0, 3), (0.2, 3)], [(1.0, 6)]),  # past it, not at it
        ([(0.0, 3), (0.2, 3), (0.4, 3)], [(0.4, 6), (1.4, 3)]),  # it cannot grow
    ],
)
def test_the_delay_counts_from_the_oldest(arrivals: list[tuple[float, int]], taken: list[tuple[float, int]]) -> None:
    loop = VirtualTimeLoop()

    async def main() -> list[tuple[float, int]]:
        scheduler = Scheduler(BatchPolicy(8, 1.0, 99, preferred=(4, 8)), 1, loop.time)
        for at, rows in arrivals:
            loop.call_at(at, lambda rows=rows: put(scheduler, new(rows, loop)))
        loop.call_at(5.0, scheduler.close)
        got = []
        while (batch := await scheduler.take()) is not None:
            got.append((round(loop.time(), 6), sum(rows_of(batch))))
        return got

    assert run(main(), loop) == taken


def test_other_shapes_end_the_wait() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(8, 10.0, 99), 1, loop.time)
        loop.call_at(0.5, lambda: put(scheduler, new(1, loop), width=4))
        loop.call_at(1.0, lambda: put(scheduler, new(1, loop), width=5))
        assert len(await scheduler.take() or ()) == 1
        assert loop.time() == pytest.approx(1.0)

    run(main(), loop)


def test_a_deadline_ends_the_wait_before_it_is_too_late() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(8, 10.0, 99), 1, loop.time)
        entry = put(scheduler, new(1, loop, deadline=loop.time() + 2.0))
        assert await scheduler.take() == [entry]
        assert loop.time() == pytest.approx(1.0)  # not measured yet: half of its time
        for _ in range(5):
            scheduler.ran(1, 0.3)
        entry = put(scheduler, new(1, loop, deadline=loop.time() + 0.4))
        assert await scheduler.take() == [entry]
        assert loop.time() == pytest.approx(1.1)

    run(main(), loop)


def test_what_a_batch_leaves_behind_goes_to_another_engine() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(8, 1.0, 99), 2, loop.time)
        for rows, takes in ((1, 0.1), (2, 0.2), (4, 0.4), (8, 0.8)):
            for _ in range(5):
                scheduler.ran(rows, takes)
        engines = [asyncio.ensure_future(scheduler.take()) for _ in range(2)]
        await asyncio.sleep(0)
        hurried = put(scheduler, new(1, loop, deadline=loop.time() + 0.5))
        await asyncio.sleep(0.2)
        others = [put(scheduler, new(1, loop)) for _ in range(3)]
        done, (idle,) = await asyncio.wait(engines, return_when=asyncio.FIRST_COMPLETED)
        assert [engine.result() for engine in done] == [[hurried, others[0]]]
        assert await idle == others[1:]
        assert loop.time() == pytest.approx(1.2)  # their own delay

    run(main(), loop)


def test_a_taker_that_is_cancelled_loses_nothing() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        scheduler = Scheduler(BatchPolicy(8, 0.0, 99), 2, loop.time)
        first, second = (asyncio.ensure_future(scheduler.take()) for _ in range(2))
        await asyncio.sleep(1)
        entry = put(scheduler, new(1, loop))  # wakes the first
        first.cancel()
        assert await asyncio.wait_for(second, 1) == [entry]
        with pytest.raises(asyncio.CancelledError):
            await first

    run(main(), loop)
