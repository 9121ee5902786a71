"""Five times as many requests as an engine can answer, with deadlines, in virtual time: how much of its work counts."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from convoynet.server.errors import ServerError
from convoynet.server.scheduling.latency import BatchLatency
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy, QueuePolicy
from tests.server.scheduling.entries import new
from tests.server.virtual_time import VirtualTimeLoop, run

SECONDS, CAPACITY = 20.0, 40.0
TAKES = 0.1
"""A batch of four rows, and any other."""


class Load:
    """Requests of several priorities on one engine of batches of four.

    Attributes:
        answered: By priority, those whose answer came in time.
        rows: What the engine ran.
    """

    def __init__(self, levels: int, rates: dict[int, float], deadline: float) -> None:
        self._loop, self._random = VirtualTimeLoop(), random.Random(1)
        policies = (QueuePolicy(1000),) * levels
        policy = BatchPolicy(4, 0.0, 1000, levels=policies, default_level=levels)
        self._scheduler = Scheduler(policy, 1, self._loop.time)
        self._deadline = deadline
        self.answered = dict.fromkeys(rates, 0)
        self.rows = 0
        run(self._run(rates), self._loop)

    async def _run(self, rates: dict[int, float]) -> None:
        engine = asyncio.create_task(self._engine())
        await asyncio.gather(*(self._clients(priority, rate) for priority, rate in rates.items()))
        self._scheduler.close()
        await engine

    async def _engine(self) -> None:
        while (batch := await self._scheduler.take()) is not None:
            rows = sum(entry.rows for entry in batch)
            await asyncio.sleep(TAKES)
            self._scheduler.ran(rows, TAKES)
            self.rows += rows
            for entry in batch:
                if not entry.result.done():
                    entry.result.set_result({})

    async def _clients(self, priority: int, rate: float) -> None:
        tasks = set()
        while self._loop.time() < SECONDS:
            task = asyncio.create_task(self._client(priority))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(self._random.expovariate(rate))
        await asyncio.gather(*tasks)

    async def _client(self, priority: int) -> None:
        entry = new(loop=self._loop, priority=priority, deadline=self._loop.time() + self._deadline)
        try:
            self._scheduler.admit(entry)
            self._scheduler.put(entry, {"x": np.zeros((1, 4), np.float32)})
            async with asyncio.timeout(self._deadline):
                await entry.result
            self.answered[priority] += 1
        except (ServerError, TimeoutError):
            pass
        finally:
            self._scheduler.discard(entry)


@pytest.mark.parametrize("deadline", [0.25, 0.35, 0.5, 3.0])
@pytest.mark.parametrize(("levels", "rates"), [(1, {1: 200.0}), (2, {1: 8.0, 2: 190.0}), (3, {1: 4, 2: 10, 3: 190})])
def test_goodput_under_overload(levels: int, rates: dict[int, float], deadline: float) -> None:
    load = Load(levels, rates, deadline)
    assert sum(load.answered.values()) / SECONDS > 0.93 * CAPACITY
    assert load.rows <= sum(load.answered.values()) * 1.05
    for priority, rate in list(rates.items())[:-1]:
        assert load.answered[priority] > 0.85 * rate * SECONDS


def test_a_smaller_batch_is_believed_beside_a_larger_one_that_is_measured_on() -> None:
    latency = BatchLatency(8)
    for _ in range(5):
        latency.ran(1, 0.1, 0.0)
    for step in range(100):
        latency.ran(8, 0.3, 0.5 + step / 10)
    assert latency.estimate(1, 10.5) == 0.1
    assert latency.known(4, 10.5).most == 0.3
    for step in range(20):  # the engine has become faster: no batch takes longer than a larger one
        latency.ran(8, 0.05, 10.5 + step / 10)
    assert latency.estimate(1, 12.5) == 0.05
    latency.ran(8, 0.05, 31.0)
    assert latency.estimate(1, 31.0) == 0.0, "nobody knows any more"
    assert latency.estimate(1, 40.0) == latency.estimate(8, 40.0) == 0.0
