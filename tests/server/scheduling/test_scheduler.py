"""The scheduler by itself: what is admitted runs once, in order, in batches of the right size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from convoynet.server.errors import Oversize, QueueFull
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy, QueuePolicy
from tests.server.scheduling.entries import Clock, expired, new, put, rows_of


@settings(max_examples=200)
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


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
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
