"""One HTTP/1.1 connection: reads a request, has it answered, writes the answer, and again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from convoynet.server.errors import OverBudget
from convoynet.server.http.arrivals import Arrivals
from convoynet.server.http.handlers import HttpReply, problem
from convoynet.server.http.parsing import (
    HEADER_BYTES,
    Head,
    Refused,
    check_trailer,
    chunk_size,
    head_from_bytes,
    is_hopeless,
)
from convoynet.server.http.stream import CONTINUE, Gone, Stream
from convoynet.server.memory.budget import Budget
from convoynet.server.security.tls import identity_from_peer

log = logging.getLogger(__name__)

HEADER_SECONDS = 30.0
"""How long a client may take to send the headers of a request."""
KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be idle after an answer."""
_SMALL = 64 * 2**10
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus} | {
    499: "HTTP/1.1 499 Client Closed Request\r\n"
}


@dataclass(slots=True)
class Incoming:
    """A request whose head has come.

    Attributes:
        head: What it says.
        identity: The name in the client's certificate; "" without one.
        read: Gives the body as it was sent, once; raises Refused where it has more bytes than that.
        hold: Counts bytes that it becomes, until it is over; raises Refused where the server holds too many.
        note: What the application wants to know of it when it is over.
    """

    head: Head
    identity: str
    read: Callable[[int], Coroutine[Any, Any, bytes | bytearray]]
    hold: Callable[[int], None]
    note: Any = None


class Application(Protocol):
    """What answers the requests of a port."""

    async def answer(self, incoming: Incoming) -> HttpReply:
        """The answer to one request; raises nothing but Refused and CancelledError."""
        ...

    def ended(self, incoming: Incoming | None, reply: HttpReply | None) -> None:
        """Told once of every request what its client got.

        Args:
            incoming: None for one whose head could not be read.
            reply: The answer that was written; None where the client was gone before it.
        """
        ...


