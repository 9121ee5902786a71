"""How many bytes the server holds for its callers at once, whatever the protocol: `--max-inflight-bytes`."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from convoynet.server.errors import OverBudget
from convoynet.server.memory.allocator import give_free_memory_back

SLACK_BYTES = 128 * 2**20
"""What a process may grow by beside its budget: interpreters, caches, and pieces that its allocator keeps."""
SMALL_BYTES = 64 * 2**10
"""Answers that are smaller are not counted while they are written: gRPC bounds the calls of a connection."""
_FOR_SMALL = 16
"""This part of the limit is for what is smaller than SMALL_BYTES: parts of large messages would fill it to the last
byte, and a small one that comes then be refused."""
_LOOK_SECONDS = 0.005
_TRIM_SECONDS = 1.0
_QUIET_SECONDS = 1.0
"""How long nothing must have been read before what the process takes then is taken for no request's."""
_TIDY_SECONDS = 5.0
_PIECES = 16 * 2**20
"""What the process may have grown by at such a time before free memory is given back first."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Budget:
    """An account of requests that came, what they were decoded to, and answers that are being written.

    What came whole is counted to the byte. A message that gRPC is still reading cannot be: its size is not known
    before its end. For those the process's own memory is looked at, which may grow by twice the limit.

    Any thread may take and give.

    Attributes:
        limit: The most bytes that are held at once.
        refused: Called at every refusal, to count it.
        reading: Messages that are being read, of which nobody knows how large they will be.

    Args:
        limit, refused: See there.
        resident: Bytes of memory that the process has now; 0 where nothing tells.
        other: Bytes that the process may grow by for what is no request: the response cache.
    """

    def __init__(
        self,
        limit: int = 2**63,
        refused: Callable[[], None] = lambda: None,
        resident: Callable[[], int] | None = None,
        other: int = 0,
    ) -> None:
        self.limit = limit
        self.refused = refused
        self._resident = resident or resident_bytes
        self._other = other
        self.reading = 0
        self._held = 0
        self._lock = threading.Lock()
        self._looked = self._trimmed = 0.0
        self._read = -inf
        """When a read was last let begin, or go on."""
        self._idle = self._resident()
        self._now = self._idle

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    def take(self, size: int, whole: int = 0) -> None:
        """Counts bytes that are about to be held, or are already; `whole` is the size of what they are a part of.

        Raises:
            OverBudget: There would be too many. Nothing was counted.
        """
        most = self._most(max(size, whole))
        with self._lock:
            held = self._held + size
            if held <= most:
                self._held = held
                return
        self.refused()
        raise OverBudget(size, held - size, most)

    def fits(self, size: int, whole: int = 0) -> bool:
        """Whether take() would count so many bytes now."""
        return self._held + size <= self._most(max(size, whole))

    def _most(self, whole: int) -> int:
        return self.limit if whole < SMALL_BYTES else self.limit - self.limit // _FOR_SMALL

    def give(self, size: int) -> None:
        """Counts bytes off that take() counted."""
        with self._lock:
            self._held -= size

    @contextmanager
    def holding(self, size: int, whole: int = 0) -> Iterator[None]:
        """take() and give() around a block."""
        self.take(size, whole)
        try:
            yield
        finally:
            self.give(size)

    def check_process(self) -> None:
        """Refuses where the process has grown by more than it may since it last was quiet.

        It may grow by twice the limit and SLACK_BYTES. Half of that is for what is on its way when this is found.
        Called before a message is read, and again and again while one is.

        Raises:
            OverBudget: It has.
        """
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked, self._now = now, self._resident()
            if not self.reading and now - self._read >= _QUIET_SECONDS:
                self._settle(now)
        grown = self._now - self._idle
        if grown > self.limit and now - self._trimmed >= _TRIM_SECONDS:
            self._trim(now)
            grown = self._now - self._idle
        if grown > self.limit + SLACK_BYTES // 4 + self._other:
            self.refused()
            raise OverBudget(0, grown, self.limit)
        self._read = now

    async def keep_tidy(self) -> None:
        """Now and then, while nothing is held, gives the system what the process does not use any more."""
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            now = time.monotonic()
            if not self._held and now - self._read >= _QUIET_SECONDS:
                self._looked, self._now = now, self._resident()
                if not self.reading:
                    self._settle(now)

    def _settle(self, now: float) -> None:
        """What the process keeps although it has read nothing for a while is no request's: models, caches.

        Not at once when nothing is read any more: what was given up is still on its way out then, and taken for the
        process's own it would let the next ones take as much again.
        """
        if self._now - self._idle > _PIECES:
            self._trim(now)
        self._idle = max(self._idle, self._now - self._held) if self._held else self._now

    def _trim(self, now: float) -> None:
        """What was given back to the allocator alone is not held by anybody."""
        self._trimmed = now
        give_free_memory_back()
        self._now = self._resident()


def resident_bytes() -> int:
    """Memory of this process that no other one shares."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123  # half the time of a Path
            _, resident, shared, *_ = file.read().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE
