"""Batch buckets: the row counts that an engine is run at, and to which smaller batches are padded up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

_GAIN = 0.05
"""The part of its time that a batch must save by padding; less is within the noise of a measurement."""


def pad_to(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest of `buckets` (ascending) that holds `rows`; `rows` itself where none does."""
    index = bisect_left(buckets, rows)
    return buckets[index] if index < len(buckets) else rows


def choose_buckets(latency: Mapping[int, float]) -> tuple[int, ...]:
    """The buckets for which padding up pays.

    A size is padded where a larger one was measured to be faster by 5 % at least. A size that was not measured is
    padded where it lies next to one that is padded, else it is taken to run best as it is.

    Args:
        latency: Measured seconds of a batch, by its rows.

    Returns:
        The buckets, ascending: every size up to the largest measured one that runs best as it is; empty where all do.
    """
    sizes = sorted(latency)
    kept: set[int] = set()
    fastest = float("inf")
    for size in reversed(sizes):
        if latency[size] * (1 - _GAIN) <= fastest:
            kept.add(size)
        fastest = min(fastest, latency[size])
    if len(kept) == len(sizes):
        return ()
    for low, high in pairwise(sizes):
        if low in kept and high in kept:
            kept.update(range(low + 1, high))
    return tuple(sorted(kept))
