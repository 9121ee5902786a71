"""How long batches take, as measured lately: what deadlines and admission are judged by."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

_SAMPLES = 15
"""Batches of a class that are remembered."""
_SLOW = 0.9
"""The part of them that took no longer than a slow one."""

_WINDOWS = 4
"""Times _SAMPLES batches in a row that show what is usual."""

_STALE_S = 1.0
_STALE_BATCHES = 10
_GONE = 30
"""How many times as long as until it is stale what was measured is still believed beside a larger class that is not."""


class _Class:
    """The batches of one class of sizes."""

    __slots__ = ("gone_at", "median", "medians", "ran", "seconds", "slow", "stale_at")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_SAMPLES)
        self.medians: deque[float] = deque(maxlen=_WINDOWS)
        self.ran = 0
        self.median = self.slow = 0.0
        self.stale_at = 0.0
        self.gone_at = inf

    def add(self, seconds: float) -> None:
        """A batch took so long."""
        self.seconds.append(seconds)
        ordered = sorted(self.seconds)
        self.median, self.slow = ordered[len(ordered) // 2], ordered[int(_SLOW * len(ordered))]
        self.ran += 1
        if self.ran % _SAMPLES == 0:
            self.medians.append(self.median)

    def clear(self) -> None:
        """How long one takes is not known any more. What was usual stays: it counts as far as new ones take no less."""
        self.seconds.clear()
        self.ran = 0

    @property
    def usual(self) -> float:
        """The least of the last medians of _SAMPLES batches each; 0 before there are enough of them."""
        return min(self.medians) if len(self.medians) == _WINDOWS else 0.0


class Takes(NamedTuple):
    """What is known of how long a batch of one class takes, in seconds.

    Attributes:
        least: The median; of the next smaller class that is known where this one is not, 0 where none is.
        most: The median; of the next larger class that is known where this one is not, `least` where none is.
        slow: The same as `least` of the slowest tenth.
        seen: The batches that `least` is the median of.
        usual: The least such median of a longer time; 0 where that is not known.
    """

    least: float
    most: float
    slow: float
    seen: int = 0
    usual: float = 0.0

    def in_a_row(self, batches: float) -> float:
        """Seconds that so many batches take one after the other, as far as that is known.

        As many as were slow may be slow again; of more than these nobody knows. So the rest is taken to be as usual: a
        machine that stood still for a second is no reason to refuse who has a minute.
        """
        lately = min(batches, self.seen)
        return lately * self.least + (batches - lately) * self.usual


class BatchLatency:
    """The last 15 batches of each class of sizes: 1, 2, 3 to 4, 5 to 8 rows and so on.

    Their median takes no notice of the odd slow batch. What is known of a class is stale when none of its batches has
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
        self._tables: dict[int, list[Takes]] = {}

    def ran(self, rows: int, seconds: float, now: float) -> None:
        """A batch of `rows` rows took `seconds`, and ended now."""
        one = self._classes[min(_index(rows), len(self._classes) - 1)]
        if now >= one.stale_at:
            one.clear()
        one.add(seconds)
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
        return self.known(rows, now, least).least

    def known(self, rows: int, now: float, least: int = 5) -> Takes:
        """All that is known of batches of `rows` rows."""
        if now >= self._forget_at:
            self._forget(now)
        table = self._tables.get(least)
        if table is None:
            table = self._tables[least] = self._table(now, least)
        return table[(rows - 1).bit_length()]

    def _table(self, now: float, least: int) -> list[Takes]:
        above: list[tuple[Takes, float]] = []
        larger = fresh = inf  # the median of the next larger class that is known, and of the next that is not stale
        for one in reversed(self._classes):
            takes = slow = inf
            if len(one.seconds) >= least:
                if now < one.stale_at:
                    takes = larger = fresh = one.median
                    slow = one.slow
                elif fresh < inf:
                    takes = slow = larger = min(one.median, fresh)
            above.append((Takes(takes, takes, slow, len(one.seconds), min(one.usual, takes)), larger))
        table, known = [], Takes(0.0, 0.0, 0.0)
        for own, larger in reversed(above):
            if own.least < inf:
                known = own
            table.append(known if own.least < inf or larger == inf else known._replace(most=larger))
        return table

    def _forget(self, now: float) -> None:
        """Takes note of what is stale by now, and of what is gone."""
        for one in self._classes:
            if one.seconds and now >= one.gone_at:
                one.clear()
        times = (at for one in self._classes if one.seconds for at in (one.stale_at, one.gone_at) if at > now)
        self._forget_at = min(times, default=inf)
        self._tables.clear()


def _index(rows: int) -> int:
    return (rows - 1).bit_length()
