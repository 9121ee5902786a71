"""The running totals of one served model, as the protocol's ModelStatistics reports them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

from convoynet.server.errors import DeadlineExceeded, Draining, EngineFailed, QueueFull
from convoynet.server.types import Timings

_FAILURES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((asyncio.CancelledError,), "CANCELED"),
    ((QueueFull, Draining, DeadlineExceeded), "REJECTED"),
    ((EngineFailed,), "BACKEND"),
)
"""Triton's kinds of failed requests; every other error is OTHER."""


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Adds `count` events that took `ns` nanoseconds together."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchTotals:
    """Of the batches of one size."""

    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Statistics:
    """Touched on the event loop alone. The stages count successful requests only.

    As in Triton, what the response cache answered counts as success and in the queue, not among the inferences and not
    in the stages of computing.
    """

    last_inference_ms: int = 0
    inferences: int = 0
    executions: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Failed requests by kind: REJECTED, CANCELED, BACKEND or OTHER."""
    batches: dict[int, BatchTotals] = field(default_factory=lambda: defaultdict(BatchTotals))

    def add_success(self, timings: Timings, rows: int) -> None:
        """One request was answered now."""
        now = time.perf_counter_ns()
        self.last_inference_ms = time.time_ns() // 1_000_000
        # Not by add(): calls of Python would take half of the time.
        success, queue = self.success, self.queue
        success.count += 1
        success.ns += now - timings.arrived
        queue.count += 1
        queue.ns += timings.started - timings.queued
        if timings.hit:
            self.cache_hit.add(timings.looked_up)
            return
        self.inferences += rows
        ready, done = timings.input_ready, timings.infer_done
        part = self.input
        part.count += 1
        part.ns += ready - timings.started
        part = self.infer
        part.count += 1
        part.ns += done - ready
        part = self.output
        part.count += 1
        part.ns += now - done

    def add_failure(self, timings: Timings, error: BaseException) -> None:
        """One request failed now, by this error."""
        self.fail.add(time.perf_counter_ns() - timings.arrived)
        self.failures[next((kind for types, kind in _FAILURES if isinstance(error, types)), "OTHER")] += 1

    def add_batch(self, rows: int, timings: Timings) -> None:
        """One batch ran."""
        self.executions += 1
        totals = self.batches[rows]
        totals.input.add(timings.input_ready - timings.started)
        totals.infer.add(timings.infer_done - timings.input_ready)
        totals.output.add(time.perf_counter_ns() - timings.infer_done)
