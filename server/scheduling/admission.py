"""How many requests a model takes at once so that those it takes are answered within the latency objective."""

from __future__ import annotations

from convoynet.server.errors import QueueFull

_QUANTILE = 0.95
_AIM = 0.85
"""The part of the objective at which the quantile is held: the room between it and the slowest of a hundred."""

_SAMPLES = 64
_WINDOW_S = 1.0
_LEAST, _MOST = 0.5, 1.5
"""How much smaller than what was in flight the limit may become in one step, and how much larger than it was."""

_BINDING = 0.8
"""The part of the limit that must have been reached for it to grow."""


class Limiter:
    """A concurrency limit that follows the measured latency, with a prediction for what has not been measured yet.

    By Little's law (Little 1961) a server that has all it can do answers after inflight / throughput. So from an
    answer to a request that found n others in flight and took t seconds, n * objective / t is the limit that keeps the
    objective: a gradient step, as in Netflix's concurrency-limits (Gradient2Limit, 2018), but of a high quantile
    towards a target, which Welsh and Culler (USITS 2003, "Adaptive Overload Control for Busy Internet Servers") control
    by admission. Since n is that of the request itself, answers to what was admitted before the last step say the same
    as later ones, and need not be waited out. One step is taken for 64 answers, or each second. The limit grows by a
    half at most, and only where it was nearly reached, so that it does not grow without end while nothing tests it.

    Feedback is one latency late: the first burst after a quiet time would pass before it is measured. So a request
    whose predicted answer (Scheduler.predict: what waits before it, at the measured pace) is later than the objective
    is refused as well, as Clockwork does (Gujarati and others, OSDI 2020).

    One request is always let in where none is in flight: an objective that cannot be kept slows a model down to one
    request at a time, but never stops it, and shows when the engine is fast again.

    Attributes:
        limit: The most requests in flight now.
    """

    __slots__ = ("_aim", "_began", "_binding", "_maximum", "_samples", "limit")

    def __init__(self, objective_s: float, maximum: int) -> None:
        """Args: the latency to keep, in seconds, and the most requests in flight whatever the latency."""
        self.limit = float(maximum)
        self._maximum = float(maximum)
        self._aim = objective_s * _AIM
        self._samples: list[tuple[float, int]] = []
        self._began = 0.0
        self._binding = False

    def admit(self, inflight: int, predicted_s: float = 0.0) -> None:
        """Lets a request in while `inflight` others are being worked on, queued ones included.

        Args:
            inflight: Requests of the model that were admitted and not answered.
            predicted_s: Seconds until this one would be answered, 0 where that is unknown.

        Raises:
            QueueFull: It would not be answered in time, or make others late.
        """
        if inflight >= self.limit * _BINDING:
            self._binding = True
        if inflight and (inflight >= self.limit or predicted_s > self._aim):
            raise QueueFull(predicted_s)

    def observe(self, inflight: int, latency_s: float, now: float) -> None:
        """Learns from an answer that was given now.

        Args:
            inflight: What admit() was told when its request was admitted.
            latency_s: Seconds since then.
            now: The time, in seconds.
        """
        samples = self._samples
        if not samples:
            self._began = now
        samples.append((latency_s, inflight))
        if len(samples) >= _SAMPLES or now - self._began >= _WINDOW_S:
            self._step()

    def _step(self) -> None:
        samples = sorted(self._samples)
        slow, inflight = samples[int(_QUANTILE * len(samples))]
        target = (inflight + 1) * max(self._aim / max(slow, 1e-9), _LEAST)
        if target < self.limit and slow > self._aim:
            self.limit = max(target, 1.0)
        elif slow <= self._aim and self._binding:
            self.limit = min(max(target, self.limit), self.limit * _MOST, self._maximum)
        self._samples = []
        self._binding = False
