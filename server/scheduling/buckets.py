"""Batch buckets: the row counts that an engine is run at, and to which smaller batches are padded up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

Profile = tuple[int, int, int]
"""The smallest, usual and largest batch of an optimization profile of TensorRT."""
_GAIN = 0.05
"""The part of its time that a batch must save by padding; less is within the noise of a measurement."""


def pad_to(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest of `buckets` (ascending) that holds `rows`; `rows` itself where none does."""
    index = bisect_left(buckets, rows)
    return buckets[index] if index < len(buckets) else rows


def choose_buckets(latency: Mapping[int, float]) -> tuple[int, ...]:
    """The sizes that are worth running as they are: no larger one was measured to be faster by 5 % at least.

    Args:
        latency: Measured seconds of a batch, by its rows.

    Returns:
        Some of these sizes, ascending, the largest among them.
    """
    kept: list[int] = []
    fastest = float("inf")
    for size in sorted(latency, reverse=True):
        if latency[size] * (1 - _GAIN) <= fastest:
            kept.append(size)
        fastest = min(fastest, latency[size])
    return tuple(reversed(kept))


def fitting(sizes: Iterable[int], profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The smallest sizes that hold `sizes` and that a profile takes, ascending.

    Raises:
        ValueError: No profile takes so many rows.
    """
    return tuple(sorted({min(max(size, low) for low, _, high in profiles if size <= high) for size in sizes}))


def candidates(most: int, fine: int) -> set[int]:
    """Batch sizes of which a batch of any size up to `most` is near to one: each at most twice the one before.

    Args:
        most: The most rows in a batch.
        fine: From so many rows on also sizes between two powers of two: the rows that fill a batch up cost more there.
    """
    powers = [1 << power for power in range(most.bit_length())]
    return {size for size in (*powers, *(3 * p // 2 for p in powers if p >= fine), most) if size <= most}


def profile_of(rows: int, profiles: Sequence[Profile]) -> int:
    """The index of the profile for batches of `rows`: the one with the smallest largest batch of those that take it."""
    return min((high, index) for index, (low, _, high) in enumerate(profiles) if low <= rows <= high)[1]
