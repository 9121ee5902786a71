"""The scheduler by itself: what is admitted runs once, in order, in time, in batches of the right size."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.buckets import choose_buckets, pad_to
from server.entry import Entry
from server.errors import DeadlineExceeded, Draining, Oversize, QueueFull
from server.latency import BatchLatency
from server.scheduler import Scheduler
from server.spec import BatchPolicy, QueuePolicy
from server.types import Tensor, Timings
from tests.server.virtual_time import VirtualTimeLoop, run

LOOP = asyncio.new_event_loop()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new(rows: int = 1, loop: asyncio.AbstractEventLoop = LOOP, **fields: float) -> Entry:
    """An entry of `rows` rows, a byte each."""
    result: asyncio.Future[dict[str, Tensor]] = asyncio.Future(loop=loop)
    return Entry(rows, rows, result, Timings(), **fields)  # type: ignore[arg-type]


def put(scheduler: Scheduler, entry: Entry, width: int = 4) -> Entry:
    """Admits and queues an entry."""
    scheduler.admit(entry)
    scheduler.put(entry, {"x": np.zeros((entry.rows, width), np.float32)})
    return entry


def rows_of(batch: Iterable[Entry]) -> list[int]:
    return [entry.rows for entry in batch]


def expired(entry: Entry) -> bool:
    return entry.result.done() and isinstance(entry.result.exception(), DeadlineExceeded)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 8),
            st.sampled_from([4, 5]),
            st.integers(0, 4),
            st.sampled_from(["waits", "waits", "cancelled", "discarded", "never put"]),
        )
    ),
    st.integers(8, 20),
    st.sets(st.integers(1, 8)),
    st.integers(1, 3),
)
def test_every_entry_that_waits_runs_once_and_in_order(
    plan: list[tuple[int, int, int, str]], max_rows: int, preferred: set[int], levels: int
) -> None:
    policy = BatchPolicy(
        max_rows,
        0.0,
        len(plan) + 1,
        preferred=tuple(sorted(preferred)),
        levels=(QueuePolicy(len(plan) + 1),) * levels,
        default_level=levels,
    )
    scheduler = Scheduler(policy)
    entries = []
    for rows, width, priority, fate in plan:
        one = new(rows, priority=priority)
        entries.append((one, fate))
        scheduler.admit(one)
        if fate != "never put":
            scheduler.put(one, {"x": np.zeros((rows, width), np.float32)})
    for one, fate in entries:
        if fate == "cancelled":
            one.result.cancel()
        elif fate != "waits":
            scheduler.discard(one)
            scheduler.discard(one)
    batches = []
    while batch := scheduler.form():
        batches.append(batch)
    waiting = [one for one, fate in entries if fate == "waits"]
    waiting.sort(key=lambda one: one.priority if 1 <= one.priority <= levels else levels)
    assert [one for batch in batches for one in batch] == waiting
    for batch in batches:
        assert sum(rows_of(batch)) <= max_rows
        assert len({entry.shapes for entry in batch}) == 1
    for batch, after in pairwise(batches):
        rows = sum(rows_of(batch))
        fits = rows + after[0].rows <= max_rows and after[0].shapes == batch[0].shapes
        assert not fits or rows in preferred, "a batch ends early only where the next does not fit"
    assert (len(scheduler), scheduler.rows, scheduler.nbytes) == (0, 0, 0)


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler beside lists that are sorted anew each time."""

    max_rows = 6
    policies = (QueuePolicy(4, 2.0, delays=True), QueuePolicy(5, 3.0), QueuePolicy(6))

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler = Scheduler(
            BatchPolicy(self.max_rows, 0.0, 9, levels=self.policies, default_level=2), 1, self.clock
        )
        self.admitted: list[Entry] = []
        self.queued: list[Entry] = []
        self.levels: dict[Entry, int] = {}
        self.limits: dict[Entry, float] = {}
        self.delay_at: dict[Entry, float] = {}

    @rule(
        rows=st.integers(1, 6), priority=st.integers(0, 4), timeout=st.sampled_from([0, 1, 9]), deadline=st.booleans()
    )
    def admit(self, rows: int, priority: int, timeout: float, deadline: bool) -> None:
        one = new(rows, priority=priority, timeout_s=timeout)
        if deadline:
            one.deadline = self.clock.now + 2.5
        level = priority if 1 <= priority <= 3 else 2
        policy = self.policies[level - 1]
        try:
            self.scheduler.admit(one)
        except QueueFull:
            assert sum(self.levels[e] == level for e in self.admitted + self.queued) == policy.max_queue
            return
        waits = min(t for t in (timeout, policy.timeout_s, 1e9) if t)
        self.levels[one] = level
        self.limits[one] = min(one.deadline or 1e9, 1e9 if policy.delays else self.clock.now + waits)
        self.delay_at[one] = self.clock.now + waits if policy.delays else 1e9
        assert one.expires == self.limits[one] or (one.expires > 1e9 and self.limits[one] >= 1e9)
        self.admitted.append(one)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), width=st.sampled_from([4, 4, 5]))
    def put(self, data: st.DataObject, width: int) -> None:
        one = data.draw(st.sampled_from(self.admitted))
        self.admitted.remove(one)
        self.queued.append(one)
        self.scheduler.put(one, {"x": np.zeros((one.rows, width), np.float32)})

    @precondition(lambda self: self.admitted or self.queued)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.admitted + self.queued))
        self.scheduler.discard(one)
        (self.admitted if one in self.admitted else self.queued).remove(one)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.queued)).result.cancel()

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def advance(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def form(self) -> None:
        now = self.clock.now
        alive = [e for e in self.queued if not e.result.done() and self.limits[e] > now]
        # What was passed over once stays behind, in the order in which it went there.
        late = {e: self.delay_at[e] <= now for e in alive}
        first = sorted(alive, key=lambda e: (self.levels[e], late[e]))
        batch = self.scheduler.form()
        assert len(batch) > 0 or not alive
        assert set(batch) <= set(alive)
        assert sum(rows_of(batch)) <= self.max_rows
        levels = [(self.levels[e], late[e]) for e in batch]
        assert levels == sorted(levels)
        assert levels == [(self.levels[e], late[e]) for e in first[: len(batch)]]
        assert [e for e in batch if not late[e]] == [e for e in first[: len(batch)] if not late[e]]
        if len(batch) < len(first) and not late[after := first[len(batch)]]:
            full = sum(rows_of(batch)) + after.rows > self.max_rows
            assert full or after.shapes != batch[0].shapes, "a batch ends only where the next does not fit"
        for one in self.queued:
            if self.limits[one] <= now and not one.result.done():
                assert one.level is not None, "what is expired is left where it is, or answered"
        self.queued = [e for e in self.queued if e.level is not None]
        assert set(alive) - set(batch) == {e for e in self.queued if e in alive}

    @invariant()
    def counts(self) -> None:
        there = self.admitted + self.queued
        assert len(self.scheduler) == len(there)
        assert self.scheduler.rows == self.scheduler.nbytes == sum(rows_of(there))


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerBesideLists = SchedulerMachine.TestCase


def test_places_and_bytes_are_bounded_and_given_back() -> None:
    scheduler = Scheduler(BatchPolicy(8, 0.0, 3, max_queue_bytes=10))
    first, second = new(4), new(4)
    scheduler.admit(first)
    put(scheduler, second)
    with pytest.raises(QueueFull):
        scheduler.admit(new(3))  # bytes
    third = new(1)
    scheduler.admit(third)
    with pytest.raises(QueueFull):
        scheduler.admit(new(1))  # places
    scheduler.discard(third)
    with pytest.raises(Oversize, match="the inputs take 11 bytes; at most 10 may wait for the model"):
        scheduler.admit(new(11))
    assert scheduler.form() == [second]
    scheduler.admit(new(6))


def test_inputs_in_another_order_share_a_batch_and_swapped_shapes_do_not() -> None:
    scheduler = Scheduler(BatchPolicy(8, 0.0, 8))
    a, b = np.zeros((1, 4)), np.zeros((1, 5))
    entries = [new() for _ in range(3)]
    for entry, inputs in zip(entries, ({"p": a, "q": b}, {"q": b, "p": a}, {"p": b, "q": a}), strict=True):
        scheduler.admit(entry)
        scheduler.put(entry, inputs)
    assert scheduler.form() == entries[:2]
    assert scheduler.form() == entries[2:]


@pytest.mark.parametrize("max_rows", [0, 1])
def test_a_model_without_batches_runs_one_at_a_time(max_rows: int) -> None:
    scheduler = Scheduler(BatchPolicy(max_rows, 0.0, 8, buckets=(4,)), 1, Clock())
    assert scheduler.form() == []
    for _ in range(6):
        scheduler.ran(1, 0.1)
    entries = [put(scheduler, new()) for _ in range(2)]
    assert [scheduler.form() for _ in range(3)] == [entries[:1], entries[1:], []]
    assert scheduler.predict(1) == pytest.approx(0.2)  # what runs, and its own


def test_what_is_discarded_while_it_is_decoded_is_not_queued() -> None:
    scheduler = Scheduler(BatchPolicy(8, 0.0, 8))
    entry = new()
    scheduler.admit(entry)
    scheduler.discard(entry)
    scheduler.put(entry, {"x": np.zeros((1, 4))})
    assert scheduler.form() == []
    assert len(scheduler) == 0


@pytest.mark.parametrize(
    ("waiting", "batches"),
    [([1] * 9, [8, 1]), ([1] * 6, [4, 2]), ([3, 3], [6]), ([1] * 3, [3]), ([3, 1, 3], [4, 3]), ([1] * 10, [8, 2])],
)
def test_the_largest_preferred_size_that_is_reached_is_taken(waiting: list[int], batches: list[int]) -> None:
    scheduler = Scheduler(BatchPolicy(10, 0.0, 99, preferred=(4, 8)))
    for rows in waiting:
        put(scheduler, new(rows))
    got = []
    while batch := scheduler.form():
        got.append(sum(rows_of(batch)))
    assert got == batches


def test_a_late_request_is_delayed_behind_its_level_or_refused() -> None:
    clock = Clock()
    levels = (QueuePolicy(9, 1.0, delays=True), QueuePolicy(9, 1.0))
    scheduler = Scheduler(BatchPolicy(2, 0.0, 9, levels=levels, default_level=2), 1, clock)
    slow = put(scheduler, new(2, priority=1))
    refused = put(scheduler, new(2))
    clock.now += 0.5
    fresh = put(scheduler, new(2, priority=1))
    low = put(scheduler, new(2))
    clock.now += 0.6
    assert [scheduler.form() for _ in range(4)] == [[fresh], [slow], [low], []]
    assert expired(refused)


def test_the_shorter_timeout_counts() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(2, 0.0, 9, levels=(QueuePolicy(9, 2.0),)), 1, clock)
    for own, deadline, expires in ((0, None, 2.0), (1, None, 1.0), (5, None, 2.0), (1, 100.5, 0.5), (0, 200.0, 2.0)):
        entry = new(timeout_s=own, deadline=deadline)  # type: ignore[arg-type]
        scheduler.admit(entry)
        assert entry.expires == 100.0 + expires


