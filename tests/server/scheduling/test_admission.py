"""The limit on what is in flight, in front of a simulated engine: a batch of n rows takes a + b*n seconds."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest

from convoynet.server.errors import DeadlineExceeded, QueueFull
from convoynet.server.scheduling.admission import Limiter
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy
from convoynet.server.types import Tensor, Timings

LOOP = asyncio.new_event_loop()
MAX_ROWS = 16
OBJECTIVE = 0.3
FIXED, PER_ROW = 0.010, 0.002
CAPACITY = MAX_ROWS / (FIXED + PER_ROW * MAX_ROWS)
INPUTS: dict[str, Tensor] = {"x": np.zeros((1, 4), np.float32)}


@dataclass
class Outcome:
    """What became of the requests: when each accepted one came, and how long its answer took."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    def goodput(self, since: float, until: float) -> float:
        """Answers within the objective, a second, to requests that came in that time."""
        return sum(since <= at < until and took <= OBJECTIVE for at, took in self.answers) / (until - since)

    def p99(self) -> float:
        took = sorted(took for _, took in self.answers)
        return took[int(0.99 * len(took))]


def simulate(
    rate: Callable[[float], float],
    slowness: Callable[[float], float] = lambda now: 1.0,
    *,
    seconds: float,
    predicts: bool = True,
    limited: bool = True,
    timeout: float | None = None,
) -> Outcome:
    """One model with one engine; Poisson arrivals, `rate` a second, batches that take 10 % more or less."""
    random_numbers = random.Random(5)
    now = 0.0
    scheduler = Scheduler(BatchPolicy(MAX_ROWS, 0.0, 100_000), 1, lambda: now)
    limiter = Limiter(OBJECTIVE if limited else 1e9, 100_000)
    outcome = Outcome()
    came: dict[Entry, tuple[float, int]] = {}
    running: list[Entry] = []
    began = 0.0
    events = [(random_numbers.expovariate(rate(0.0)), 0)]  # 0: a request comes, 1: a batch ends
    while events:
        now, kind = heapq.heappop(events)
        if kind:
            scheduler.ran(len(running), now - began)
            for entry in running:
                at, inflight = came.pop(entry)
                outcome.answers.append((at, now - at))
                limiter.observe(inflight, now - at, now)
            running = []
        else:
            try:
                limiter.admit(len(came), scheduler.predict(1) if predicts else 0.0)
            except QueueFull:
                outcome.refused.append(now)
            else:
                entry = Entry(1, 16, asyncio.Future(loop=LOOP), Timings())
                entry.deadline = None if timeout is None else now + timeout
                with suppress(DeadlineExceeded):
                    scheduler.admit(entry)
                    scheduler.put(entry, INPUTS)
                    came[entry] = now, len(came)
            following = now + random_numbers.expovariate(rate(now))
            if following < seconds:
                heapq.heappush(events, (following, 0))
        if not running:
            running, began = scheduler.form(), now
            for entry in [one for one in came if one.result.done()]:
                assert isinstance(entry.result.exception(), DeadlineExceeded)
                del came[entry]
            if running:
                takes = (FIXED + PER_ROW * len(running)) * slowness(now) * random_numbers.uniform(0.9, 1.1)
                heapq.heappush(events, (now + takes, 1))
    return outcome


@pytest.mark.parametrize("predicts", [True, False])
def test_five_times_capacity_keeps_goodput_and_the_objective(predicts: bool) -> None:
    peak = simulate(lambda now: 0.9 * CAPACITY, seconds=20, limited=False).goodput(2, 20)
    over = simulate(lambda now: 5 * CAPACITY, seconds=20, predicts=predicts)
    assert peak > 0.8 * CAPACITY
    assert over.goodput(2, 20) >= 0.9 * max(peak, CAPACITY)
    if predicts:
        assert over.p99() <= OBJECTIVE


def test_without_a_limit_nothing_is_in_time() -> None:
    """The simulation shows what the limit is for."""
    over = simulate(lambda now: 5 * CAPACITY, seconds=10, limited=False)
    assert over.goodput(2, 10) == 0


def test_deadlines_alone_keep_goodput_as_well() -> None:
    """What cannot be in time is refused or dropped, so that the engine works for what can, in full batches."""
    over = simulate(lambda now: 5 * CAPACITY, seconds=20, limited=False, timeout=OBJECTIVE)
    assert over.goodput(2, 20) >= 0.9 * CAPACITY
    late = sum(took > OBJECTIVE for _, took in over.answers)
    assert late <= 0.05 * len(over.answers)


def test_at_seven_tenths_of_capacity_nothing_is_refused() -> None:
    outcome = simulate(lambda now: 0.7 * CAPACITY, seconds=60)
    assert not outcome.refused
    assert outcome.p99() <= OBJECTIVE


def test_a_burst_after_a_quiet_time_is_answered_in_time() -> None:
    outcome = simulate(lambda now: 0.2 * CAPACITY if now < 10 else 5 * CAPACITY, seconds=20)
    assert outcome.p99() <= OBJECTIVE
    assert outcome.goodput(10, 20) >= 0.9 * CAPACITY


@pytest.mark.parametrize("predicts", [True, False])
def test_it_recovers_within_seconds_when_the_engine_is_fast_again(predicts: bool) -> None:
    """Ten times slower for ten seconds, at 0.7 of the capacity that the engine has otherwise."""
    outcome = simulate(
        lambda now: 0.7 * CAPACITY,
        lambda now: 10.0 if 10 <= now < 20 else 1.0,
        seconds=40,
        predicts=predicts,
    )
    assert not [at for at in outcome.refused if at < 10]
    assert outcome.goodput(13, 20) < 0.1 * CAPACITY, "the objective cannot be kept with such batches"
    assert not [at for at in outcome.refused if at > 24]
    assert outcome.goodput(24, 40) >= 0.65 * CAPACITY


def test_one_request_is_always_let_in_and_the_limit_stays_above_it() -> None:
    limiter = Limiter(0.1, 10)
    now = 0.0
    for _ in range(100):
        now += 2.0
        limiter.admit(0, predicted_s=9.0)
        limiter.observe(1, 1.0, now)
    assert limiter.limit == 1
    with pytest.raises(QueueFull):
        limiter.admit(1)


def test_what_nothing_tests_does_not_grow() -> None:
    limiter = Limiter(0.1, 1000)
    now = 0.0

    def answers(inflight: int, latency: float) -> None:
        nonlocal now
        for _ in range(64):
            now += 0.001
            limiter.admit(inflight)
            limiter.observe(inflight, latency, now)

    answers(199, 0.17)
    small = limiter.limit
    assert small == pytest.approx(100)  # what would have taken 0.085 s
    answers(50, 0.001)
    assert limiter.limit == small
    answers(90, 0.001)
    assert limiter.limit == pytest.approx(150)
