"""Batch sizes that are padded to: which are worth it, and which one a batch gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.scheduling.buckets import candidates, choose_buckets, fitting, pad_to, profile_of
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy


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
    assert choose_buckets({1: 5, 4: 10, 5: 20, 8: 12, 10: 14}) == (1, 4, 8, 10)
    assert choose_buckets({1: 1, 2: 2, 4: 4, 8: 8}) == (1, 2, 4, 8)
    assert choose_buckets({1: 8, 2: 8, 8: 7}) == (8,)
    scheduler = Scheduler(BatchPolicy(8, 0.0, 8))
    assert scheduler.pad_to(5) == 5
    scheduler.use_buckets((4, 8))
    assert (scheduler.pad_to(3), scheduler.pad_to(5), scheduler.pad_to(9)) == (4, 8, 9)


@given(st.integers(1, 200), st.lists(st.integers(1, 200), min_size=3, max_size=3))
def test_candidates_are_near_every_size_and_lie_in_a_profile(most: int, sizes: list[int]) -> None:
    low, usual, high = sorted(sizes)
    profiles = [(1, 1, 1), (low, usual, max(high, most))]
    found = fitting(candidates(most, 16), profiles)
    assert found[-1] >= most
    for size in found:
        chosen = profiles[profile_of(size, profiles)]
        assert chosen[0] <= size <= chosen[2]
    for rows in range(low, most + 1):
        assert pad_to(rows, found) < 2 * max(rows, low) or rows == 1


def test_the_profile_with_the_smallest_largest_batch_is_taken() -> None:
    profiles = [(1, 8, 64), (1, 1, 1), (2, 4, 8)]
    assert [profile_of(rows, profiles) for rows in (1, 2, 8, 9, 64)] == [1, 2, 2, 0, 0]
    assert sorted(candidates(32, 16)) == [1, 2, 4, 8, 16, 24, 32]
    assert sorted(candidates(11, 2)) == [1, 2, 3, 4, 6, 8, 11]
    assert fitting([1, 5, 9], [(4, 4, 8), (12, 12, 16)]) == (4, 5, 12)
    with pytest.raises(ValueError, match="empty"):
        fitting([17], [(4, 4, 8), (12, 12, 16)])