def test_what_runs_is_no_longer_bound_by_how_long_it_may_wait() -> None:
    clock = Clock()
    scheduler = taught(1, clock, {1: 0.8}, levels=(QueuePolicy(9, 1.3),))
    plain = put(scheduler, new())
    hurried = new(timeout_s=0.7)
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(hurried)
    bounded = put(scheduler, new(deadline=clock.now + 5))
    clock.now += 0.5
    assert scheduler.form() == [plain], "it begins in time, and may take longer"
    assert scheduler.form() == [bounded]
    assert (plain.expires, bounded.expires) == (float("inf"), 105.0)
    put(scheduler, new())
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new())  # two of 0.8 s are before it


def taught(max_rows: int, clock: Clock, seconds: dict[int, float], **policy: object) -> Scheduler:
    """A scheduler that has seen five batches of each size."""
    scheduler = Scheduler(BatchPolicy(max_rows, 0.0, 999, **policy), 1, clock)  # type: ignore[arg-type]
    for rows, takes in seconds.items():
        for _ in range(5):
            scheduler.ran(rows, takes)
    return scheduler


def test_four_batches_are_no_evidence() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(1, 0.0, 9), 1, clock)
    for _ in range(4):
        scheduler.ran(1, 0.5)
    entry = put(scheduler, new(deadline=clock.now + 0.1))
    assert scheduler.form() == [entry]
    scheduler.ran(1, 0.5)
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(deadline=clock.now + 0.1))


