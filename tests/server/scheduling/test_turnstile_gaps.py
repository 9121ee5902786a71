"""Models whose clients wait for an answer before they ask again, in turns at one device, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convoynet.server.scheduling.turnstile import Turnstile
from tests.server.virtual_time import VirtualTimeLoop, run

SECONDS = 8.0


@dataclass
class Model:
    """One engine with batches of at most eight requests, and clients that think before each.

    Attributes:
        turn: Seconds that a batch takes.
        clients: How many there are.
        thinks: Seconds from an answer to the next request, on average.
        since: When they begin.
        until: When they stop.
    """

    turn: float
    clients: int = 1
    thinks: float = 0.0
    since: float = 0.0
    until: float = SECONDS
    busy: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return len(self.latencies)


class _Device:
    def __init__(self, *models: Model, slots: int = 1) -> None:
        self._loop, self._random = VirtualTimeLoop(), random.Random(1)
        self._turnstile = Turnstile(slots, self._loop.time)
        run(self._main(models), self._loop)

    async def _main(self, models: tuple[Model, ...]) -> None:
        engines = []
        clients = []
        for key, model in enumerate(models):
            queue: deque[asyncio.Future[None]] = deque()
            wanted = asyncio.Event()
            engines.append(asyncio.create_task(self._engine(key, model, queue, wanted)))
            clients += [self._client(model, queue, wanted) for _ in range(model.clients)]
        await asyncio.gather(*clients)
        for engine in engines:
            engine.cancel()

    async def _client(self, model: Model, queue: deque[asyncio.Future[None]], wanted: asyncio.Event) -> None:
        await asyncio.sleep(model.since)
        while (asked := self._loop.time()) < model.until:
            queue.append(answer := self._loop.create_future())
            wanted.set()
            await answer
            model.latencies.append(self._loop.time() - asked)
            await asyncio.sleep(model.thinks * self._random.uniform(0.7, 1.3))

    async def _engine(self, key: int, model: Model, queue: deque[asyncio.Future[None]], wanted: asyncio.Event) -> None:
        while await wanted.wait():
            async with self._turnstile.turn(key):
                batch = [queue.popleft() for _ in range(min(len(queue), 8))]
                await asyncio.sleep(model.turn)
                model.busy += model.turn
            for answer in batch:
                answer.set_result(None)
            if not queue:
                wanted.clear()


def alone(model: Model) -> Model:
    """The same without others."""
    one = Model(model.turn, model.clients, model.thinks)
    _Device(one)
    return one


@settings(max_examples=10)
@given(
    st.builds(Model, turn=st.floats(0.0005, 0.02), clients=st.integers(1, 12), thinks=st.floats(0.0002, 0.005)),
    st.builds(Model, turn=st.floats(0.1, 0.4), clients=st.integers(1, 12), thinks=st.floats(0.0, 0.02)),
)
@example(Model(0.002, 3, 0.002), Model(0.175, 16, 0.002))
@example(Model(0.0005, 2, 0.003), Model(0.175, 16, 0.0))
@example(Model(0.01, 8, 0.0), Model(0.2))
def test_short_and_long_batches_share_the_time(short: Model, long: Model) -> None:
    """Each does nearly half of what it does alone, and a short one waits for one long one at most."""
    _Device(short, long)
    assert short.answers > 0.35 * alone(short).answers
    assert long.answers > 0.35 * alone(long).answers
    batches = -(-short.clients // 8)
    assert max(short.latencies) < long.turn + (batches + 1) * (short.turn + short.thinks) + 0.01


@pytest.mark.parametrize(("turn", "clients"), [(1 / 748, 1), (1 / 748, 4), (8 / 748, 8), (8 / 748, 32)])
def test_a_model_of_748_requests_a_second_has_half_beside_batches_of_175_ms(turn: float, clients: int) -> None:
    short, long = Model(turn, clients, 0.0005), Model(0.175, 16, 0.001)
    _Device(short, long)
    assert short.answers >= 0.47 * alone(short).answers
    assert long.answers >= 0.47 * alone(long).answers
    assert max(short.latencies) < long.turn + (-(-clients // 8) + 1) * (turn + 0.001)


@pytest.mark.parametrize("thinks", [0.05, 0.5])
def test_nobody_is_waited_for_who_comes_back_late(thinks: float) -> None:
    rare, busy = Model(0.005, 1, thinks), Model(0.1, 8)
    _Device(rare, busy)
    assert rare.busy + busy.busy > 0.98 * SECONDS
    assert max(rare.latencies) < 0.11


def test_who_has_gone_is_not_waited_for_again() -> None:
    gone, busy = Model(0.005, 4, 0.002, until=SECONDS / 2), Model(0.1, 8)
    _Device(gone, busy)
    assert busy.busy > (0.75 - 0.02) * SECONDS


def test_time_in_which_nobody_else_wants_anything_is_no_credit_and_costs_nothing() -> None:
    late, busy = Model(0.002, 2, 0.002, since=SECONDS / 2), Model(0.1, 8)
    _Device(late, busy)
    assert busy.busy == pytest.approx(0.75 * SECONDS, rel=0.05)


def test_equal_models_do_not_wait_for_each_other() -> None:
    models = [Model(0.01, 1, 0.002) for _ in range(3)]
    _Device(*models)
    assert sum(model.busy for model in models) > 0.98 * SECONDS
    assert max(model.busy for model in models) < 1.1 * min(model.busy for model in models)


def test_nothing_is_kept_where_there_is_room_for_both() -> None:
    short, long = Model(0.002, 2, 0.002), Model(0.2, 8)
    _Device(short, long, slots=2)
    assert short.answers == pytest.approx(alone(short).answers, rel=0.05)
    assert long.busy > 0.98 * SECONDS


def test_three_models_have_a_third_each() -> None:
    short, long, longer = Model(0.002, 2, 0.001), Model(0.1, 8), Model(0.3, 8)
    _Device(short, long, longer)
    for model in (short, long, longer):
        assert model.answers > 0.27 * alone(model).answers
