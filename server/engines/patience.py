"""How long an engine may take for a batch before it is held for hung."""

from __future__ import annotations

from collections import deque

from convoynet.server.spec import Limits

TICK_SECONDS = 0.5
"""Between two looks at what an engine is doing."""
PING_SECONDS = 5.0
"""What an engine without work may take to say that it is there."""
_LEAST_SECONDS = 5.0
"""No batch is given up sooner: a busy machine makes a batch of a millisecond take a second."""
_FACTOR = 20.0
_RECENT, _ODD = 32, 8
"""Batches of a size that are remembered, and of how many one may be slow for no reason of its own."""
_LEAST_LOAD_SECONDS = 30.0


class Patience:
    """Far longer than measured: 20 times what slow batches of this size and more have lately taken, at least 5 s.

    The last 32 of a size count, but for the slowest eighth of them. Sizes are bytes of inputs, by powers of two. A
    batch larger than any before it has all of the time that a batch may have, and so has every one where the model's
    config states that time itself.

    Attributes:
        load_s: Seconds that loading and warming up may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._most = limits.run_s
        self._measured = limits.measured
        self._recent: dict[int, deque[float]] = {}
        self.load_s = limits.load_s

    def loaded(self, seconds: float) -> None:
        """Loading and warming up took so long: the next time it may take 20 times as long, and at least 30 s."""
        self.load_s = min(self.load_s, max(_LEAST_LOAD_SECONDS, _FACTOR * seconds))

    def took(self, size: int, seconds: float) -> None:
        """A batch of so many bytes of inputs took so long."""
        recent = self._recent.get(size.bit_length())
        if recent is None:
            recent = self._recent[size.bit_length()] = deque(maxlen=_RECENT)
        recent.append(seconds)

    def of(self, size: int) -> float:
        """Seconds that a batch of so many bytes may take."""
        found = [sorted(recent) for index, recent in self._recent.items() if index >= size.bit_length()]
        known = [slowest[-1 - len(slowest) // _ODD] for slowest in found]
        if not known or not self._measured:
            return self._most
        return min(self._most, max(_LEAST_SECONDS, _FACTOR * max(known)))