def test_what_cannot_finish_in_time_is_not_begun() -> None:
    clock = Clock()
    scheduler = taught(1, clock, {1: 0.4})
    late, fine, patient = (put(scheduler, new(deadline=d)) for d in (clock.now + 0.45, clock.now + 1.0, None))
    clock.now += 0.1
    assert scheduler.form() == [fine]
    assert expired(late)
    assert scheduler.form() == [patient]


def test_admission_counts_what_waits_before() -> None:
    clock = Clock()
    scheduler = taught(4, clock, {1: 0.2, 4: 0.4})
    for _ in range(8):
        put(scheduler, new())
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(deadline=clock.now + 1.15))  # two batches of 0.4 s and a quarter more, and its own 0.2 s
    scheduler.admit(new(deadline=clock.now + 1.25))
    scheduler.form()
    clock.now += 0.1
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(deadline=clock.now + 1.05))  # 0.3 s of the first are left
    scheduler.admit(new(deadline=clock.now + 1.1))


def test_a_batch_is_made_smaller_for_a_deadline_where_that_is_cheap() -> None:
    clock = Clock()
    cheap = taught(8, clock, {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8})
    entries = [put(cheap, new(deadline=clock.now + 2.0)) for _ in range(8)]
    clock.now += 1.5
    assert cheap.form() == entries[:4]


