"""How long batches take, as measured lately: what deadlines and admission are judged by."""

from __future__ import annotations

from collections import deque
from math import inf

_SAMPLES = 15
"""Batches of a class that are remembered."""

_STALE_S = 1.0
_STALE_BATCHES = 10
_GONE = 30
"""How many times as long as until it is stale what was measured is still believed beside a larger class that is not."""


class _Class:
    """The batches of one class of sizes."""

    __slots__ = ("gone_at", "median", "seconds", "stale_at")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_SAMPLES)
        self.median = 0.0
        self.stale_at = 0.0
        self.gone_at = inf


class BatchLatency:
    """The median of the last 15 batches of each class of sizes: 1, 2, 3 to 4, 5 to 8 rows and so on.

    The median takes no notice of the odd slow batch. What is known of a class is stale when none of its batches has
    run for a second, or for ten times as long as one takes where that is more. So an engine that was slow once and
    whose requests are refused for it is tried again, instead of being judged for ever by what it once was.

    Under load there are large batches alone. What is stale of a smaller class counts on beside them, for thirty times
    as long, as far as they take no less: else every request that presses would be given a batch of its own, which
    nobody knows to take as long.

    Times are in seconds, `now` is the caller's clock.
    """

    __slots__ = ("_classes", "_forget_at", "_max_rows", "_tables")

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max(max_rows, 1)
        self._classes = [_Class() for _ in range(_index(self._max_rows) + 1)]
        self._forget_at = inf
        self._tables: dict[int, list[float]] = {}

    def ran(self, rows: int, seconds: float, now: float) -> None:
        """A batch of `rows` rows took `seconds`, and ended now."""
        one = self._classes[min(_index(rows), len(self._classes) - 1)]
        if now >= one.stale_at:
            one.seconds.clear()
        one.seconds.append(seconds)
        one.median = sorted(one.seconds)[len(one.seconds) // 2]
        fresh = max(_STALE_S, _STALE_BATCHES * one.median)
        one.stale_at, one.gone_at = now + fresh, now + _GONE * fresh
        self._forget_at = min(self._forget_at, one.stale_at)
        self._tables.clear()

    def estimate(self, rows: int, now: float, least: int = 5) -> float:
        """Seconds that a batch of `rows` rows takes, or its next smaller size that is known; 0 where none is.

        A larger batch takes no less time than a smaller one, so this errs on the side of too little.

        Args:
            rows: Rows of the batch, max_rows at most.
            now: The time.
            least: Batches that must have been measured for a class to count as known.
        """
        return self._table(now, least)[(rows - 1).bit_length()]

    def rows_within(self, seconds: float, now: float, least: int = 5) -> int:
        """The rows of the largest batch that is not known to take longer than `seconds`; 0 where even one row does."""
        for index, known in enumerate(self._table(now, least)):
            if known > seconds:
                return 1 << (index - 1) if index else 0
        return self._max_rows

    def measured_rows(self, now: float, least: int = 5) -> int:
        """The rows of the largest class that is known; 0 where none is."""
        known = [1 << i for i, c in enumerate(self._classes) if len(c.seconds) >= least and now < c.stale_at]
        return max(known, default=0)

    def _table(self, now: float, least: int) -> list[float]:
        """The estimate for each class."""
        if now >= self._forget_at:
            self._forget(now)
        table = self._tables.get(least)
        if table is None:
            table, seconds, larger = [], 0.0, inf
            known: list[float | None] = []
            for one in reversed(self._classes):
                fresh = now < one.stale_at
                usable = len(one.seconds) >= least and (fresh or larger < inf)
                known.append(min(one.median, inf if fresh else larger) if usable else None)
                if usable and fresh:
                    larger = one.median
            for measured in reversed(known):
                seconds = seconds if measured is None else measured
                table.append(seconds)
            self._tables[least] = table
        return table

    def _forget(self, now: float) -> None:
        """Takes note of what is stale by now, and of what is gone."""
        for one in self._classes:
            if one.seconds and now >= one.gone_at:
                one.seconds.clear()
        times = (at for one in self._classes if one.seconds for at in (one.stale_at, one.gone_at) if at > now)
        self._forget_at = min(times, default=inf)
        self._tables.clear()


def _index(rows: int) -> int:
    return (rows - 1).bit_length()
