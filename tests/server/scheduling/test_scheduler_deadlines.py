"""What the scheduler knows of latency, and what it does for deadlines with it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convoynet.server.errors import DeadlineExceeded, QueueFull
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.latency import BatchLatency, Takes
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy, QueuePolicy
from tests.server.scheduling.entries import Clock, expired, new, put, rows_of


def taught(max_rows: int, clock: Clock, seconds: dict[int, float], **policy: object) -> Scheduler:
    """A scheduler that has seen five batches of each size."""
    scheduler = Scheduler(BatchPolicy(max_rows, 0.0, 999, **policy), 1, clock)  # type: ignore[arg-type]
    for rows, takes in seconds.items():
        for _ in range(5):
            scheduler.ran(rows, takes)
    return scheduler


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


def test_the_first_that_was_measured_is_enough_to_choose_by_and_not_to_give_up() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(2, 0.0, 99), 1, clock)
    scheduler.ran(2, 0.5)
    first = put(scheduler, new(deadline=clock.now + 0.4))
    others = [put(scheduler, new(deadline=clock.now + 0.6)) for _ in range(2)]
    assert scheduler.form() == others, "those for whom it seems to be early enough"
    assert first.level is not None
    assert scheduler.form() == [first]


def test_another_engine_that_is_free_takes_what_a_full_batch_would_be_too_late_for() -> None:
    clock = Clock()
    for engines in (2, 1):
        scheduler = Scheduler(BatchPolicy(8, 0.0, 99), engines, clock)
        for rows, takes in ((1, 0.1), (2, 0.115), (4, 0.118), (8, 0.12)):
            for _ in range(5):
                scheduler.latency.ran(rows, takes, clock.now)
        hurried = put(scheduler, new(deadline=clock.now + 0.11))
        others = [put(scheduler, new()) for _ in range(8)]
        assert scheduler.form() == others
        assert expired(hurried) == (engines == 1)
        assert scheduler.form() == ([hurried] if engines == 2 else [])


def test_a_size_that_was_not_measured_is_not_believed_to_take_less() -> None:
    clock = Clock()
    scheduler = taught(4, clock, {4: 0.1})
    hurried = [put(scheduler, new(deadline=clock.now + 0.09)) for _ in range(2)]
    others = [put(scheduler, new(deadline=clock.now + 0.2)) for _ in range(3)]
    assert scheduler.form() == others
    assert all(expired(one) for one in hurried)
    hurried = [put(scheduler, new(deadline=clock.now + 0.19)) for _ in range(2)]
    clock.now += 0.1
    scheduler.ran(3, 0.1)
    assert scheduler.form() == hurried, "nobody knows that it takes longer, and there is nothing else to do"


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0.001, 0.6)), min_size=1, max_size=40),
    st.lists(st.floats(0.01, 0.5), min_size=4, max_size=4).map(sorted),
    st.sampled_from([(), (8,), (2, 8), (1, 3, 4), (1, 2)]),
    st.integers(1, 2),
)
@example([(1, 0.3), (2, 0.6)], [0.1, 0.1, 0.1, 0.5], (2, 8), 1)
@example([(5, 1 / 3)], [0.25, 0.25, 0.25, 1 / 3], (), 1)
@example([(3, 0.2)], [0.1, 0.1, 0.1, 0.5], (1, 2), 1)
def test_deadlines_are_kept_by_what_was_measured(
    plan: list[tuple[int, float]], measured: list[float], buckets: tuple[int, ...], levels: int
) -> None:
    """Whatever is taken is in time by the measured latency, and there is a batch where anything could be in time.

    Who would be in time for the batch after this one passes nobody of the same level who would be in time for this one.
    """
    clock = Clock()
    policy = BatchPolicy(8, 0.0, 99, buckets=buckets, levels=(QueuePolicy(99),) * levels)
    scheduler = Scheduler(policy, 1, clock)
    entries = []
    for number, (rows, slack) in enumerate(plan):
        entries.append(put(scheduler, new(rows, deadline=clock.now + slack, priority=1 + number % levels)))
    for rows, seconds in zip((1, 2, 4, 8), measured, strict=True):
        for _ in range(5):
            scheduler.latency.ran(rows, seconds, clock.now)

    def takes(rows: int) -> float:
        return measured[(scheduler.pad_to(rows) - 1).bit_length()]

    taken: list[Entry] = []
    while True:
        waiting = [e for e in entries if e.level is not None]
        batch = scheduler.form()
        assert bool(batch) == any(takes(e.rows) <= e.expires - clock.now for e in waiting)
        if not batch:
            break
        taken += batch
        lasts = takes(sum(rows_of(batch)))
        assert all(clock.now + lasts <= e.expires + 1e-9 for e in batch)
        for one in (e for e in waiting if e not in batch and takes(e.rows) <= e.expires - clock.now):
            later = entries[entries.index(one) :]
            passing = [e for e in batch if e.priority == one.priority and e in later]
            late = one.expires - clock.now < lasts
            assert late or all(e.expires <= clock.now + 2 * measured[-1] + 1e-9 for e in passing)
            if expired(one):
                assert one.expires - clock.now < lasts + takes(one.rows) + 1e-9, (
                    "it is given up only where it would be late"
                )
        clock.now += lasts
        scheduler.running.over(sum(rows_of(batch)))
    refused = [expired(e) for e in entries]  # a list, so that every exception is looked at
    assert refused == [e not in taken for e in entries]


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


def ran(scheduler: Scheduler, clock: Clock, rows: int, seconds: float) -> None:
    """A batch of other requests has taken that long."""
    scheduler.running.begin(rows, clock.now)
    clock.now += seconds
    scheduler.ran(rows, seconds)


def test_the_estimate_is_a_median_of_its_class() -> None:
    latency = BatchLatency(8)
    for seconds in (0.1, 0.1, 9.0, 0.1, 0.1, 9.0, 0.1):
        latency.ran(5, seconds, 0.0)
    assert latency.estimate(8, 0.0) == 0.1
    assert latency.estimate(4, 0.0) == 0
    latency.ran(1, 0.01, 0.0)
    assert latency.estimate(4, 0.0, least=1) == 0.01
    assert latency.known(8, 0.0) == Takes(0.1, 0.1, 9.0, 7), "the slowest tenth is slow"
    assert latency.known(4, 0.0) == Takes(0.0, 0.1, 0.0), "it is not known to take less than the larger ones"


def test_who_has_a_minute_is_not_refused_for_a_second_in_which_the_machine_stood_still() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(8, 0.0, 1000), clock=clock)
    for _ in range(60):
        ran(scheduler, clock, 8, 0.002)
    for _ in range(8):
        ran(scheduler, clock, 8, 0.5)
    waiting = [put(scheduler, new(8, deadline=clock.now + 60)) for _ in range(200)]
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(8, deadline=clock.now + 9))  # as many batches as were measured may take 0.5 s each
    for entry in waiting:
        scheduler.discard(entry)
    for _ in range(60):
        ran(scheduler, clock, 8, 0.5)
    for _ in range(96):
        put(scheduler, new(8, deadline=clock.now + 60))
    with pytest.raises(DeadlineExceeded):  # 96 batches of 0.5 s and a margin
        scheduler.admit(new(8, deadline=clock.now + 60))


@pytest.mark.parametrize(("before", "now", "refused"), [(0.5, 0.5, True), (0.002, 0.5, False), (0.5, 0.002, False)])
def test_what_was_usual_before_a_pause_counts_as_far_as_batches_take_as_long_again(
    before: float, now: float, *, refused: bool
) -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(8, 0.0, 1000), clock=clock)
    for _ in range(60):
        ran(scheduler, clock, 8, before)
    clock.now += 1000
    assert scheduler.predict(8) == 0
    for _ in range(5):
        ran(scheduler, clock, 8, now)
    for _ in range(90):
        put(scheduler, new(8, deadline=clock.now + 60))
    if refused:
        with pytest.raises(DeadlineExceeded):  # 90 batches of 0.5 s
            scheduler.admit(new(8, deadline=clock.now + 40))
    else:
        scheduler.admit(new(8, deadline=clock.now + 40))


def test_of_a_server_that_has_just_started_as_many_batches_are_known_as_have_run() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(8, 0.0, 1000), clock=clock)
    for _ in range(5):
        ran(scheduler, clock, 8, 0.5)
    for _ in range(200):
        put(scheduler, new(8, deadline=clock.now + 60))
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(8, deadline=clock.now + 3))
    assert scheduler.predict(8) == pytest.approx(100.5), "nobody is refused for that"


def test_a_padded_batch_takes_as_long_as_its_bucket() -> None:
    clock = Clock()
    scheduler = taught(8, clock, {8: 0.5}, buckets=(8,))
    with pytest.raises(DeadlineExceeded):
        scheduler.admit(new(1, deadline=clock.now + 0.4))


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
