"""The bytes of one connection, in and out: every wait for the client has an end, every buffer a bound."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

from convoynet.server.http.parsing import HEADER_BYTES, Refused, is_hopeless

IDLE_SECONDS = 30.0
"""How long a client may take to send the next part of a body, or to read the next _PIECE of an answer."""
BYTES_PER_SECOND = 4096
"""What a body must come with on average after the first IDLE_SECONDS."""
LINGER_SECONDS = 10.0
"""How long what a refused client still sends is read and dropped, so that it comes to read why it was refused."""
LINGER_BYTES = 256 * 2**20
"""How much of it."""
_QUIET_SECONDS = 2.0
_AHEAD = 64 * 2**10
_PIECE = 128 * 2**10
_PROBE_SECONDS, _LONGEST_PROBE_SECONDS = 0.05, 2.0
_NEVER = float("inf")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Gone(Exception):
    """The client is not there any more, or it does not read."""


class Stream(asyncio.Protocol):
    """A protocol that one task reads from and writes to. `_wait` is the one place where it waits for its client.

    Attributes:
        transport: The event loop's.
        task: Reads and writes, from the subclass.
        buffer: What has come and was not taken; while nobody reads, little more than _AHEAD.
        eof: Whether the client sends nothing more.
    """

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()
        self.eof = False
        self._full = self._paused = False
        self._probing: float | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._deadline = self._armed = _NEVER
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins (asyncio.Protocol)."""
        self.transport = transport
        self._tls = transport.get_extra_info("sslcontext") is not None
        connected = transport.get_extra_info("socket")
        if connected.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # The system asks for more while little waits: so a client that reads slowly is seen to read.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _PIECE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for an answer any more (asyncio.Protocol)."""
        if self._timer is not None:
            self._timer.cancel()
        self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Takes a part (asyncio.Protocol).

        No more of a large body than the task has seen: the event loop would read megabytes of each connection in one
        turn, before any task counts them.
        """
        self.buffer += data
        if self._reader is not None:
            _wake(self._reader)
        if len(self.buffer) > _AHEAD and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends nothing more, and may still read; only in TLS it is gone (asyncio.Protocol)."""
        self.eof = True
        if self._reader is not None:
            _wake(self._reader)
        if self._probing is not None:
            self._probe()
        return not self._tls

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered (asyncio.Protocol)."""
        self._full = True

    def resume_writing(self) -> None:
        """It has read (asyncio.Protocol)."""
        self._full = False
        if self._writer is not None:
            _wake(self._writer)

    # Waiting.

    async def _wait(self, future: asyncio.Future[None], seconds: float) -> None:
        """Waits for the client. One timer serves all waits: it is armed anew only where its time comes sooner."""
        self._deadline = self.loop.time() + seconds
        if self._deadline < self._armed:
            self._arm()
        try:
            await future
        finally:
            self._deadline = _NEVER

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed = self._deadline
        self._timer = self.loop.call_at(self._deadline, self._tick)

    def _tick(self) -> None:
        self._timer, self._armed = None, _NEVER
        if self._deadline > self.loop.time():
            if self._deadline != _NEVER:
                self._arm()
            return
        for future in (self._reader, self._writer):
            if future is not None and not future.done():
                future.set_exception(TimeoutError())

    def _patience(self, begun: float, moved: int) -> float:
        """How long a transfer may pause that began then and has moved so many bytes."""
        left = begun + IDLE_SECONDS + moved / BYTES_PER_SECOND - self.loop.time()
        return max(0.0, min(IDLE_SECONDS, left))

    # Reading.

    async def more(self, seconds: float) -> None:
        """Waits for bytes, or for the end of them; raises TimeoutError."""
        if self.eof:
            return
        self._resume()
        self._reader = self.loop.create_future()
        try:
            await self._wait(self._reader, seconds)
        finally:
            self._reader = None

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    async def part(self, begun: float, moved: int) -> None:
        """Waits for the next part of a body that began then and of which so much has come; raises Refused."""
        try:
            await self.more(self._patience(begun, moved))
        except TimeoutError:
            raise Refused(
                408, f"the body came with pauses of {IDLE_SECONDS:g} s, or with less than {BYTES_PER_SECOND} bytes/s"
            ) from None
        if self.eof:
            raise Refused(400, "the connection ended within the body")

    async def line(self, begun: float, moved: int) -> bytes:
        """The next line of the frame of a body in chunks, without its end; raises Refused."""
        looked = 0
        while (end := self.buffer.find(b"\r\n", max(0, looked - 1), HEADER_BYTES)) < 0:
            if len(self.buffer) >= HEADER_BYTES:
                raise Refused(431, f"a line of the frame of a body in chunks takes more than {HEADER_BYTES} bytes")
            if is_hopeless(self.buffer, looked):
                raise Refused(400, "not a body in chunks: each line of its frame ends with CR LF")
            looked = len(self.buffer)
            await self.part(begun, moved + looked)
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        return line

    def taken(self, length: int) -> bytearray:
        """So many bytes of the buffer; where they are all of it, nothing is copied."""
        if len(self.buffer) == length:
            taken, self.buffer = self.buffer, bytearray()
            return taken
        taken = self.buffer[:length]
        del self.buffer[:length]
        return taken

    async def linger(self) -> None:
        """Drops what the client still sends: closing at once would take the answer away before it is read."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        until, left = self.loop.time() + LINGER_SECONDS, LINGER_BYTES
        self.buffer.clear()
        while not self.eof and left > 0 and (seconds := until - self.loop.time()) > 0:
            try:
                await self.more(min(_QUIET_SECONDS, seconds))
            except TimeoutError:
                break
            left -= len(self.buffer)
            self.buffer.clear()

    # Hang-ups.

    def watch(self) -> None:
        """From now on the client waits: one that sends nothing more is asked whether it still reads.

        A client that only ended its side and one that hung up look alike, until something is written: the second
        one's system objects, which ends the connection. The first passes over interim answers.
        """
        self._probing = _PROBE_SECONDS
        if len(self.buffer) <= _AHEAD:
            self._resume()  # else its end would not be seen
        if self.eof:
            self._probe()

    def unwatch(self) -> None:
        """The answer is there, or there is none."""
        self._probing = None
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _probe(self) -> None:
        def write() -> None:
            if self._probing is not None and not self.transport.is_closing():
                self.transport.write(CONTINUE)
                self._probing = min(2 * self._probing, _LONGEST_PROBE_SECONDS)
                self._probe()

        assert self._probing is not None
        self._probe_timer = self.loop.call_later(self._probing, write)

    # Writing.

    async def write(self, *parts: bytes) -> None:
        """Writes, and waits for a client that does not keep up: most of it is the system's then.

        Raises:
            Gone: The client does not take it.
        """
        for part in parts:
            # In pieces: TLS takes whatever it is given, and says only at the next one that it was too much.
            for piece in (part,) if len(part) <= _PIECE else _pieces(part):
                self.transport.write(piece)
                if self._full:
                    await self._kept_up()

    async def _kept_up(self) -> None:
        self._writer = self.loop.create_future()
        try:
            await self._wait(self._writer, IDLE_SECONDS)
        except TimeoutError:
            self.transport.abort()
            raise Gone from None
        finally:
            self._writer = None

    def close(self) -> None:
        """Ends the connection, with so much time for what is still to be written."""
        self.unwatch()
        self.buffer.clear()
        if not self.transport.is_closing():
            self.transport.close()
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(IDLE_SECONDS, self.transport.abort)


def _pieces(part: bytes) -> Iterator[memoryview]:
    view = memoryview(part)
    return (view[at : at + _PIECE] for at in range(0, len(part), _PIECE))


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
