"""Calls of HTTP/2 that a handler answers: streams, health, reflection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc import aio

from convoynet.server.errors import DeadlineExceeded, Draining, InvalidRequest, ServerError
from convoynet.server.http2.frames import FIRST_WINDOW
from convoynet.server.http2.headers import GOOD
from convoynet.server.http2.listener import WHOLE_SECONDS
from convoynet.server.http2.stream import PREFIX_BYTES, Stream

if TYPE_CHECKING:
    from convoynet.server.frontend.calls import Calls

log = logging.getLogger(__name__)


class Aborted(Exception):
    """A handler ends its call with a status."""

    def __init__(self, code: grpc.StatusCode, text: str, more: tuple[tuple[str, str], ...]) -> None:
        super().__init__(text)
        self.code, self.text, self.more = code, text, more


class Handled:
    """A call that a handler answers: what grpcio calls its context, as far as handlers here use it.

    Attributes:
        task: Runs the handler.
    """

    def __init__(self, calls: Calls, stream: Stream, handler: grpc.RpcMethodHandler, deadline: float | None) -> None:
        self.task: asyncio.Task[None] | None = None
        self._calls, self._stream, self._handler, self._deadline = calls, stream, handler, deadline
        self._messages: deque[tuple[bytes | memoryview, bool]] = deque()
        self._error: ServerError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._unread = 0

    async def run(self) -> None:
        """Answers the call."""
        stream = self._stream
        try:
            if self._handler.response_streaming:
                async with aclosing(self._handler.stream_stream(None, self)) as payloads:
                    async for payload in payloads:
                        await self._send(payload)
            else:
                await self._send(await self._handler.stream_unary(None, self))
            stream.finish(GOOD)
        except Aborted as end:
            stream.fail(end.code.value[0], end.text, end.more)
        except Exception:
            log.exception("a bug in the server")
            stream.fail(grpc.StatusCode.INTERNAL.value[0], "internal error")
        finally:
            self.task = None
            self._calls.handled(stream)
            if stream.open and not stream.finishing:
                stream.cancel()

    async def _send(self, payload: bytes) -> None:
        self._stream.send(payload)
        if self._stream.pending:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer

    # What the connection tells.

    def put(self, payload: bytes | memoryview, *, compressed: bool) -> None:
        """A message has come."""
        self._messages.append((payload, compressed))
        self._unread += len(payload) + PREFIX_BYTES
        self.wake()

    def wake(self) -> None:
        """There is something to read, or nothing any more."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def fail(self, error: ServerError) -> None:
        """The next read raises this."""
        self._error = error
        self.wake()

    def end(self) -> None:
        """Whoever waits for a message waits no more: the server is about to stop."""
        self.wake()

    def drained(self) -> None:
        """All that was sent is on its way."""
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    # What handlers ask.

    async def read(self) -> Any:
        """The next message; aio.EOF where no more come.

        Raises:
            ServerError: It cannot be taken, or the server is about to stop.
        """
        stream = self._stream
        while not self._messages:
            if self._error is not None:
                raise self._error
            if stream.ended:
                if stream.within:
                    raise InvalidRequest("the client has ended its side within a message")
                return aio.EOF
            if self._calls.ended:
                raise Draining
            if lacking := stream.lacking:
                await self._calls.room(lacking, stream.size)
                stream.reserve(lacking)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        payload, compressed = self._messages.popleft()
        self._unread -= len(payload) + PREFIX_BYTES
        more = FIRST_WINDOW - stream.credit - stream.held - self._unread
        if more > FIRST_WINDOW // 2:
            stream.allow(more)
        return await self._calls.inflated(stream, payload) if compressed else payload

    async def messages(self) -> AsyncIterator[bytes]:
        """Every message; ends where the server does."""
        while True:
            try:
                payload = await self.read()
            except Draining:
                return
            if payload is aio.EOF:
                return
            yield payload

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn:
        """Ends the call."""
        raise Aborted(code, details, tuple(trailing_metadata))

    def time_remaining(self) -> float | None:
        """Seconds that the client still gives it."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The client's metadata."""
        return self._stream.head.metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        """Who the client is by its certificate."""
        identity = self._stream.connection.identity
        return {"x509_common_name": [identity.encode()]} if identity else {}

    def add_done_callback(self, done: Callable[[Any], None]) -> None:
        """Has `done` called when the call is over."""
        self._stream.on_close(partial(done, self))


class Reads:
    """How handlers read; Requests is the same for a server of grpcio, where nobody knows how large a message will be.

    Attributes:
        ended: Whether no more are read.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @property
    def ended(self) -> bool:
        """See there."""
        return self._calls.ended

    def end(self) -> None:
        """See Calls.end."""
        self._calls.end()

    async def one(self, context: Handled) -> bytes | None:
        """See Requests.one."""
        try:
            async with asyncio.timeout(WHOLE_SECONDS):
                payload = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the request did not come whole within {WHOLE_SECONDS:g} s") from None
        return None if payload is aio.EOF else payload

    def stream(self, context: Handled) -> AsyncIterator[bytes]:
        """See Requests.stream."""
        return context.messages()
