"""How long a request spent in each stage, for replies that ask for it, logs and traces."""

from __future__ import annotations

import time
from collections.abc import Iterator

from convoynet.server.types import Timings

PARAMETER = "convoy_timings"
"""The request parameter (bool) that asks for the times in the reply."""


def intervals(timings: Timings, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each stage of a request that was answered, in nanoseconds of time.perf_counter_ns().

    `end` is when its answer was ready. Decoding has what comes before the queue, the checks included.
    """
    edges = (timings.arrived, timings.queued, timings.started, timings.input_ready, timings.infer_done, end)
    names = ("decode", "queue", "compute_input", "compute_infer", "compute_output")
    return zip(names, edges[:-1], edges[1:], strict=True)


def stages(timings: Timings, end: int) -> dict[str, int]:
    """Nanoseconds by stage."""
    return {name: until - since for name, since, until in intervals(timings, end)}


def reply_parameters(timings: Timings) -> dict[str, int]:
    """Response parameters in microseconds, such as `convoy_queue_us`, as of now."""
    spent = stages(timings, time.perf_counter_ns())
    return {f"convoy_{name}_us": ns // 1000 for name, ns in spent.items()}
