"""How fast a model may be asked, so that those who wait for its answers notice little of it."""

from __future__ import annotations

BATCH_SECONDS = 0.05
"""The longest that a request of several pictures may take, with a server that has nothing else to do."""
SHARE = 0.005
"""Of the time, what masks may take beside others' requests. So few of these meet a mask that the slowest hundredth is
hardly another: by simulation less than a tenth longer from a fiftieth of the engine's load on."""
_IN_FLIGHT = 2


class Pace:
    """Large requests, one of which is always ready, while nobody else asks the server; else single ones, with pauses.

    An engine does not stop for a more urgent request: that one waits for what runs. So where others ask, what runs is
    short, and mostly nothing of ours does.

    Args:
        most_rows: pictures in a request.
        share: of the time, beside others.
    """

    def __init__(self, most_rows: int, share: float = SHARE) -> None:
        self._most_rows, self._share = most_rows, share
        self._rows, self._alone = 1, False

    @property
    def rows(self) -> int:
        """Pictures in the next request."""
        return self._rows

    @property
    def in_flight(self) -> int:
        """Requests that may be on their way at once."""
        return _IN_FLIGHT if self._alone else 1

    def answered(self, rows: int, seconds: float) -> float:
        """Note how long a request took, from the answer before it on; returns the seconds to wait before the next."""
        if not self._alone:
            return seconds * (1 / self._share - 1)
        if seconds > BATCH_SECONDS:
            self._rows = max(1, rows // 2)
        elif seconds < BATCH_SECONDS / 2 and rows == self._rows:
            self._rows = min(2 * rows, self._most_rows)
        return 0.0

    def beside(self, others: bool) -> None:
        """Note whether others ask the server too."""
        if others and self._alone:
            self._rows = 1
        self._alone = not others


class Others:
    """Whether a server answers requests of others, by its count of all that it has answered.

    It may count one of ours a moment after its answer has come: only a count that is higher than ever is others' work.
    """

    def __init__(self) -> None:
        self._total: int | None = None
        self._most = 0

    def seen(self, total: int, own: int) -> bool:
        """Whether there were any since the last time.

        Args:
            total: requests that the server has answered.
            own: those of them that were ours.
        """
        known, self._total = self._total, total
        if known is None or total < known:  # the first time, or a model and its count went away
            self._most = total - own
            return False
        more = total - own > self._most
        self._most = max(self._most, total - own)
        return more
