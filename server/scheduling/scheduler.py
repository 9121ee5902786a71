"""What waits for a model's engines, in which order and for how long: single-threaded, on the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from math import inf

from convoynet.server.errors import DeadlineExceeded, Draining, Oversize, QueueFull, ServerError
from convoynet.server.scheduling import buckets
from convoynet.server.scheduling.choice import Chooser, reached, shared, too_late
from convoynet.server.scheduling.entry import Entry, Level
from convoynet.server.scheduling.latency import BatchLatency, Takes
from convoynet.server.scheduling.running import Running
from convoynet.server.scheduling.wakeups import Wakeups
from convoynet.server.spec import BatchPolicy, QueuePolicy
from convoynet.server.types import Tensor

_EVIDENCE = 5
"""Batches that must have been measured before a request is given up for it."""
_MARGIN = 1.25
"""How much longer than measured the wait may be behind others that wait."""


class Scheduler:
    """Admits requests, keeps them in order and gives out batches of them. Belongs to one event loop; no locks.

    Order is by priority level, then first come, first served. A batch is a run of entries in that order: it ends
    before the first one that has other shapes or does not fit. That one heads the next batch, so that it is neither
    overtaken nor does it hold anybody up for longer than one batch.

    A batch is formed when an engine is free for it: at once where no delay is configured. With a delay it waits until
    its oldest entry has waited for so long, it reaches a preferred size, it cannot grow, or a deadline presses.

    Deadlines: an entry that cannot finish in time by the measured latency of batches is answered with DeadlineExceeded
    instead of being run. Where a deadline presses, Chooser says which batch is run, and who passes others for it; those
    who would be late for the one after it are given up (Shen and others, SOSP 2019, "Nexus", drop early for this).
    Fewer than five batches of a size, and old ones (see BatchLatency), are no evidence for that.

    Attributes:
        rows: Rows that were admitted and are not running yet.
        nbytes: Bytes that their inputs take.
        alone: Whether each request is a batch of its own.
        running: The batches that were given out and have not ran() yet.
        latency: What ran() has taught.
    """

    def __init__(self, policy: BatchPolicy, instances: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows = self.nbytes = 0
        self.latency = BatchLatency(policy.max_rows)
        self._closed = self.alone = False
        self._policy = policy
        self._clock = clock
        self._max_rows = max(policy.max_rows, 1)
        self._max_delay = policy.max_delay_s
        self.use_buckets(policy.buckets)
        self._preferred = frozenset(policy.preferred if policy.preferred != (self._max_rows,) else ())
        self._enough = min(policy.preferred, default=self._max_rows)
        self._most = max(policy.preferred, default=self._max_rows)
        self._levels = [Level(one) for one in policy.levels or (QueuePolicy(policy.max_queue),)]
        self._queues = [queue for level in self._levels for queue in (level.queue, level.delayed)]
        self._count = self._queued = self._queued_rows = 0
        self.running = Running(instances)
        self._last_shapes: tuple[object, ...] = ()
        self._engines = Wakeups()
        self._chooser = Chooser(self._slow, self._known)

    def __len__(self) -> int:
        """The number of requests that were admitted and are not running yet."""
        return self._count

    @property
    def most_queued(self) -> int:
        """The most requests that may wait, those of all levels together."""
        return sum(level.max_queue for level in self._levels)

    @property
    def is_over(self) -> bool:
        """Whether it is closed and everything in it was given out."""
        return self._closed and not self._count

    def use_buckets(self, chosen: tuple[int, ...]) -> None:
        """Pads batches to `chosen` (ascending) from now on, as measured when the engine was loaded."""
        most = self._max_rows
        self._buckets = () if self.alone else tuple(bucket for bucket in chosen if bucket <= most)
        larger = (size for size in buckets.candidates(most, most + 1) if size > max(self._buckets, default=0))
        self._sizes = tuple(sorted({*self._buckets, *larger}, reverse=True))

    def run_alone(self) -> None:
        """Makes each request a batch of its own from now on, whatever its rows, and pads none."""
        self._max_rows = self._enough = self._most = 1
        self.alone = True
        self.use_buckets(())

    def pad_to(self, rows: int) -> int:
        """The rows that a batch of `rows` is padded to; `rows` itself where it is not padded."""
        return buckets.pad_to(rows, self._buckets) if self._buckets else rows

    def admit(self, entry: Entry) -> None:
        """Takes a place for an entry before any work is spent on it. put() uses the place, discard() gives it back.

        Raises:
            Draining: The scheduler is closed.
            QueueFull: As many requests wait at its level as may, or as many bytes in all.
            Oversize: It takes more bytes than may wait at all.
            DeadlineExceeded: It cannot finish in time, considering what waits before it.
        """
        if self._closed:
            raise Draining
        levels = self._levels
        index = entry.priority if 0 < entry.priority <= len(levels) else self._policy.default_level
        level = levels[index - 1]
        if level.count >= level.max_queue:
            raise QueueFull(self.predict(entry.rows, index))
        if self.nbytes + entry.nbytes > self._policy.max_queue_bytes:
            self._refuse_bytes(entry)
        if entry.deadline is not None or entry.timeout_s or level.timeout != inf:
            self._bound(entry, level, index)
        entry.level = level
        level.count += 1
        level.rows += entry.rows
        self._count += 1
        self.rows += entry.rows
        self.nbytes += entry.nbytes

    def put(self, entry: Entry, inputs: Mapping[str, Tensor]) -> None:
        """Queues an admitted entry with its inputs. Does nothing where it was discarded meanwhile."""
        level = entry.level
        if level is None:
            return
        entry.inputs = inputs
        if len(inputs) == 1:
            (only,) = inputs.values()
            entry.shapes = only.shape[1:]
        else:
            entry.shapes = tuple((name, inputs[name].shape[1:]) for name in sorted(inputs))
        entry.timings.queued = time.perf_counter_ns()
        entry.queue = level.queue
        level.queue[entry] = None
        self._queued += 1
        self._queued_rows += entry.rows
        if self._max_delay:
            entry.queued_at = self._clock()
            waits = self._queued > 1 and self._queued_rows < self._enough and entry.shapes == self._last_shapes
            self._last_shapes = entry.shapes
            if waits and entry.expires == inf and len(self._levels) == 1:
                return
        self._engines.wake()

    def discard(self, entry: Entry) -> None:
        """Gives an entry's place back, wherever it is; does nothing where it runs, or was never admitted."""
        if entry.level is not None:
            self._leave(entry)

    def close(self) -> None:
        """Admits nothing more; what was admitted is still given out, then take() returns None."""
        self._closed = True
        self._engines.wake_all()

    def refuse(self, error: ServerError) -> None:
        """Ends everything that is queued with an error: nobody will run it."""
        for entry in [entry for queue in self._queues for entry in queue]:
            self._leave(entry)
            if not entry.result.done():
                entry.result.set_exception(copy(error))  # whose traceback holds no other's request

    def form(self) -> list[Entry]:
        """Takes out the batch that would run now, whatever delay is configured; empty where nothing waits.

        Entries that nobody waits for any more are left out; those that cannot finish in time get DeadlineExceeded.
        """
        now = self._clock()
        batch, _ = self._plan(now, self._press)
        for entry in batch:
            self._leave(entry)
            entry.expires = entry.finish_by
        if batch:
            self.running.begin(sum(entry.rows for entry in batch), now)
            if self._queued:
                self._engines.wake()
        return batch

    async def take(self) -> list[Entry] | None:
        """Waits until a batch is due and takes it out: at most max_rows rows of the same shapes.

        Each engine has a task of its own that calls this. A caller that is cancelled loses no entry; wait_for()
        around it may.

        Returns:
            The batch, or None when the scheduler is closed and everything in it was given out.
        """
        while await self._until_due():
            if batch := self.form():
                return batch
        return None

    async def due(self) -> bool:
        """Waits until a batch is due, and leaves it to whoever is first to form(): for engines that share a device.

        Returns:
            False when the scheduler is closed and everything in it was given out.
        """
        if not await self._until_due():
            return False
        self._engines.wake()
        return True

    def ran(self, rows: int, seconds: float | None) -> None:
        """A batch that was taken out is over, which teaches how long one takes.

        Args:
            rows: Its rows, without padding.
            seconds: From form() or take() to the answers; None where it failed.
        """
        self.running.over(rows)
        if seconds is not None:
            self.latency.ran(self.pad_to(rows), seconds, self._clock())

    def predict(self, rows: int, priority: int = 0) -> float:
        """Seconds until a request of `rows` rows that came now would be answered; 0 where nothing was measured."""
        index = priority if 0 < priority <= len(self._levels) else self._policy.default_level
        return sum(self._predict(rows, index, self._clock(), 1, 1.0))

    async def _until_due(self) -> bool:
        while True:
            wait = inf
            if self._queued:
                if not self._max_delay or self._closed:
                    return True
                now = self._clock()
                _, due = self._plan(now, lambda _: [])
                if due <= now:
                    return True
                wait = due - now
            elif self._closed and not self._count:
                return False
            await self._engines.wait(wait)

    def _bound(self, entry: Entry, level: Level, index: int) -> None:
        """Sets the times that an entry has; refuses it where what was measured says that they are too short."""
        now = self._clock()
        finish_by = inf if entry.deadline is None else entry.deadline
        start_by = inf
        own = entry.timeout_s or inf
        if level.delays:
            entry.delay_at = now + min(own, level.timeout)
        else:
            finish_by = min(finish_by, now + own)
            start_by = now + level.timeout
        wait, takes = self._predict(entry.rows, index, now, _EVIDENCE, _MARGIN)
        if now + wait + takes >= finish_by or now + wait >= start_by:
            raise DeadlineExceeded
        entry.finish_by = finish_by
        entry.expires = min(start_by, finish_by)

    def _refuse_bytes(self, entry: Entry) -> None:
        limit = self._policy.max_queue_bytes
        if entry.nbytes > limit:
            raise Oversize(f"the inputs take {entry.nbytes} bytes; at most {limit} may wait for the model")
        raise QueueFull(self.predict(entry.rows, entry.priority))

    def _predict(self, rows: int, index: int, now: float, least: int, margin: float) -> tuple[float, float]:
        """Seconds that a new entry at level `index` would wait, and that its own batch would take.

        It waits for the first engine to be free and for the full batches before it at its level and above, or where
        there is none for one into which it does not fit. One that has a deadline, and so a margin, passes that one.
        """
        takes, most = self._takes, self._max_rows
        ahead = self.rows if len(self._levels) == 1 else sum(one.rows for one in self._levels[:index])
        full, rest = divmod(ahead, most)
        if margin == 1 and not full and rest and rest + rows > most:
            full, rest = 1, 0
        own = takes(min(rest + rows, most), now, least)
        wait = 0.0
        if (first := self.running.first_to_end) is not None:
            at, running = first
            wait = max(at + takes(running, now, least) - now, 0.0)
        if full:
            known, batches = self._known(now, most, least), full / self.running.instances
            wait = (wait + (batches * known.least if margin == 1 else known.in_a_row(batches))) * margin
        return wait, own

    def _takes(self, rows: int, now: float, least: int = _EVIDENCE) -> float:
        """Seconds that a batch of `rows` rows is known to take, 0 where nothing is known."""
        return self._known(now, rows, least).least

    def _known(self, now: float, rows: int, least: int = _EVIDENCE) -> Takes:
        return self.latency.known(self.pad_to(rows) if self._buckets else rows, now, least)

    def _slow(self, now: float, rows: int) -> float:
        """Seconds of a slow batch, by the first that was measured: enough to choose by, not to refuse anybody."""
        return self._known(now, rows, 1).slow

    def _plan(self, now: float, press: Callable[[float], list[Entry]]) -> tuple[list[Entry], float]:
        """The next batch, still in its queues, by `press` where a deadline presses, and when it is due.

        Takes out what is dead, moves what is late. By _press() it is empty only where nothing waits any more.
        """
        batch: list[Entry] = []
        rows, pressing, ended = 0, 0.0, False
        for queue in self._queues if self._queued else ():
            passed: list[Entry] = []
            for entry in queue:
                if entry.result.done() or now >= entry.delay_at:
                    passed.append(entry)
                    continue
                if entry.expires != inf:  # most have all the time there is
                    pressing = pressing or now + self._slow(now, min(self._queued_rows, self._max_rows))
                    if entry.expires <= pressing:
                        return press(now), now
                fits = not batch or (rows + entry.rows <= self._max_rows and entry.shapes == batch[0].shapes)
                if fits:
                    batch.append(entry)
                    rows += entry.rows
                elif entry.expires != inf and entry.expires <= now + 2 * self._slow(now, self._max_rows):
                    return press(now), now  # it would be late for the batch after this one
                if ended := not fits or rows >= self._max_rows:
                    break
            for entry in passed:
                self._pass_over(entry, now)
            if ended:
                break
        return self._due(batch, ended, now)

    def _press(self, now: float) -> list[Entry]:
        """The next batch where a deadline presses. Gives up those who would be late for what can follow it."""
        passed: list[Entry] = []
        chosen = self._chooser.choose(self._alive(now, passed), now, self._sizes)
        for entry in passed:
            self._pass_over(entry, now)
        takes = partial(self._takes, now=now)
        for entry in too_late(self._queues, chosen.batch, self.running.free_after(chosen.rows, now, takes), takes):
            self._pass_over(entry, now)
        return chosen.batch[: reached(chosen.batch, self._preferred) or None]

    def _alive(self, now: float, passed: list[Entry]) -> Iterator[Entry]:
        """What waits, in its order. Takes out what is dead and moves what is late, the last of them in `passed`."""
        for queue in self._queues:
            for entry in queue:
                if entry.result.done() or now >= entry.delay_at or now >= entry.expires:
                    passed.append(entry)
                else:
                    yield entry
            for entry in passed:
                self._pass_over(entry, now)
            passed.clear()

    def _due(self, batch: list[Entry], ended: bool, now: float) -> tuple[list[Entry], float]:
        """The batch, cut where a preferred size was reached in time, and when it is due."""
        marked = reached(batch, self._preferred) if self._preferred else 0
        if not self._max_delay or not batch:
            if (free := self.running.free) > 1 and not self._preferred:
                batch = shared(batch, self._queued_rows, free, partial(self._known, now, least=1))
            return (batch[:marked] if marked else batch), now
        waited_out = min(entry.queued_at for entry in batch) + self._max_delay
        if waited_out <= now:
            return batch, now
        if marked:
            return batch[:marked], now
        if ended or (rows := sum(entry.rows for entry in batch)) >= self._most:
            return batch, now
        takes = self._takes(rows, now)
        # Never more than half of the time that an entry has: its engine may not have been measured yet.
        pressed = min(min(e.finish_by - takes, (e.expires + e.queued_at) / 2) for e in batch)
        return batch, min(waited_out, pressed)

    def _pass_over(self, entry: Entry, now: float) -> None:
        """Moves an entry that waited too long behind its level, or takes out one that is dead."""
        if (level := entry.level) is None or (queue := entry.queue) is None:
            raise AssertionError("only a queued entry is passed over")
        if not entry.result.done() and now >= entry.delay_at:
            del queue[entry]
            entry.queue = level.delayed
            entry.delay_at = inf
            level.delayed[entry] = None
            return
        self._leave(entry)
        if not entry.result.done():
            entry.result.set_exception(DeadlineExceeded())

    def _leave(self, entry: Entry) -> None:
        """Takes an entry out of all counts and of its queue."""
        level, queue, rows = entry.level, entry.queue, entry.rows
        if level is None:
            raise AssertionError("an entry leaves once")
        if queue is not None:
            del queue[entry]
            entry.queue = None
            self._queued -= 1
            self._queued_rows -= rows
        entry.level = None
        level.count -= 1
        level.rows -= rows
        self._count -= 1
        self.rows -= rows
        self.nbytes -= entry.nbytes
        if self._closed and not self._count:
            self._engines.wake_all()
