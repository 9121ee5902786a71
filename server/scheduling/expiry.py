"""The end of the time that a request has."""

from __future__ import annotations

import asyncio
import math
import time

from convoynet.server.errors import DeadlineExceeded
from convoynet.server.scheduling.entry import Entry


class Expiry:
    """Answers an entry with DeadlineExceeded when it expires, which the scheduler may put off meanwhile."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._set()

    def cancel(self) -> None:
        """Lets it be."""
        self._handle.cancel()

    def _set(self) -> None:
        seconds = max(self._entry.expires - time.monotonic(), 0)
        self._handle = asyncio.get_running_loop().call_later(seconds, self._fire)

    def _fire(self) -> None:
        if self._entry.result.done():
            return
        if self._entry.expires <= time.monotonic():
            self._entry.result.set_exception(DeadlineExceeded())
        elif self._entry.expires != math.inf:
            self._set()
