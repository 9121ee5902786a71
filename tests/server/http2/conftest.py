"""A port of HTTP/2 in the test's own process, whose calls a few lines of Python answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from convoynet.server.errors import ServerError
from convoynet.server.frontend.calls import Calls
from convoynet.server.frontend.grpc_frontend import methods
from convoynet.server.frontend.handled import Reads
from convoynet.server.http2.connection import Connection
from convoynet.server.http2.listener import Limits, Listener
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import SERVICE, Reply
from convoynet.server.status import code_of
from convoynet.server.types import Call
from tests.server.raw_http2 import RawClient

LARGEST = 2**20
OVER_BUDGET = 4 * 2**20


class Echo:
    """Answers with the request; b"large N" with so many bytes; b"wait" when `go` is set; b"bug" not at all.

    Attributes:
        counted: How each call ended.
        running: Calls that wait.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget, self.go = budget, asyncio.Event()
        self.counted: list[tuple[str, str]] = []
        self.running = 0
        self.asked: list[Call] = []
        self.error: ServerError | None = None

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """As the Dispatcher refuses before a request has come."""
        if call.header("x-refuse"):
            call.code = "UNAUTHENTICATED"
            return Reply(grpc.StatusCode.UNAUTHENTICATED, message="nobody knows who calls")
        return None

    def refusal(self, error: Exception) -> Reply:
        """What a client is told."""
        return Reply(code_of(error), message=str(error))

    def over(self, rpc: str, call: Call) -> None:
        """Counts a call once."""
        if not call.counted:
            call.counted = True
            self.counted.append((rpc, call.code))

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """See above."""
        payload = bytes(payload)
        self.asked.append(call)
        with self.budget.holding(len(payload)):
            if payload == b"bug":
                raise ZeroDivisionError("of the test's own")
            if payload == b"wait":
                self.running += 1
                try:
                    await self.go.wait()
                finally:
                    self.running -= 1
            payload = bytes(_number(b"large ", payload)) or payload
            call.code = "OK"
            return Reply(grpc.StatusCode.OK, payload)

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """Each request's answer."""
        self.running += 1
        try:
            async for payload in payloads:
                for _ in range(_number(b"many ", bytes(payload)) or 1):
                    yield await self.unary(rpc, payload, Call("grpc"))
        finally:
            self.running -= 1


def _number(before: bytes, payload: bytes) -> int:
    """What stands behind a word in a request; 0 where that is no number."""
    text = payload.removeprefix(before)
    return int(text) if text != payload and text.isdigit() and len(text) < 8 else 0


class Port:
    """What listens.

    Attributes:
        number: Of the port.
    """

    def __init__(self, limits: Limits, context: ssl.SSLContext | None, most_streams: int) -> None:
        self.budget = Budget(OVER_BUDGET)
        self.echo = Echo(self.budget)
        self.calls = Calls(self.echo, self.budget, LARGEST, most_streams)
        reads = Reads(self.calls)
        self.calls.handle({SERVICE.full_name: methods(self.echo, reads, self.budget)})
        self.listener = Listener(self.calls, limits, context)
        self.number = 0

    @property
    def connections(self) -> list[Connection]:
        """Those that there are."""
        return list(self.listener._connections)

    @property
    def streams(self) -> int:
        """Calls that are not over."""
        return sum(len(connection.streams) for connection in self.connections)

    async def client(self, **how: Any) -> RawClient:
        """One that says hello."""
        return await RawClient.connect(self.number, **how)

    def quiet(self) -> bool:
        """Whether nothing is left of any call: no task, stream, or byte."""
        return not (self.streams or self.calls._open or self.calls._tasks or self.echo.running or self.budget.held)

    async def settled(self, count: int | None = None) -> list[tuple[str, str]]:
        """How calls were counted, once nothing is left of them, and so many were."""
        await until(lambda: self.quiet() and (count is None or len(self.echo.counted) >= count))
        await asyncio.sleep(0.01)  # for what should not follow
        return self.echo.counted


async def until(holds: Callable[[], object]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def listening(
    *,
    limits: Limits | None = None,
    context: ssl.SSLContext | None = None,
    most_streams: int = 100,
    host: str = "127.0.0.1",
) -> AsyncIterator[Port]:
    """A port that listens."""
    port = Port(limits or Limits(), context, most_streams)
    port.number = await port.listener.start(host, 0)
    try:
        yield port
    finally:
        port.calls.end()
        await port.listener.stop(0.0)


@pytest.fixture
async def port(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Port]:
    """A port with the usual limits; nothing may have gone to the log, nor be left, in the end."""
    async with listening() as running:
        yield running
        for connection in running.connections:
            connection.transport.abort()
        await until(lambda: not running.connections)
        await until(running.quiet)
    assert not [record for record in caplog.records if record.name.startswith(("convoynet", "asyncio"))]