def test_a_request_that_would_cost_the_others_much_is_given_up() -> None:
    clock = Clock()
    dear = taught(8, clock, {1: 0.1, 2: 0.115, 8: 0.12})
    hurried = put(dear, new(deadline=clock.now + 0.3))
    others = [put(dear, new()) for _ in range(7)]
    clock.now += 0.19
    assert dear.form() == others
    assert expired(hurried)
    dear.ran(7, 0.12)
    alone = put(dear, new(deadline=clock.now + 0.11))
    assert dear.form() == [alone]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0.001, 0.6)), min_size=1, max_size=40),
    st.lists(st.floats(0.01, 0.5), min_size=4, max_size=4).map(sorted),
    st.sampled_from([(), (8,), (2, 8), (1, 3, 4)]),
)
@example([(1, 0.3), (2, 0.6)], [0.1, 0.1, 0.1, 0.5], (2, 8))
def test_deadlines_are_kept_by_what_was_measured(
    plan: list[tuple[int, float]], measured: list[float], buckets: tuple[int, ...]
) -> None:
    """Whatever is taken is in time by the measured latency, and there is a batch where anything could be in time."""
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(8, 0.0, 99, buckets=buckets), 1, clock)
    entries = [put(scheduler, new(rows, deadline=clock.now + slack)) for rows, slack in plan]
    for rows, seconds in zip((1, 2, 4, 8), measured, strict=True):
        for _ in range(5):
            scheduler.latency.ran(rows, seconds, clock.now)

    def takes(rows: int) -> float:
        return measured[(scheduler.pad_to(rows) - 1).bit_length()]

    possible = {e for e in entries if takes(e.rows) <= e.expires - clock.now}
    seen: list[Entry] = []
    while True:
        waiting = {e for e in entries if e.level is not None}
        batch = scheduler.form()
        assert bool(batch) == bool(waiting & possible)
        if not batch:
            break
        seen += batch
        assert all(clock.now + takes(sum(rows_of(batch))) <= e.expires for e in batch)
    assert [e for e in entries if e in seen] == seen
    late = [expired(e) for e in entries]  # a list, so that every exception is looked at
    assert late == [e not in seen for e in entries]


