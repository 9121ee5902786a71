"""The queue between the event loop, which puts requests in, and the engine threads, which take batches out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.errors import Draining, QueueFull
from server.spec import BatchPolicy
from server.types import Tensor, Timings


@dataclass(eq=False, slots=True)
class Entry:
    """One request in the queue: it owns the place where its answer goes and its own times.

    Attributes:
        inputs: Tensors by input name, `rows` rows each.
        rows: Rows along the batch axis.
        result: Set on the event loop, to the output tensors by name, and only while it is not done: a client that
            went away has it cancelled.
        timings: When it passed each stage.
        outputs: Names of the outputs that it asks for; empty for all.
        shapes: Of one row of each input; only entries of the same shapes share a batch.
    """

    inputs: Mapping[str, Tensor]
    rows: int
    result: asyncio.Future[dict[str, Tensor]]
    timings: Timings
    outputs: frozenset[str] = frozenset()
    shapes: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = tuple(t.shape[1:] for t in self.inputs.values())


class BatchQueue:
    """A bounded queue of entries that gives out batches. Safe to use from any thread; only take() waits.

    A place is reserved before any work is spent on a request (an image to decode, say), so the bound counts
    what was admitted and has not begun to run.
    """

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._entries: deque[Entry] = deque()
        self._reserved = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())

    def __len__(self) -> int:
        """The number of requests that were admitted and have not begun to run."""
        return len(self._entries) + self._reserved

    def reserve(self) -> None:
        """Takes a place in the queue, to be used by put() or given back by release().

        Raises:
            QueueFull: Every place is taken.
            Draining: The queue is closed.
        """
        with self._changed:
            if self._closed:
                raise Draining
            if len(self) >= self._policy.max_queue:
                raise QueueFull
            self._reserved += 1

    def release(self) -> None:
        """Gives a reserved place back unused."""
        with self._changed:
            self._reserved -= 1
            self._changed.notify_all()

    def put(self, entry: Entry) -> None:
        """Uses a reserved place. Never waits."""
        entry.timings.queued = time.perf_counter_ns()
        with self._changed:
            self._reserved -= 1
            self._entries.append(entry)
            self._changed.notify()

    def discard(self, entry: Entry) -> None:
        """Takes an entry out that nobody waits for any more; does nothing where it is already running."""
        with self._changed:
            if entry in self._entries:
                self._entries.remove(entry)

    def close(self) -> None:
        """Admits nothing more; what was admitted is still given out, then take() returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[Entry] | None:
        """Waits for entries and takes a batch of them: at most max_rows rows of one shape, oldest first.

        The batch is formed when the engine is free to run it: at once where no delay is configured, else when it
        is full or its oldest entry has waited for the delay. Entries that nobody waits for are left out.

        Returns:
            The batch, or None when the queue is closed and everything in it was given out.
        """
        with self._changed:
            while True:
                while not self._entries:
                    if self._closed and not self._reserved:
                        return None
                    self._changed.wait()
                self._wait_for_more()
                batch = self._pop_batch()
                if batch:
                    return batch

    def _wait_for_more(self) -> None:
        """Waits until the batch is full, the oldest entry has waited long enough, or the queue is closed."""
        while self._entries and not self._closed:
            waited = (time.perf_counter_ns() - self._entries[0].timings.queued) / 1e9
            if waited >= self._policy.max_delay_s:
                return
            if sum(e.rows for e in self._entries) >= self._policy.max_rows:
                return
            self._changed.wait(self._policy.max_delay_s - waited)

    def _pop_batch(self) -> list[Entry]:
        batch: list[Entry] = []
        rows = 0
        while self._entries:
            entry = self._entries[0]
            if entry.result.done():
                self._entries.popleft()
                continue
            if batch and (rows + entry.rows > self._policy.max_rows or entry.shapes != batch[0].shapes):
                break
            batch.append(self._entries.popleft())
            rows += entry.rows
        return batch
