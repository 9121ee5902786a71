"""How long an engine may take for a batch before it is held for hung."""

from __future__ import annotations

from convoynet.server.spec import Limits

TICK_SECONDS = 0.5
"""Between two looks at what an engine is doing."""
PING_SECONDS = 5.0
"""What an engine without work may take to say that it is there."""
_LEAST_SECONDS = 5.0
"""No batch is given up sooner: a busy machine makes a batch of a millisecond take a second."""
_FACTOR = 20.0
_FORGET = 0.99
_LEAST_LOAD_SECONDS = 30.0


class Patience:
    """Far longer than measured: 20 times what the slowest batch of at least this size has lately taken, at least 5 s.

    Sizes are bytes of inputs, by powers of two. A batch larger than any before it has all of the time that a batch may
    have, and so has every one where the model's config states that time itself.

    Attributes:
        load_s: Seconds that loading and warming up may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._most = limits.run_s
        self._measured = limits.measured
        self._slowest: dict[int, float] = {}
        self.load_s = limits.load_s

    def loaded(self, seconds: float) -> None:
        """Loading and warming up took so long: the next time it may take 20 times as long, and at least 30 s."""
        self.load_s = min(self.load_s, max(_LEAST_LOAD_SECONDS, _FACTOR * seconds))

    def took(self, size: int, seconds: float) -> None:
        """A batch of so many bytes of inputs took so long."""
        index = size.bit_length()
        before = self._slowest.get(index, 0.0) * _FORGET
        self._slowest[index] = seconds if seconds > before else before

    def of(self, size: int) -> float:
        """Seconds that a batch of so many bytes may take."""
        known = [seconds for index, seconds in self._slowest.items() if index >= size.bit_length()]
        if not known or not self._measured:
            return self._most
        return min(self._most, max(_LEAST_SECONDS, _FACTOR * max(known)))