def test_tight_deadlines_never_leave_the_engine_without_work() -> None:
    clock = Clock()
    scheduler = taught(64, clock, {1: 0.010, 2: 0.011, 64: 0.070})
    entries = [put(scheduler, new(deadline=clock.now + 0.2)) for _ in range(64)]
    clock.now += 0.2 - 0.012
    batch = scheduler.form()
    assert batch
    assert all(expired(e) for e in entries if e not in batch and e.level is None)


def test_a_stale_estimate_is_forgotten() -> None:
    clock = Clock()
    scheduler = taught(1, clock, {1: 0.5})
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(deadline=clock.now + 0.1))
    clock.now += 5.1  # ten times as long as a batch took
    entry = put(scheduler, new(deadline=clock.now + 0.1))
    assert scheduler.form() == [entry]


def test_the_estimate_is_a_median_of_its_class() -> None:
    latency = BatchLatency(8)
    for seconds in (0.1, 0.1, 9.0, 0.1, 0.1, 9.0, 0.1):
        latency.ran(5, seconds, 0.0)
    assert latency.estimate(8, 0.0) == 0.1
    assert latency.estimate(4, 0.0) == 0
    latency.ran(1, 0.01, 0.0)
    assert latency.estimate(4, 0.0, least=1) == 0.01
    assert latency.rows_within(0.09, 0.0) == 4
    assert latency.measured_rows(0.0) == 8


@given(st.lists(st.integers(1, 40), min_size=1), st.data())
def test_a_bucket_is_the_smallest_that_holds_the_rows(sizes: list[int], data: st.DataObject) -> None:
    buckets = tuple(sorted(set(sizes)))
    rows = data.draw(st.integers(1, 50))
    assert pad_to(rows, buckets) == min((b for b in buckets if b >= rows), default=rows)


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-4, 1.0), min_size=1))
def test_padding_to_the_chosen_buckets_never_takes_longer(latency: dict[int, float]) -> None:
    buckets = choose_buckets(latency)
    for size, seconds in latency.items():
        padded = pad_to(size, buckets)
        assert padded in latency
        assert latency[padded] <= seconds
        if padded == size:
            assert all(seconds * 0.95 <= other for larger, other in latency.items() if larger > size)


def test_buckets_where_five_rows_are_slower_than_eight() -> None:
    assert choose_buckets({1: 5, 4: 10, 5: 20, 8: 12, 10: 14}) == (1, 2, 3, 4, 8, 9, 10)
    assert choose_buckets({1: 1, 2: 2, 4: 4, 8: 8}) == ()
    assert choose_buckets({1: 8, 2: 8, 8: 7}) == (8,)
    scheduler = Scheduler(BatchPolicy(8, 0.0, 8))
    assert scheduler.pad_to(5) == 5
    scheduler.use_buckets((4, 8))
    assert (scheduler.pad_to(3), scheduler.pad_to(5), scheduler.pad_to(9)) == (4, 8, 9)


def test_a_padded_batch_takes_as_long_as_its_bucket() -> None:
    clock = Clock()
    scheduler = taught(8, clock, {8: 0.5}, buckets=(8,))
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(1, deadline=clock.now + 0.4))


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


def test_the_prediction_counts_what_runs_and_what_waits() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(4, 0.0, 99), 1, clock)
    assert scheduler.predict(1) == 0
    scheduler.ran(1, 0.1)
    scheduler.ran(4, 0.25)
    assert scheduler.predict(1) == 0.1
    for _ in range(4):
        put(scheduler, new())
    scheduler.form()
    for _ in range(5):
        put(scheduler, new())
    assert scheduler.predict(1) == pytest.approx(0.25 + 0.25 + 0.1)  # running, a full one, and 2 rows


def test_a_refusal_says_when_the_queue_should_be_empty() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(2, 0.0, 4), clock=clock)
    for _ in range(4):
        put(scheduler, new(1))
    with pytest.raises(QueueFull) as unknown:
        scheduler.admit(new(1))
    assert unknown.value.drain_s == 0
    scheduler.ran(2, 0.5)
    with pytest.raises(QueueFull) as known:
        scheduler.admit(new(2))
    # Two full batches and then its own.
    assert known.value.drain_s == pytest.approx(1.5, rel=0.2)
