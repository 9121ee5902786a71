"""How the requests of gRPC calls are read: within the budget, a few large ones at a time, none once the server ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from math import inf
from typing import Any, Protocol

from grpc import aio

from convoynet.server.errors import DeadlineExceeded, Draining, OverBudget, ServerError
from convoynet.server.frontend.unpacking import looks_packed, unpacked
from convoynet.server.http2.listener import WHOLE_SECONDS
from convoynet.server.memory.budget import Budget

_TOGETHER = 32 * 2**20
"""Bytes of requests that are read at once, by the size of late ones: more of them arrive no sooner. With a small budget
half of it."""
_FIRST = 4 * 2**20
_TURN_SECONDS, _LONGEST_SECONDS = 0.25, 2.0
"""How long a read may hold up others, which then waits for its client; how long one is held up at most."""
_LOOK_SECONDS = 0.01
_UNPACKED_AT_ONCE = 2
_SWEEP_SECONDS = 1.0


class Reading(Protocol):
    """How handlers read the messages of a call, whatever ends HTTP/2.

    Attributes:
        ended: Whether no more are read.
    """

    @property
    def ended(self) -> bool:
        """See above."""
        ...

    async def one(self, context: Any) -> bytes | None:
        """The one request of a call; None where the client sends none; raises ServerError."""
        ...

    def stream(self, context: Any) -> AsyncIterator[bytes]:
        """The requests of a stream, which just end when the server does; raises ServerError."""
        ...


class Requests:
    """The requests that one gRPC server is reading.

    gRPC begins to read a message when it is asked to, and then takes all of it; until then the client can send no more
    than a window of 64 KB.

    Attributes:
        ended: Whether no more are read.
    """

    def __init__(self, budget: Budget, largest: int = 2**63) -> None:
        self.ended = False
        self._budget, self._largest = budget, largest
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[Any], float] = {}
        """Those that read, and when each is given up."""
        self._swept = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._together = max(min(_TOGETHER, budget.limit // 2), 1)
        self._expected = min(_FIRST, self._together // 8 + 1)
        self._active = 0
        """Reads of one(), those included whose turn has come and that have not begun."""
        self._timer: asyncio.TimerHandle | None = None
        self._cut: dict[asyncio.Task[Any], ServerError] = {}
        self._unpacking = asyncio.Semaphore(_UNPACKED_AT_ONCE)

    def end(self) -> None:
        """Ends every read that waits for its client: the server is about to stop."""
        self.ended = True
        for task in self._tasks:
            task.cancel()

    async def one(self, context: aio.ServicerContext[Any, Any]) -> bytes | None:
        """The one request of a call; None where the client sends none.

        Raises:
            Draining: The server stops before the request came.
            OverBudget: There is no room for it.
            DeadlineExceeded: It has not come whole in WHOLE_SECONDS.
        """
        if self._active * self._expected < self._together:
            self._active += 1
        else:
            await self._turn()
        try:
            self._budget.check_process()
            payload = await self._read(context, self._loop.time() + WHOLE_SECONDS)
            size = 0 if payload is None else len(payload)
            # The largest of late.
            self._expected = max(size, self._expected - (self._expected >> 4), 1)
        finally:
            self._active -= 1
            if self._waiting:
                self._wake()
        return payload

    async def stream(self, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        """The requests of a stream, which just end when the server does.

        Raises:
            OverBudget: There is no room for the next one.
        """
        while True:
            self._budget.check_process()
            try:
                payload = await self._read(context)
            except Draining:
                return
            if payload is None:
                return
            yield payload

    async def _turn(self) -> None:
        """Waits until others have been read."""
        waiting: asyncio.Future[None] = self._loop.create_future()
        rounds = 1 + len(self._waiting) * self._expected // self._together
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(min(rounds * _TURN_SECONDS, _LONGEST_SECONDS)):
                await waiting
        except TimeoutError:
            if not _was_woken(waiting):
                self._active += 1
        except asyncio.CancelledError:
            if _was_woken(waiting):
                self._active -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._active * self._expected < self._together:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                self._active += 1

    async def _read(self, context: aio.ServicerContext[Any, Any], until: float = inf) -> bytes | None:
        if self.ended:
            raise Draining
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("calls are tasks")
        self._tasks[task] = until
        self._budget.reading += 1
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)
        try:
            message = await context.read()
        except asyncio.CancelledError:
            reason = Draining() if self.ended else self._cut.get(task)
            if reason is None:
                raise
            task.uncancel()
            raise reason from None
        finally:
            self._budget.reading -= 1
            del self._tasks[task]
            if self._cut:
                self._cut.pop(task, None)
        if message is aio.EOF:
            return None
        return await self._unpacked(message) if looks_packed(message) else message

    async def _unpacked(self, message: bytes) -> bytes:
        """A message that gRPC was told to leave compressed: it would unpack all of it, in many threads at once."""
        async with self._unpacking:
            return await unpacked(message, self._largest, self._budget)

    def _look(self) -> None:
        """Ends what is being read where that is more than the process may have."""
        self._timer = None
        if not self._tasks:
            return
        self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)
        if (now := self._loop.time()) - self._swept >= _SWEEP_SECONDS:
            self._swept = now
            late = DeadlineExceeded(f"the request did not come whole within {WHOLE_SECONDS:g} s")
            self._give_up([task for task, until in self._tasks.items() if until <= now], late)
        try:
            self._budget.check_process()
        except OverBudget as error:
            self._give_up(self._tasks, error)

    def _give_up(self, reads: Iterable[asyncio.Task[Any]], error: ServerError) -> None:
        for task in reads:
            self._cut[task] = error
            task.cancel()


def _was_woken(waiting: asyncio.Future[None]) -> bool:
    return waiting.done() and not waiting.cancelled()
