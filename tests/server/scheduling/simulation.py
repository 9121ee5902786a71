"""Requests with deadlines on simulated engines, with a clock of their own: what becomes of them, by level and size."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from convoynet.server.errors import DeadlineExceeded
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy, QueuePolicy
from convoynet.server.types import Tensor, Timings

LOOP = asyncio.new_event_loop()
INPUTS: dict[int, dict[str, Tensor]] = {rows: {"x": np.zeros((rows, 1), np.float32)} for rows in range(1, 33)}


@dataclass(frozen=True)
class Mix:
    """Engines, and what is asked of them. Times are in batches: what a full one takes, without jitter.

    Attributes:
        max_rows, engines: Rows in a batch, and batches at a time.
        batch_s: Seconds of a full batch.
        fixed: The part of them that an empty one would take.
        jitter: How much longer or shorter a batch may take than that, as a part of it.
        deadline: How long each request has, where no batch took longer than without jitter; 0 for no deadline.
        load: Times what the engines can do in full batches.
        levels: The part of the load at each priority, the highest first.
        sizes: Rows of a request, each as often.
        quiet: In each stretch of 50 batches, those at whose end nothing is asked.
        batches: How long it lasts.
    """

    max_rows: int = 4
    engines: int = 1
    batch_s: float = 0.1
    fixed: float = 1.0
    jitter: float = 0.0
    deadline: float = 3.0
    load: float = 5.0
    levels: tuple[float, ...] = (1.0,)
    sizes: tuple[int, ...] = (1,)
    quiet: int = 0
    batches: int = 100
    seed: int = 0

    def seconds(self, rows: int) -> float:
        """A batch of `rows`."""
        return self.batch_s * (self.fixed + (1 - self.fixed) * rows / self.max_rows)


@dataclass
class Outcome:
    """What became of the rows: those that came and those answered in time, by level and by size."""

    seconds: float
    came: Counter[tuple[int, int]] = field(default_factory=Counter)
    in_time: Counter[tuple[int, int]] = field(default_factory=Counter)
    in_time_until_the_end: int = 0

    @property
    def goodput(self) -> float:
        """Rows in time a second, as long as requests come."""
        return self.in_time_until_the_end / self.seconds

    def part(self, level: int = 0, size: int = 0) -> float:
        """The part that was in time of the rows of a level, or of requests of a size."""
        kinds = [kind for kind in self.came if level in (0, kind[0]) and size in (0, kind[1])]
        return sum(self.in_time[kind] for kind in kinds) / max(sum(self.came[kind] for kind in kinds), 1)


class _Simulation:
    def __init__(self, mix: Mix) -> None:
        self.mix, self.random = mix, random.Random(mix.seed)
        self.now, self.free = 0.0, mix.engines
        levels = tuple(QueuePolicy(10**6) for _ in mix.levels)
        policy = BatchPolicy(mix.max_rows, 0.0, 10**6, levels=levels, default_level=len(levels))
        self.scheduler = Scheduler(policy, mix.engines, lambda: self.now)
        self.outcome = Outcome(mix.batches * mix.batch_s)
        self.order = itertools.count()
        self.events: list[tuple[float, int, list[Entry] | Entry | None, float]] = []

    def at(self, when: float, what: list[Entry] | Entry | None) -> None:
        """A batch ends, an entry expires, or the next request comes."""
        heapq.heappush(self.events, (when, next(self.order), what, self.now))

    def run(self) -> Outcome:
        self.at(0.0, None)
        while self.events:
            self.now, _, what, since = heapq.heappop(self.events)
            if self.now >= self.outcome.seconds and not self.mix.deadline:
                break
            if what is None:
                self.ask()
            elif isinstance(what, Entry):
                self.expire(what)
            else:
                self.answer(what, since)
            while self.free and (batch := self.scheduler.form()):
                self.free -= 1
                rows = sum(entry.rows for entry in batch)
                slower = 1 + self.mix.jitter * self.random.uniform(-1, 1)
                self.at(self.now + self.mix.seconds(rows) * slower, batch)
        return self.outcome

    def ask(self) -> None:
        mix, rows = self.mix, self.random.choice(self.mix.sizes)
        level = self.random.choices(range(1, len(mix.levels) + 1), mix.levels)[0]
        deadline = self.now + mix.deadline * mix.batch_s * (1 + mix.jitter) if mix.deadline else None
        entry = Entry(rows, 1, asyncio.Future(loop=LOOP), Timings(), priority=level, deadline=deadline)
        self.outcome.came[level, rows] += rows
        try:
            self.scheduler.admit(entry)
            self.scheduler.put(entry, INPUTS[rows])
            if deadline is not None:
                self.at(entry.expires, entry)
        except DeadlineExceeded:
            pass
        mean = sum(mix.sizes) / len(mix.sizes)
        following = self.now + self.random.expovariate(mix.load * mix.engines * mix.max_rows / mix.batch_s / mean)
        if following // mix.batch_s % 50 >= 50 - mix.quiet:
            following = (following // mix.batch_s // 50 + 1) * 50 * mix.batch_s
        if following < self.outcome.seconds:
            self.at(following, None)

    def expire(self, entry: Entry) -> None:
        if not entry.result.done() and entry.expires > self.now:
            self.at(entry.expires, entry)
            return
        if not entry.result.done():
            entry.result.set_exception(DeadlineExceeded())
        entry.result.exception()  # somebody has looked at it
        self.scheduler.discard(entry)

    def answer(self, batch: list[Entry], since: float) -> None:
        self.free += 1
        self.scheduler.ran(sum(entry.rows for entry in batch), self.now - since)
        for entry in batch:
            if not entry.result.done():
                entry.result.set_result({})
                self.outcome.in_time[entry.priority, entry.rows] += entry.rows
                self.outcome.in_time_until_the_end += entry.rows * (self.now < self.outcome.seconds)


def simulate(mix: Mix) -> Outcome:
    """What becomes of such requests."""
    return _Simulation(mix).run()


def peak(mix: Mix) -> float:
    """Rows a second that the same engines answer of the same requests, without deadlines and always full."""
    return simulate(replace(mix, deadline=0.0, load=2.0, quiet=0)).goodput
