"""What the calls of HTTP/2 mean: those of one request go to whatever answers without a task of their own to read it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc

from convoynet.server.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    MessageTooLarge,
    OverBudget,
    ServerError,
    Unimplemented,
)
from convoynet.server.frontend.handled import Handled
from convoynet.server.frontend.remote import Remote
from convoynet.server.frontend.session import Answers
from convoynet.server.frontend.unpacking import unpacked
from convoynet.server.http2.headers import MOST_METADATA
from convoynet.server.http2.stream import Stream
from convoynet.server.memory.budget import SMALL_BYTES, Budget
from convoynet.server.protocol.dispatch import SERVICE, Reply
from convoynet.server.types import Call

log = logging.getLogger(__name__)

_ENCODINGS = ("", "identity", "gzip", "deflate")
_OK, _UNKNOWN = grpc.StatusCode.OK, "Method not found!"
_ROOM_SECONDS, _LOOK_SECONDS = 10.0, 0.005
"""How long a stream waits for room for its next large message, and how often it looks."""
Handlers = Mapping[str, Mapping[str, grpc.RpcMethodHandler]]


class _Unary:
    """A call of one request.

    Attributes:
        rpc, call: What it is.
        asked: Whether its request has come.
        over: Whether it is answered, or refused.
        number: By which a Remote knows it.
        task: What answers it, where that is no Remote.
    """

    __slots__ = ("asked", "call", "number", "over", "rpc", "task")

    def __init__(self, rpc: str, call: Call) -> None:
        self.rpc, self.call = rpc, call
        self.asked = self.over = False
        self.number = 0
        self.task: asyncio.Task[None] | None = None


class Calls:
    """Answers the calls of a port of HTTP/2 (convoynet.server.http2.connection.Application).

    Attributes:
        budget, largest, most_streams: See Application.
        ended: Whether no more requests are read: the server is about to stop.

    Args:
        answers: Where calls of one request go.
        management: Whether the port takes management calls.
    """

    def __init__(
        self, answers: Answers, budget: Budget, largest: int, most_streams: int, *, management: bool = True
    ) -> None:
        self.budget, self.largest, self.most_streams = budget, largest, most_streams
        self.ended = False
        self._answers, self._management = answers, management
        self._remote = answers if isinstance(answers, Remote) else None
        self._unary = {
            f"/{SERVICE.full_name}/{rpc.name}": rpc.name
            for rpc in SERVICE.methods
            if not (rpc.client_streaming or rpc.server_streaming)
        }
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[Stream] = set()
        """Those that a handler answers, and those whose request has not come."""

    def handle(self, services: Handlers) -> None:
        """Has handlers answer the methods that stream, and those of other services."""
        known = {
            f"/{service}/{name}": method for service, methods in services.items() for name, method in methods.items()
        }
        self._handlers = {path: method for path, method in known.items() if path not in self._unary}

    def end(self) -> None:
        """Ends every call whose client has to say something first."""
        self.ended = True
        for stream in list(self._open):
            if isinstance(stream.note, _Unary):
                self._refuse(stream, stream.note, Draining())
            else:
                stream.note.end()

    # What connections tell.

    def begin(self, stream: Stream) -> None:
        """See Application."""
        head, rpc = stream.head, self._unary.get(stream.head.path)
        handler = self._handlers.get(head.path) if rpc is None else None
        deadline = None if head.timeout is None else time.monotonic() + head.timeout
        call = Call("grpc", deadline, head.metadata, stream.connection.identity, self._management)
        if handler is not None and self._fit(stream) is None:
            stream.note = Handled(self, stream, handler, deadline)
            self._open.add(stream)
            self.start(stream, stream.note.run())
            return
        note = stream.note = _Unary(rpc or "", call)
        if rpc is None and handler is None:
            self._end(stream, note, grpc.StatusCode.UNIMPLEMENTED, _UNKNOWN)
        elif (error := self._fit(stream)) is not None:
            self._refuse(stream, note, error)
        elif self.ended:
            self._refuse(stream, note, Draining())
        elif (reply := self._answers.refused(note.rpc, call)) is not None:
            self._reply(stream, note, reply)
        else:
            self._open.add(stream)

    def _fit(self, stream: Stream) -> ServerError | None:
        """Why a call cannot be taken, whatever it asks for."""
        if stream.head.size > MOST_METADATA:
            return MessageTooLarge(f"received metadata size exceeds limit ({stream.head.size} vs. {MOST_METADATA})")
        if stream.head.encoding not in _ENCODINGS:
            return Unimplemented(f"Compression algorithm '{stream.head.encoding[:40]}' is not one of gzip, deflate")
        return None

    def message(self, stream: Stream, payload: bytes | memoryview, *, compressed: bool) -> None:
        """See Application."""
        note = stream.note
        if not isinstance(note, _Unary):
            note.put(payload, compressed=compressed)
        elif not note.asked:
            note.asked = True
            self._open.discard(stream)
            if compressed:
                self.start(stream, self._ask_inflated(stream, note, payload))
            else:
                self._ask(stream, note, payload)

    def half_closed(self, stream: Stream) -> None:
        """See Application."""
        note = stream.note
        if not isinstance(note, _Unary):
            note.wake()
        elif not note.asked:
            text = f"{note.rpc} takes one request, got {'a part of one' if stream.within else 'none'}"
            self._end(stream, note, grpc.StatusCode.UNIMPLEMENTED, text)

    def lacks(self, stream: Stream, more: int) -> None:
        """See Application."""
        if not isinstance(stream.note, _Unary):
            stream.note.wake()
        elif not stream.note.asked:  # what comes after the one request nobody reads
            with self.budget.holding(
                more, stream.size
            ):  # else it would come as far as it can, and take the room of small ones
                stream.allow(more)

    def place(self, stream: Stream, size: int) -> memoryview | None:
        """See Application: where the core is another process, memory that it reads the message from."""
        note = stream.note
        return self._remote.place(size) if self._remote and isinstance(note, _Unary) and not note.asked else None

    def awaits(self, stream: Stream) -> bool:
        """See Application."""
        return stream.within or (isinstance(stream.note, _Unary) and not stream.note.asked)

    def drained(self, stream: Stream) -> None:
        """See Application."""
        if not isinstance(stream.note, _Unary):
            stream.note.drained()

    def refuse(self, stream: Stream, error: ServerError) -> None:
        """See Application."""
        note = stream.note
        if not isinstance(note, _Unary):
            note.fail(error)
        elif not note.asked:
            self._refuse(stream, note, error)

    def late(self, stream: Stream) -> None:
        """See Application."""
        if isinstance(stream.note, _Unary) and not stream.note.asked:
            self._refuse(stream, stream.note, DeadlineExceeded("the deadline is over"))
            return
        if stream.pending:  # a status has its place behind what its client does not take
            stream.cancel()
            return
        stream.fail(grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "Deadline Exceeded")
        if not stream.open:
            self.gone(stream)

    def gone(self, stream: Stream) -> None:
        """See Application."""
        note = stream.note
        self._open.discard(stream)
        if not isinstance(note, _Unary):
            if note.task is not None:
                self._loop.call_soon(note.task.cancel)
        elif not note.over:
            note.over = True
            if note.task is not None:
                # Not before it has begun: who begins also counts.
                self._loop.call_soon(note.task.cancel)
            elif note.number and self._remote is not None:
                self._remote.withdraw(note.number)
            else:
                self._answers.over(note.rpc, note.call)

    def handled(self, stream: Stream) -> None:
        """A handler has ended."""
        self._open.discard(stream)

    async def room(self, size: int, whole: int) -> None:
        """Waits until there is room for so many bytes of a message, or it is clear that none comes soon."""
        until = self._loop.time() + _ROOM_SECONDS
        while not self.budget.fits(size, whole) and self._loop.time() < until:
            await asyncio.sleep(_LOOK_SECONDS)

    # Calls of one request.

    def start(self, stream: Stream, work: Any) -> None:
        """Runs what answers a call."""
        task = stream.note.task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask_inflated(self, stream: Stream, note: _Unary, payload: bytes | memoryview) -> None:
        try:
            whole = await self.inflated(stream, payload)
        except ServerError as error:
            self._refuse(stream, note, error)
            return
        except asyncio.CancelledError:
            self._answers.over(note.rpc, note.call)
            raise
        finally:
            note.task = None
        if note.over:  # its client has gone at this moment
            self._answers.over(note.rpc, note.call)
        else:
            self._ask(stream, note, whole)

    async def inflated(self, stream: Stream, payload: bytes | memoryview) -> bytes:
        """A message as it was before its client compressed it.

        Raises:
            ServerError: It is too large, there is no room for it, or it is none.
        """
        if stream.head.encoding in ("", "identity"):
            raise InvalidRequest("Compressed flag set, but no encoding is named")
        return await unpacked(payload, self.largest, self.budget)

    def _ask(self, stream: Stream, note: _Unary, payload: bytes | memoryview) -> None:
        note.call.arrived = time.perf_counter_ns()
        if self.ended:
            self._refuse(stream, note, Draining())
        elif self._remote is None:
            self.start(stream, self._answered(stream, note, payload))
        else:
            try:
                note.number = self._remote.ask(note.rpc, payload, note.call, partial(self._reply, stream, note))
            except OverBudget as error:
                self._refuse(stream, note, error)

    async def _answered(self, stream: Stream, note: _Unary, payload: bytes | memoryview) -> None:
        try:
            reply = await self._answers.unary(note.rpc, payload, note.call)
            del payload
            self._reply(stream, note, reply)
        except Exception:
            log.exception("a bug in the server")
            self._end(stream, note, grpc.StatusCode.INTERNAL, "internal error")
        finally:
            note.task = None  # which would hold what it was cancelled with, and that the request
            self._answers.over(note.rpc, note.call)

    def _reply(self, stream: Stream, note: _Unary, reply: Reply) -> None:
        if note.over:
            return
        if reply.code is not _OK:
            self._end(stream, note, reply.code, reply.message, reply.trailers)
        elif len(reply.payload) < SMALL_BYTES:
            note.over = True
            if self._remote is None:
                self._answers.over(note.rpc, note.call)  # before its client can ask for the metrics
            stream.connection.answer(stream, reply.payload)
        else:
            self._reply_large(stream, note, reply.payload)

    def _reply_large(self, stream: Stream, note: _Unary, payload: bytes | memoryview) -> None:
        """An answer that counts until its client has let it through."""
        size = len(payload)
        try:
            self.budget.take(size)
        except OverBudget as error:
            if self._remote is not None:
                self._remote.written(note.number, self._answers.refusal(error).code.name)
            self._refuse(stream, note, error)
            return
        stream.on_close(lambda: self.budget.give(size))
        note.over = True
        if self._remote is None:
            self._answers.over(note.rpc, note.call)
        else:
            self._remote.written(note.number, "OK")
        stream.connection.answer(stream, payload)

    def _refuse(self, stream: Stream, note: _Unary, error: ServerError) -> None:
        reply = self._answers.refusal(error)
        note.call.error = error
        self._end(stream, note, reply.code, reply.message)

    def _end(
        self, stream: Stream, note: _Unary, code: grpc.StatusCode, text: str, more: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._open.discard(stream)
        note.over = True
        note.call.code = code.name
        if not note.number:
            self._answers.over(note.rpc, note.call)  # before its client can ask for the metrics
        stream.fail(code.value[0], text, more)
