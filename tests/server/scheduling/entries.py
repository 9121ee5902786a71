"""Entries for a scheduler that stands by itself, and a clock for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from convoynet.server.errors import DeadlineExceeded
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.types import Tensor, Timings

LOOP = asyncio.new_event_loop()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new(rows: int = 1, loop: asyncio.AbstractEventLoop = LOOP, **fields: float) -> Entry:
    """An entry of `rows` rows, a byte each."""
    result: asyncio.Future[dict[str, Tensor]] = asyncio.Future(loop=loop)
    return Entry(rows, rows, result, Timings(), **fields)  # type: ignore[arg-type]


def put(scheduler: Scheduler, entry: Entry, width: int = 4) -> Entry:
    """Admits and queues an entry."""
    scheduler.admit(entry)
    scheduler.put(entry, {"x": np.zeros((entry.rows, width), np.float32)})
    return entry


def rows_of(batch: Iterable[Entry]) -> list[int]:
    return [entry.rows for entry in batch]


def expired(entry: Entry) -> bool:
    return entry.result.done() and isinstance(entry.result.exception(), DeadlineExceeded)