class Connection(Stream):
    """Serves its requests with one task, one after another.

    Attributes:
        waits_since: When it began to wait for its client, on the loop's clock; None while the client waits.
        begun: Whether a part of a request has come.
    """

    def __init__(
        self,
        app: Application,
        made: Callable[[Connection], bool],
        lost: Callable[[Connection], None],
        budget: Budget | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        """`made` is asked whether the connection may stay, `lost` told that it is gone."""
        super().__init__()
        self._app, self._made, self._lost, self._budget = app, made, lost, budget
        self._arrivals = arrivals or Arrivals()
        self.waits_since: float | None = self.loop.time()
        self.begun = False
        self._ending = ""
        self._unread = False
        self._held, self._closed = 0, False
        self._size = 0
        """Bytes of the body, as far as that is known."""
        self._account = threading.Lock()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to serve it."""
        super().connection_made(transport)
        self._identity = identity_from_peer(transport.get_extra_info("peercert"))
        self.task = self.loop.create_task(self._serve(self._made(self)))
        self.task.add_done_callback(lambda _: self.close())  # also where it was cancelled before it began

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels what is under way."""
        super().connection_lost(exc)
        self._lost(self)

    def end(self, why: str) -> None:
        """Closes it when the answer is given that is due; a request that has not wholly come is told why not."""
        self._ending = why
        if self.waits_since is not None:
            self.task.cancel()

    async def _serve(self, welcome: bool) -> None:
        try:
            if not welcome:
                await self._refuse(problem(503, "the server has as many connections as it takes; try again"))
            else:
                seconds = HEADER_SECONDS
                while await self._one(seconds) and not self._ending:
                    seconds = KEEP_ALIVE_SECONDS
                    if self.buffer:
                        await asyncio.sleep(0)  # others get their turn between requests that came together
        except (Gone, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("a bug in the server")

    async def _one(self, seconds: float) -> bool:
        """Serves one request; whether another may follow."""
        try:
            head = await self._head(seconds)
        except Refused as refused:
            await self._refuse(refused.reply)
            return False
        except asyncio.CancelledError:
            if self.begun and not self.transport.is_closing():
                await self._refuse(problem(503, self._ending))
            raise
        if head is None:
            return False
        incoming = Incoming(head, self._identity, lambda limit: self._body(head, limit), self._hold)
        reply: HttpReply | None = None
        last = True
        try:
            reply = await self._answered(incoming)
            last = not head.keep_alive or self._unread or bool(self._ending) or (self.eof and not self.buffer)
            await self._write(reply, head, last)
        except BaseException:
            reply = None
            raise
        finally:
            self._release(last or reply is None)
            self._app.ended(incoming, reply)
        if last and (self._unread or self.buffer):
            await self._linger()
        return not last

    async def _answered(self, incoming: Incoming) -> HttpReply:
        head = incoming.head
        self._unread, self._size = head.length != 0, head.length or 0
        if not self._unread:
            self._came(head)
        try:
            reply = await self._app.answer(incoming)
            self._hold(sum(map(len, reply.body)))
        except Refused as refused:
            reply = refused.reply
        except asyncio.CancelledError:
            if self.transport.is_closing():
                raise
            reply = problem(503, self._ending or "the server is stopping")
        except Exception:
            log.exception("a bug in the server")
            reply = problem(500, "internal error; the server's log has the details", code="INTERNAL")
        finally:
            self.unwatch()
        if self._unread and head.length is not None and len(self.buffer) >= head.length:
            self._unread = False
            self.taken(head.length)  # was not asked for, and is here
        return reply

    def _came(self, head: Head) -> None:
        """All of the request is here: from now on it is the client that waits."""
        self.waits_since = None
        self._arrivals.over(self)
        if head.modern:
            self.watch()

    # Reading.

    async def _head(self, seconds: float) -> Head | None:
        """The next head; None where the client has no more requests."""
        looked = 0
        self.waits_since, self.begun = self.loop.time(), False
        until = self.waits_since + seconds
        while (end := self.buffer.find(b"\r\n\r\n", max(0, looked - 3), HEADER_BYTES)) < 0:
            if len(self.buffer) >= HEADER_BYTES:
                if self.buffer.find(b"\r\n", 2) < 0:
                    raise Refused(414, f"the first line of the request takes more than {HEADER_BYTES} bytes")
                raise Refused(431, f"the headers take more than {HEADER_BYTES} bytes")
            if is_hopeless(self.buffer, looked):
                raise Refused(400, "not a request of HTTP/1.1 (without TLS here): lines of text that end with CR LF")
            if self.buffer and not self.begun:
                self.begun, until = True, self.loop.time() + HEADER_SECONDS
            if self.eof:
                if self.begun:
                    raise Refused(400, "the connection ended within the headers")
                return None
            looked = len(self.buffer)
            try:
                await self.more(max(0.0, until - self.loop.time()))
            except TimeoutError:
                if not self.begun:
                    return None
                raise Refused(408, f"the headers did not come within {HEADER_SECONDS:g} s") from None
        self.begun = True
        data = bytes(self.buffer[: end + 4])
        del self.buffer[: end + 4]
        return head_from_bytes(data)

    async def _body(self, head: Head, limit: int) -> bytes | bytearray:
        """The body of the request; never more than `limit` bytes of it are held."""
        if head.length == 0:
            return b""
        if head.length is not None and head.length > limit:
            raise Refused(413, f"the body has {head.length} bytes, {limit} are allowed (--max-message-bytes)")
        if head.waits and not self.buffer:
            self.transport.write(CONTINUE)
        body = await (self._chunks(limit) if head.length is None else self._sized(head.length))
        self._unread = False
        self._came(head)
        return body

    async def _sized(self, length: int) -> bytearray:
        # What has come counts, not what a head promises: heads cost nothing.
        begun, held = self.loop.time(), 0
        while (come := min(len(self.buffer), length)) < length or held < length:
            self._part_came(come - held)
            held = come
            if come < length:
                await self.part(begun, come)
        return self.taken(length)

    async def _chunks(self, limit: int) -> bytearray:
        """Sizes, extensions and trailers may take HEADER_BYTES more than the data that they frame."""
        body = bytearray()
        begun, frame = self.loop.time(), 0
        while True:
            line = await self.line(begun, len(body) + frame)
            frame += len(line) + 4
            size = chunk_size(line)
            if not size:
                break
            if len(body) + size > limit:
                raise Refused(413, f"the body has more than {limit} bytes (--max-message-bytes)")
            _check_frame(frame, len(body) + size)
            self._size = len(body) + size
            while size:
                if not self.buffer:
                    await self.part(begun, len(body) + frame)
                data = self.taken(min(size, len(self.buffer)))
                self._part_came(len(data))
                body += data
                size -= len(data)
            if await self.line(begun, len(body) + frame):
                raise Refused(400, "a chunk of the body does not end where its size says")
        while line := await self.line(begun, len(body) + frame):
            frame += len(line) + 2
            _check_frame(frame, len(body))
            check_trailer(line)
        return body

    def _part_came(self, count: int) -> None:
        self._hold(count)
        self._arrivals.came(self, count)

    def _hold(self, count: int) -> None:
        """As a body comes, before it becomes more, and before an answer is written; any thread may."""
        if self._budget is None:
            return
        with self._account:
            if self._closed:  # a thread inflates a body that nobody waits for any more
                raise Refused(503, "the request is over")
            try:
                self._budget.take(count, self._size)
            except OverBudget as error:
                raise Refused(503, str(error)) from None
            self._held += count

    def _release(self, last: bool) -> None:
        """When the request is over."""
        self._arrivals.over(self)
        if self._budget is not None:
            with self._account:
                self._budget.give(self._held)
                self._held, self._closed = 0, last

    # Writing.

    async def _refuse(self, reply: HttpReply) -> None:
        """Answers what could not be read."""
        written: HttpReply | None = None
        try:
            await self._write(reply, None, True)
            written = reply
        finally:
            self._app.ended(None, written)
        await self._linger()

    async def _linger(self) -> None:
        self.waits_since, self.begun = self.loop.time(), False
        await self.linger()

    async def _write(self, reply: HttpReply, head: Head | None, last: bool) -> None:
        """Writes an answer; raises Gone where nobody takes it."""
        if self.transport.is_closing():
            raise Gone
        self.waits_since = None
        size = sum(map(len, reply.body))
        lines = [_STATUS_LINES[reply.status]]
        lines += [f"{name}: {value}\r\n" for name, value in reply.headers]
        lines.append(f"content-length: {size}\r\n")
        if last:
            lines.append("connection: close\r\n")
        elif head is not None and not head.modern:
            lines.append("connection: keep-alive\r\n")
        lines.append("\r\n")
        start = "".join(lines).encode("latin-1", "replace")
        if head is not None and head.method == "HEAD":
            await self.write(start)
        elif size > _SMALL:
            await self.write(start, *reply.body)
        else:
            # A copy of a small answer costs less than another call.
            await self.write(b"".join((start, *reply.body)))


def _check_frame(frame: int, data: int) -> None:
    if frame > HEADER_BYTES + data:
        raise Refused(431, f"sizes and trailers of the chunks take {HEADER_BYTES} bytes more than what they frame")
