"""How long batches take, as measured lately: what deadlines and admission are judged by."""

from __future__ import annotations

from collections import deque

_SAMPLES = 15
"""Batches of a class that are remembered."""

_STALE_S = 1.0
_STALE_BATCHES = 10


class _Class:
    """The batches of one class of sizes."""

    __slots__ = ("median", "ran_at", "seconds")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_SAMPLES)
        self.median = 0.0
        self.ran_at = 0.0


class BatchLatency:
    """The median of the last 15 batches of each class of sizes: 1, 2, 3 to 4, 5 to 8 rows and so on.

    The median takes no notice of the odd slow batch. What is known of a class is forgotten when none of its batches
    has run for a second, or for ten times as long as one takes where that is more. So an engine that was slow once
    and whose requests are refused for it is tried again, instead of being judged for ever by what it once was.

    Times are in seconds, `now` is the caller's clock.
    """

    __slots__ = ("_best", "_classes", "_forget_at", "_max_rows")

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max(max_rows, 1)
        self._classes: dict[int, _Class] = {}
        self._forget_at = float("inf")
        self._best: dict[int, float] = {}

    def ran(self, rows: int, seconds: float, now: float) -> None:
        """A batch of `rows` rows took `seconds`, and ended now."""
        index = (rows - 1).bit_length()
        one = self._classes.get(index)
        if one is None:
            self._classes[index] = one = _Class()
            self._classes = dict(sorted(self._classes.items()))
        one.seconds.append(seconds)
        one.median = sorted(one.seconds)[len(one.seconds) // 2]
        one.ran_at = now
        self._best.clear()
        self._forget_at = min(self._forget_at, _stale_at(one))

    def estimate(self, rows: int, now: float, least: int = 5) -> float:
        """Seconds that a batch of `rows` rows takes, or its next smaller size that is known; 0 where none is.

        A larger batch takes no less time than a smaller one, so this errs on the side of too little.

        Args:
            rows: Rows of the batch.
            now: The time.
            least: Batches that must have been measured for a class to count as known.
        """
        if now >= self._forget_at:
            self._forget(now)
        index = (rows - 1).bit_length()
        seconds = 0.0
        for known, one in self._classes.items():
            if known > index:
                break
            if len(one.seconds) >= least:
                seconds = one.median
        return seconds

    def rows_within(self, seconds: float, now: float, least: int = 5) -> int:
        """The rows of the largest batch that is not known to take longer than `seconds`; 0 where even one row does."""
        if now >= self._forget_at:
            self._forget(now)
        for known, one in self._classes.items():
            if len(one.seconds) >= least and one.median > seconds:
                return 1 << (known - 1) if known else 0
        return self._max_rows

    def per_row(self, now: float, least: int = 5) -> float:
        """Seconds a row in the batches that do best; 0 where nothing is known."""
        if now >= self._forget_at:
            self._forget(now)
        best = self._best.get(least)
        if best is None:
            known = ((i, one.median) for i, one in self._classes.items() if len(one.seconds) >= least)
            best = min((median / min(1 << i, self._max_rows) for i, median in known), default=0.0)
            self._best[least] = best
        return best

    def _forget(self, now: float) -> None:
        self._classes = {i: one for i, one in self._classes.items() if now < _stale_at(one)}
        self._best.clear()
        self._forget_at = min(map(_stale_at, self._classes.values()), default=float("inf"))


def _stale_at(one: _Class) -> float:
    return one.ran_at + max(_STALE_S, _STALE_BATCHES * one.median)
