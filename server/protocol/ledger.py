"""Where inference requests are counted: all of them, each once, when it is over, with the outcome its client saw."""

from __future__ import annotations

import asyncio
import time

from convoynet.server.errors import ServerError
from convoynet.server.models.model_table import ModelTable
from convoynet.server.observing.metrics import NO_MODEL, Metrics, why_rejected
from convoynet.server.types import Call, Counting, InferResult, Timings


class Ledger:
    """Told of every request by whoever ends it: the front end that wrote its answer, or saw its client go.

    A step of an ensemble is no request: the ensemble counts it to the step's model.
    """

    def __init__(self, models: ModelTable, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    def over(self, call: Call, name: str = "", version: str = "") -> None:
        """Counts a request; does nothing where it was counted.

        Args:
            call: What came of it.
            name: The model that it named, where it did not come so far that the model is in `call`.
            version: The same.
        """
        if call.counted:
            return
        call.counted = True
        served, code = call.served or self._named(name, version), call.code
        labels = NO_MODEL if served is None else served.labels
        late = code != "OK" and call.is_at_its_deadline
        if late and code == "CANCELLED":  # what the client's own timer told it
            code = "DEADLINE_EXCEEDED"
        self._metrics.requests.labels(*labels, call.protocol, code).inc()
        error: BaseException | None = None
        if code == "OK":
            seconds = (time.perf_counter_ns() - call.arrived) / 1e9
            self._metrics.request_duration.labels(*labels).observe(seconds)
        else:
            error = call.error or (asyncio.CancelledError() if call.code == "CANCELLED" else ServerError(code))
        if served is not None:
            result = call.result or InferResult("", "", {}, Timings(call.arrived))
            served.count(result.timings, result.rows, error, late=late)
            call.result = None  # who refuses an answer for its size may keep the call for a while
        elif error is not None and (reason := why_rejected(error, late=late)):
            self._metrics.rejected.labels(*labels, reason).inc()

    def _named(self, name: str, version: str) -> Counting | None:
        try:
            return self._models.model(name, version) if name else None
        except ServerError:
            return None
