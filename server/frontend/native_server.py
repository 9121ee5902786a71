"""pygrpc-native's server, of which no call ends uncounted, and whose end is seen."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Any

import grpc
import pygrpc_native.aio
from pygrpc_native._native import EVENT_CANCEL

from convoynet.server.errors import Oversize
from convoynet.server.supervision import tasks
from convoynet.server.types import Call

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_NOT_ITS_OWN = {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
"""With these it ends no call of its own accord before its handler has it."""


class NativeServer(pygrpc_native.aio.Server):
    """A server whose I/O threads end some calls themselves: of no message, of an encoding that it does not know.

    Python hears nothing of those; but the stack counts all ends of calls by their status, for metrics of its own. What
    it has counted beyond what was answered from here is what it has refused.
    """

    _front: Any
    _loop: Any

    def __init__(self, options: Sequence[tuple[str, Any]], method: str, counted: Callable[[Call], None]) -> None:
        """Makes it.

        Args:
            options: grpcio's channel arguments.
            method: The path of the method whose calls are counted.
            counted: Told of each call of it that no handler gets.
        """
        super().__init__(options=options)
        self._front_args["metrics"] = True
        self._largest = inf if self._receive_limit is None else self._receive_limit
        self._method, self._counted = method, counted
        self._told: Counter[str] = Counter()
        """Of the calls of that method, how many were ended from here, by status; or were told of."""
        self._over = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def add_insecure_port(self, address: str) -> int:
        """See grpc.aio.Server."""
        port = super().add_insecure_port(address)
        self._front = _Front(self._front, self._failed_one)
        return port

    async def start(self) -> None:
        """See grpc.aio.Server."""
        await super().start()
        if self._fallback is not None:
            # Never cancelled, as that would cancel what its own end waits for.
            tasks.start(self._end_with(self._fallback), "the gRPC server behind the native stack")
        self._looking = tasks.keep(self._look, "the look at what the native stack refuses")

    async def stop(self, grace: float | None) -> None:
        """See grpc.aio.Server."""
        await super().stop(grace)
        if self._looking is not None:
            self._looking.cancel()
            self._count_refused(self._refused())

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """See grpc.aio.Server; also returns where the server has ended by itself."""
        try:
            async with asyncio.timeout(timeout):
                await self._over.wait()
        except TimeoutError:
            return True
        return False

    async def _end_with(self, server: grpc.aio.Server) -> None:
        try:
            await server.wait_for_termination()
        finally:
            self._over.set()

    def _dispatch(self) -> None:
        """In a thread of its own: hands calls to the event loop until the server has ended, however it does."""
        try:
            super()._dispatch()
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._over.set)

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        """Begins calls and ends those whose clients are gone: none before it has begun, since who begins also counts.

        A task that is cancelled before its first step never runs, and its call would be kept for ever.
        """
        gone = [event for event in events if event[0] == EVENT_CANCEL]
        if gone:
            super()._on_events([event for event in events if event[0] != EVENT_CANCEL])
            self._loop.call_soon(super()._on_events, gone)
        else:
            super()._on_events(events)

    def _request(self, call: Any, payload: bytes) -> tuple[bool, Any]:
        """The request for a handler, which takes bytes, unless it is too large."""
        if len(payload) <= self._largest:
            return True, payload
        if call.method == self._method:
            error = Oversize("its message is too large")
            self._counted(Call("grpc", error=error, code="RESOURCE_EXHAUSTED"))
        return super()._request(call, payload)

    def _failed_one(self, call_id: int, code: int) -> None:
        call = self._calls.get(call_id)
        if call is not None and call.method == self._method:
            self._told[_CODES[code]] += 1

    async def _look(self) -> None:
        """Counts what was refused, if it is still so at the next look: what is ended from here is known soon after."""
        before: Counter[str] = Counter()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            found = self._refused()
            sure = found & before
            self._count_refused(sure)
            before = found - sure

    def _refused(self) -> Counter[str]:
        """By status, how many calls ended that were not ended from here."""
        found = self._front.metrics()["methods"].get(self._method, {"status": {}})
        ended = Counter({_CODES[code]: status["count"] for code, status in found["status"].items()})
        return Counter({code: count for code, count in (ended - self._told).items() if code not in _NOT_ITS_OWN})

    def _count_refused(self, refused: Counter[str]) -> None:
        self._told += refused
        for code in refused.elements():
            self._counted(Call("grpc", code=code))


class _Front:
    """The native part, with a record of the calls that are refused through it."""

    def __init__(self, front: Any, failed: Callable[[int, int], None]) -> None:
        self._front, self._failed = front, failed
        self.respond = front.respond  # no longer a way for what is not refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    def fail(self, call_id: int, code: int, message: str, **more: Any) -> bool:
        """Ends a call; False where its client is gone."""
        told: bool = self._front.fail(call_id, code, message, **more)
        if told:
            self._failed(call_id, code)
        return told
