"""Who passes whom where a deadline presses, and that nobody does where none presses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoynet.server.scheduling.choice import MOST_PASSED, Chooser
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.latency import Takes
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy, QueuePolicy
from tests.server.scheduling.entries import Clock, expired, new, put, rows_of
from tests.server.virtual_time import VirtualTimeLoop, run

BATCH = 0.1


def taught(clock: Clock, levels: int = 1, engines: int = 1, delay: float = 0.0) -> Scheduler:
    """A scheduler of eight rows whose batches take 0.1 s, however few rows they have."""
    policy = BatchPolicy(8, delay, 10**6, levels=(QueuePolicy(10**6),) * levels, default_level=levels)
    scheduler = Scheduler(policy, engines, clock)
    for rows in (1, 2, 4, 8):
        for _ in range(5):
            scheduler.latency.ran(rows, BATCH, clock.now)
    return scheduler


def waits(scheduler: Scheduler, rows: int, until: float, priority: int = 0, width: int = 4) -> Entry:
    """An entry that waits, although it would be refused now."""
    entry = put(scheduler, new(rows, priority=priority), width)
    entry.finish_by = entry.expires = until
    return entry


def hurried(scheduler: Scheduler, clock: Clock, *rows: int, priority: int = 0) -> list[Entry]:
    """Entries that would be late for the batch after the next."""
    return [waits(scheduler, one, clock.now + 1.5 * BATCH, priority) for one in rows]


def test_a_large_one_that_would_be_late_has_the_batch_where_that_answers_more() -> None:
    clock = Clock()
    scheduler = taught(clock)
    _, large, _ = hurried(scheduler, clock, 1, 8, 1)
    assert scheduler.form() == [large]


def test_small_ones_that_would_be_late_fill_the_batch_in_front_of_a_large_one() -> None:
    clock = Clock()
    scheduler = taught(clock)
    waiting = hurried(scheduler, clock, 5, 4, 2, 1)
    assert scheduler.form() == [waiting[0], waiting[2], waiting[3]]


def test_those_for_whom_the_next_batch_is_early_enough_pass_nobody() -> None:
    clock = Clock()
    scheduler = taught(clock)
    waiting = hurried(scheduler, clock, 5, 4)
    patient = [waits(scheduler, 1, until) for until in (inf, clock.now + 2.5 * BATCH)]
    last = hurried(scheduler, clock, 1)
    assert scheduler.form() == [waiting[0], *last]
    assert scheduler.form() == patient


@pytest.mark.parametrize("deadline", [inf, 3.0])
def test_without_a_deadline_that_presses_order_is_kept(deadline: float) -> None:
    clock = Clock()
    scheduler = taught(clock)
    waiting = [waits(scheduler, rows, clock.now + deadline) for rows in (1, 8, 5, 4, 3, 1)]
    batches = [scheduler.form() for _ in range(4)]
    assert [rows_of(batch) for batch in batches] == [[1], [8], [5], [4, 3, 1]]
    assert [one for batch in batches for one in batch] == waiting


def test_nobody_is_passed_who_would_be_in_time_for_the_batch_after_a_short_one() -> None:
    clock = Clock()
    scheduler = taught(clock)
    for _ in range(15):
        scheduler.latency.ran(1, BATCH / 10, clock.now)
    small, large = hurried(scheduler, clock, 1, 8)
    assert scheduler.form() == [small]
    clock.now += BATCH / 10
    assert scheduler.form() == [large]


def test_whose_turn_it_is_has_it_after_some_better_batches() -> None:
    """So a small one is not passed for ever by large ones."""
    clock = Clock()
    scheduler = taught(clock)
    sizes = []
    for _ in range(70):
        hurried(scheduler, clock, 1, 8)
        sizes.append(sum(rows_of(scheduler.form())))
        clock.now += 2 * BATCH
        scheduler.ran(sizes[-1], BATCH)
    assert 7 <= sizes.count(1) <= 14
    assert max(len(list(same)) for rows, same in itertools.groupby(sizes) if rows == 8) <= 7


def test_a_lower_level_never_takes_the_place_of_a_higher_one() -> None:
    clock = Clock()
    scheduler = taught(clock, levels=2)
    hurried(scheduler, clock, 8, 2, priority=2)
    (high,) = hurried(scheduler, clock, 1, priority=1)
    batch = scheduler.form()
    assert batch[0] is high
    assert rows_of(batch) == [1, 2]


def test_one_of_other_shapes_is_passed_by_those_that_would_be_late() -> None:
    clock = Clock()
    scheduler = taught(clock)
    waiting = [waits(scheduler, 1, clock.now + 1.5 * BATCH, width=width) for width in (4, 5, 4, 4)]
    assert scheduler.form() == [waiting[0], *waiting[2:]]


@pytest.mark.parametrize("engines", [1, 2])
def test_who_would_be_late_for_what_follows_is_told_at_once(engines: int) -> None:
    clock = Clock()
    scheduler = taught(clock, engines=engines)
    *others, large = hurried(scheduler, clock, 1, 2, 8)
    assert scheduler.form() == [large]
    assert [expired(one) for one in others] == [engines == 1] * 2, "another engine is free for them"
    assert scheduler.form() == (others if engines == 2 else [])


def test_who_may_be_in_time_after_a_batch_waits() -> None:
    clock = Clock()
    scheduler = taught(clock)
    large, other = (waits(scheduler, 8, clock.now + 2.05 * BATCH) for _ in range(2))
    hurried(scheduler, clock, 1)
    assert scheduler.form() == [large]
    clock.now += BATCH
    scheduler.ran(8, BATCH)
    assert scheduler.form() == [other]


def test_an_engine_that_waits_for_the_delay_to_end_gives_nobody_up() -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        clock = Clock()
        scheduler = taught(clock, delay=10.0)
        waiting = hurried(scheduler, clock, 1, 8)
        assert await scheduler.due()
        assert not any(one.result.done() for one in waiting)
        assert scheduler.form() == [waiting[1]]
        assert expired(waiting[0])

    run(main(), loop)


def test_a_long_queue_is_not_gone_through_for_one_that_fits() -> None:
    looked = 0

    def waiting() -> Iterator[Entry]:
        nonlocal looked
        for rows in itertools.chain((5,), itertools.repeat(7, 10**5)):
            looked += 1
            entry = new(rows)
            entry.finish_by = entry.expires = 1.5 * BATCH
            yield entry

    chooser = Chooser(lambda now, rows: BATCH, lambda now, rows: Takes(BATCH, BATCH, BATCH))
    assert rows_of(chooser.choose(waiting(), 0.0, (8, 4, 2, 1)).batch) == [7]
    assert looked <= MOST_PASSED + 10


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0.5, 3.0), st.integers(1, 3)), min_size=1, max_size=30),
    st.integers(0, 9),
)
def test_a_batch_is_as_full_as_order_would_make_it_or_fuller_and_higher_levels_go_first(
    plan: list[tuple[int, float, int]], before: int
) -> None:
    clock = Clock()
    scheduler = taught(clock, levels=3)
    for _ in range(before):  # so that it is the turn of the first, or not
        hurried(scheduler, clock, 1, 8)
        scheduler.form()
        clock.now += 2 * BATCH
        scheduler.ran(8, BATCH)
    entries = [waits(scheduler, rows, clock.now + BATCH * s, priority) for rows, s, priority in plan]
    possible = sorted((e for e in entries if e.finish_by - clock.now >= BATCH), key=lambda e: e.priority)
    in_order: list[Entry] = []
    for entry in possible:
        if sum(rows_of(in_order)) + entry.rows > 8:
            break
        in_order.append(entry)
    batch = scheduler.form()
    assert set(batch) <= set(possible)
    assert sum(rows_of(in_order)) <= sum(rows_of(batch)) <= 8
    for level in (1, 2):
        above, kept = ([e for e in some if e.priority <= level] for some in (batch, in_order))
        assert sum(rows_of(above)) >= sum(rows_of(kept))
    assert [e.priority for e in batch] == sorted(e.priority for e in batch)
