"""What an engine leaves of a batch to others that are free."""

from __future__ import annotations

import pytest

from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy
from tests.server.scheduling.entries import Clock, new, put, rows_of


def waiting(rows: list[int], engines: int, per_row: float, preferred: tuple[int, ...] = ()) -> tuple[Scheduler, Clock]:
    """A scheduler of 32 rows in which requests of these rows wait; a batch takes 1 s, and so much for each row."""
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(32, 0.0, 999, preferred=preferred), engines, clock)
    for size in (1, 2, 4, 8, 16, 32):
        scheduler.latency.ran(size, 1.0 + per_row * size, clock.now)
    for one in rows:
        put(scheduler, new(one))
    return scheduler, clock


@pytest.mark.parametrize(
    ("rows", "engines", "batches"),
    [
        ([1] * 32, 2, [16, 16]),
        ([1] * 8, 2, [4, 4]),
        ([1] * 7, 2, [4, 3]),
        ([1] * 9, 4, [3, 2, 2, 2]),
        ([1] * 40, 2, [32, 8]),  # what 20 take is not told from what 32 take
        ([1] * 80, 2, [32, 32]),
        ([1], 2, [1]),
        ([16, 1, 1], 2, [16, 2]),
        ([1] * 8, 1, [8]),
    ],
)
def test_free_engines_share_what_waits(rows: list[int], engines: int, batches: list[int]) -> None:
    scheduler, _ = waiting(rows, engines, per_row=10.0)
    assert [sum(rows_of(scheduler.form())) for _ in batches] == batches


def test_nothing_is_left_to_an_engine_that_is_busy() -> None:
    scheduler, _ = waiting([1] * 8, 2, per_row=10.0)
    scheduler.form()
    scheduler.form()
    scheduler.ran(4, 1.0)
    for _ in range(8):
        put(scheduler, new(1))
    assert sum(rows_of(scheduler.form())) == 8


def test_a_batch_whose_parts_would_take_as_long_is_not_shared() -> None:
    scheduler, _ = waiting([1] * 32, 2, per_row=0.0)
    assert sum(rows_of(scheduler.form())) == 32


def test_a_part_that_was_never_measured_is_tried() -> None:
    clock = Clock()
    scheduler = Scheduler(BatchPolicy(32, 0.0, 999), 2, clock)
    scheduler.latency.ran(32, 1.0, clock.now)
    for _ in range(32):
        put(scheduler, new(1))
    assert sum(rows_of(scheduler.form())) == 16


def test_sizes_that_are_preferred_are_not_cut() -> None:
    scheduler, _ = waiting([1] * 9, 2, per_row=10.0, preferred=(8,))
    assert sum(rows_of(scheduler.form())) == 8
