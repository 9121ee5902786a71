"""One connection of HTTP/2: what comes, every limit on it, and what goes out as far as the client lets it."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

from convoynet.server.errors import ServerError
from convoynet.server.http2 import frames
from convoynet.server.http2.frames import Broken, Code
from convoynet.server.http2.headers import (
    GOOD,
    MOST_DECODED,
    MOST_METADATA,
    NO_TABLE,
    RESPONSE,
    Heads,
    Malformed,
    refusal,
)
from convoynet.server.http2.stream import PREFIX_BYTES, Stream
from convoynet.server.memory.budget import Budget
from convoynet.server.security.tls import identity_from_peer

log = logging.getLogger(__name__)

_ROOM = 2**30
"""What a client may send on a connection before it hears from it: what counts are the windows of its calls."""
_PATIENCE, _PATIENCE_A_SECOND = 1000.0, 200.0
"""How many frames that ask for work and bring none a connection may send, at once and in a second."""
_USUAL_TABLE = 4096
_LONG_AGO = -float("inf")
_PIECES = 2**16
"""Bytes of answers that are put together at a time, before anyone looks whether the client reads."""
_HEAD_OF_ANSWER = len(RESPONSE)
_RESPONSE_HEAD = frames.HEAD.pack(0, _HEAD_OF_ANSWER, frames.HEADERS, frames.END_HEADERS, 0)[:5]
_GOOD_HEAD = frames.HEAD.pack(0, len(GOOD), frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0)[:5]
_NUMBER = struct.Struct(">I")
_ANSWER = struct.Struct(">HBBBIBI")
"""The head of a frame of data and the prefix of the message in it."""


class Application(Protocol):
    """What answers the calls of a port.

    Attributes:
        budget: What parts of messages count for.
        largest: Bytes that a message may have.
        most_streams: Calls that a connection may have at once.
    """

    budget: Budget
    largest: int
    most_streams: int

    def begin(self, stream: Stream) -> None:
        """A call has come; its messages have not."""
        ...

    def message(self, stream: Stream, payload: bytes | memoryview, *, compressed: bool) -> None:
        """A message has come whole."""
        ...

    def half_closed(self, stream: Stream) -> None:
        """No more messages come."""
        ...

    def lacks(self, stream: Stream, more: int) -> None:
        """A message that has begun to come is so many bytes larger than what its client may send unasked.

        Raises:
            ServerError: There is no room for it.
        """
        ...

    def refuse(self, stream: Stream, error: ServerError) -> None:
        """A message cannot be taken: ends the call."""
        ...

    def awaits(self, stream: Stream) -> bool:
        """Whether a message has to come whole soon."""
        ...

    def late(self, stream: Stream) -> None:
        """Its deadline is over: ends the call."""
        ...

    def drained(self, stream: Stream) -> None:
        """All that the call has to be sent has been."""
        ...

    def gone(self, stream: Stream) -> None:
        """Its client has ended it, or is gone; whatever is sent now is dropped."""
        ...


class Pings(Protocol):
    """How a client's pings are judged."""

    @property
    def least_seconds(self) -> float:
        """Pings that come sooner after one another are strikes."""
        ...

    @property
    def strikes(self) -> int:
        """How many there may be; 0 for any number."""
        ...


class Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        application: Answers its calls.
        streams: Calls that are not over, by number.
        heard: When something last came, on the loop's clock.
        begun: When it began.
        greeted: Whether the client has said that it speaks HTTP/2.
        leaving: Whether the client was told that it takes no more calls.
        parted: Whether nothing more is sent, nor looked at.
        pinged: When this side has asked whether the client is there; 0 where it has heard from it since.
        identity: The name in the client's certificate.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        application: Application,
        pings: Pings,
        made: Callable[[Connection], None],
        lost: Callable[[Connection], None],
    ) -> None:
        self.application = application
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self.begun = self.heard = self.loop.time()
        self.greeted = self.leaving = self.parted = False
        self.pinged = 0.0
        self.identity = ""
        self._pings, self._made, self._lost = pings, made, lost
        self._rest = b""
        self._heads = Heads()
        self._last = self._last_taken = 0
        """The last stream that the client has opened, and the last one that was looked at."""
        self._narrowed = False
        """Whether the client has made its table of headers smaller, and was sent none since."""
        self._block: tuple[int, int, bytearray] | None = None
        """Headers of which more are to come: stream, flags, what there is."""
        self._out: list[bytes] = []
        self._flushing = False
        self._owed = self._together = 0
        self._window = self._first_window = frames.FIRST_WINDOW
        self._sending: deque[Stream] = deque()
        self._writable = True
        self._patience, self._counted = _PATIENCE, self.begun
        self._last_ping, self._strikes = _LONG_AGO, 0
        self._gone = False

    @property
    def used(self) -> bool:
        """Whether it ever had a call."""
        return self._last > 0

    # The event loop's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Says hello (asyncio.Protocol)."""
        self.transport = transport
        self.identity = identity_from_peer(transport.get_extra_info("peercert"))
        stated = {
            frames.MAX_CONCURRENT_STREAMS: self.application.most_streams,
            frames.MAX_HEADER_LIST_SIZE: MOST_METADATA,
        }
        self.transport.write(frames.settings(stated) + frames.window_update(0, _ROOM - frames.FIRST_WINDOW))
        self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Everyone who waited is gone (asyncio.Protocol)."""
        self._gone = True
        for stream in list(self.streams.values()):
            self._drop(stream)
        self._lost(self)

    def pause_writing(self) -> None:
        """The client does not read: it is not read from either (asyncio.Protocol)."""
        self._writable = False
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It has read (asyncio.Protocol)."""
        self._writable = True
        if not self.ending:
            self.transport.resume_reading()
        self._pump()
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Takes what has come (asyncio.Protocol)."""
        if self.parted:
            return
        self.heard, self.pinged = self.loop.time(), 0.0
        try:
            if self._rest:
                data = self._rest + data
            if not self.greeted:
                data = self._greet(data)
            if self.greeted:
                self._take(data)
        except Broken as error:
            self.abandon(error.code, str(error))
        except Exception:
            log.exception("a bug in the server")
            self.abandon(Code.INTERNAL_ERROR, "internal error")
        if self._owed > _ROOM // 2:
            self._useful()
            self._out.append(frames.window_update(0, self._owed))
            self._owed = 0
        self._flush()

    # Frames.

    def _take(self, data: bytes) -> None:
        at, end = 0, len(data)
        streams, unpack, application = self.streams, frames.HEAD.unpack_from, self.application
        while end - at >= frames.HEAD_BYTES:
            high, low, kind, flags, number = unpack(data, at)
            size = high << 8 | low
            if size > frames.MOST_BYTES:
                raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            body = at + frames.HEAD_BYTES
            after = body + size
            if after > end:
                break
            at = after
            if kind == frames.DATA and self._block is None:
                self._owed += size
                stream = streams.get(number)
                if stream is None or flags > frames.END_STREAM or stream.ended:
                    self._odd_data(number, flags, data[body:after])
                    continue
                stream.credit -= size
                if stream.credit < 0:
                    self._spoil(stream, Code.FLOW_CONTROL_ERROR)
                    continue
                # Most are one whole message that is not compressed.
                if (
                    size >= PREFIX_BYTES
                    and not data[body]
                    and not stream.within
                    and int.from_bytes(data[body + 1 : body + PREFIX_BYTES], "big") == size - PREFIX_BYTES
                    and size <= application.largest
                ):
                    stream.ended = flags == frames.END_STREAM
                    application.message(stream, data[body + PREFIX_BYTES : after], compressed=False)
                    if flags and stream.open:
                        application.half_closed(stream)
                else:
                    self._data(stream, flags, data[body:after])
            else:
                self._control(kind, flags, number & frames.MOST_WINDOW, data[body:after])
            if self.ending:
                self._rest = b""
                return
        self._rest = data[at:]

    def _greet(self, data: bytes) -> bytes:
        """What comes behind the client's hello, once that has come whole."""
        size = len(frames.PREFACE)
        if not frames.PREFACE.startswith(data[:size]):
            raise Broken(Code.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
        self.greeted = len(data) >= size
        if not self.greeted:
            self._rest = data
        return data[size:]

    def _data(self, stream: Stream, flags: int, payload: bytes) -> None:
        if not payload and not flags & frames.END_STREAM:
            self._spend()
        stream.ended = bool(flags & frames.END_STREAM)
        try:
            stream.feed(payload)
        except ServerError as error:
            self.application.refuse(stream, error)
        if stream.ended and stream.open:
            self.application.half_closed(stream)

    def _odd_data(self, number: int, flags: int, payload: bytes) -> None:
        """Data with padding, or of no call that is open."""
        stream = self._known(number & frames.MOST_WINDOW)
        if stream is None:  # refused or answered while it was on its way
            if not payload:
                self._spend()
            return
        if stream.ended:
            self._spoil(stream, Code.STREAM_CLOSED)
            return
        stream.credit -= len(payload)
        if stream.credit < 0:
            self._spoil(stream, Code.FLOW_CONTROL_ERROR)
            return
        content = frames.bare(flags, payload)
        if len(content) < len(payload):
            self._spend()
            stream.allow(len(payload) - len(content))
        self._data(stream, flags, content)

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if (self._block is not None) != (kind == frames.CONTINUATION):
            raise Broken(Code.PROTOCOL_ERROR, "headers are not continued as they should be")
        if kind == frames.HEADERS:
            self._headers(number, flags, frames.bare(flags, payload, headers=True))
            return
        frames.check(kind, number, len(payload))
        if kind == frames.CONTINUATION:
            self._continue(number, flags, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._widen(number, payload)
        elif kind == frames.RST_STREAM:
            self._cancelled(number)
        elif kind == frames.SETTINGS:
            self._settle(flags, payload)
        elif kind == frames.PING:
            self._ping(flags, payload)
        elif kind == frames.GOAWAY:
            self._spend()  # it opens no more calls; those that are open are answered
        elif kind == frames.PUSH_PROMISE:
            raise Broken(Code.PROTOCOL_ERROR, "a client pushes nothing")
        else:  # PRIORITY, which is deprecated, and kinds that are not known
            self._spend()

    def _headers(self, number: int, flags: int, block: bytes) -> None:
        if not number:
            raise Broken(Code.PROTOCOL_ERROR, "headers of stream 0")
        if flags & frames.END_HEADERS:
            self._open(number, flags, block)
        else:
            self._block = number, flags, bytearray(block)

    def _continue(self, number: int, flags: int, payload: bytes) -> None:
        assert self._block is not None
        begun, first, block = self._block
        self._spend()
        block += payload
        if number != begun:
            raise Broken(Code.PROTOCOL_ERROR, "headers are continued on another stream")
        if len(block) > MOST_DECODED:
            raise Broken(Code.ENHANCE_YOUR_CALM, f"headers of more than {MOST_DECODED} bytes")
        if flags & frames.END_HEADERS:
            self._block = None
            self._open(number, first, bytes(block))

    def _open(self, number: int, flags: int, block: bytes) -> None:
        """A call, or the end of one."""
        if (stream := self.streams.get(number)) is not None:
            self._heads.skip(block)
            if stream.ended or not flags & frames.END_STREAM:
                self._spoil(stream, Code.PROTOCOL_ERROR)
            else:
                stream.ended = True
                self.application.half_closed(stream)
            return
        if number % 2 == 0:
            raise Broken(Code.PROTOCOL_ERROR, f"a client opens no stream {number}")
        if number <= self._last:
            self._spend()
            self._heads.skip(block)
            self._out.append(frames.reset(number, Code.STREAM_CLOSED))
            return
        self._last = number
        try:
            head = self._heads.read(block)
        except Malformed:
            self._spend()
            self._out.append(frames.reset(number, Code.PROTOCOL_ERROR))
            return
        if self.leaving:  # it was told that this one is not looked at
            return
        self._last_taken = number
        if len(self.streams) >= self.application.most_streams:
            self._spend()
            self._out.append(frames.reset(number, Code.REFUSED_STREAM))
            return
        stream = self.streams[number] = Stream(self, number, head, self._first_window)
        stream.ended = bool(flags & frames.END_STREAM)
        if head.status != 200:
            self._spend()
            self._end(stream, refusal(head.status))
            return
        self.application.begin(stream)
        if stream.ended and stream.open:
            self.application.half_closed(stream)

    def _known(self, number: int) -> Stream | None:
        """A call; None where it is over. Raises Broken where there was none."""
        if (stream := self.streams.get(number)) is None and not (0 < number <= self._last and number % 2):
            raise Broken(Code.PROTOCOL_ERROR, f"a frame of stream {number}, which was never opened")
        return stream

    def _widen(self, number: int, payload: bytes) -> None:
        more = _NUMBER.unpack(payload)[0] & frames.MOST_WINDOW
        if not number:
            self._window += more
            if not more:
                raise Broken(Code.PROTOCOL_ERROR, "a window is widened by nothing")
            if self._window > frames.MOST_WINDOW:
                raise Broken(Code.FLOW_CONTROL_ERROR, "a window that is too wide")
            self._pump()
            return
        stream = self._known(number)
        if stream is None:
            return
        stream.window += more
        if not more:
            self._spoil(stream, Code.PROTOCOL_ERROR)
        elif stream.window > frames.MOST_WINDOW:
            self._spoil(stream, Code.FLOW_CONTROL_ERROR)
        elif stream.pending and stream.window - more <= 0:
            self.pump(stream)

    def _cancelled(self, number: int) -> None:
        stream = self._known(number)
        self._spend()
        if stream is not None:
            self._drop(stream)

    def _settle(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise Broken(Code.FRAME_SIZE_ERROR, "settings that are acknowledged, and more")
            return
        self._spend()
        said = frames.settings_from_bytes(payload)
        if said.get(frames.HEADER_TABLE_SIZE, _USUAL_TABLE) < _USUAL_TABLE:
            self._narrowed = True
        if (window := said.get(frames.INITIAL_WINDOW_SIZE)) is not None:
            change, self._first_window = window - self._first_window, window
            sending = set(self._sending)
            for stream in self.streams.values():
                stream.window += change
                if stream.window > frames.MOST_WINDOW:
                    raise Broken(Code.FLOW_CONTROL_ERROR, "a window that is too wide")
                if stream.pending and stream not in sending:
                    self._sending.append(stream)
        self._out.append(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._pump()

    def _ping(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            return
        if self._last_ping != _LONG_AGO:  # nothing was sent since the last one
            self._spend()
        soon = self.heard - self._last_ping < self._pings.least_seconds
        self._last_ping = self.heard
        if soon and self._pings.strikes:
            self._strikes += 1
            if self._strikes > self._pings.strikes:
                raise Broken(Code.ENHANCE_YOUR_CALM, "too_many_pings")
        self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _spend(self) -> None:
        """Counts a frame that brings nothing; raises Broken where there are too many."""
        self._patience -= 1
        if self._patience < 0:
            now = self.loop.time()
            self._patience = min(_PATIENCE, (now - self._counted) * _PATIENCE_A_SECOND) - 1
            self._counted = now
            if self._patience < 0:
                raise Broken(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    # Out.

    def write(self, data: bytes) -> None:
        """Sends frames with whatever else this turn of the event loop sends."""
        self._useful()
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._together = 0
        if self._out:
            out = self._out
            self._out = []
            if not (self._gone or self.parted):
                self.transport.write(b"".join(out) if len(out) > 1 else out[0])

    def _useful(self) -> None:
        """The client is sent what it asked for: clients of gRPC ping beside it, to learn how fast the way is."""
        self._strikes, self._last_ping = 0, _LONG_AGO

    def allow(self, number: int, size: int) -> None:
        """Lets the client send so many bytes more of a call."""
        self.write(frames.window_update(number, size))

    def answer(self, stream: Stream, payload: bytes | memoryview) -> None:
        """Sends the one message of a call, and that it went well."""
        size = len(payload) + PREFIX_BYTES
        if not stream.open:
            return
        if (
            size > frames.MOST_BYTES
            or size > stream.window
            or size > self._window
            or self._sending
            or stream.headed
            or self._narrowed
        ):
            stream.send(payload)
            stream.finish(GOOD)
            return
        self._window -= size
        number = _NUMBER.pack(stream.number)
        head = _ANSWER.pack(size >> 8, size & 0xFF, frames.DATA, 0, stream.number, 0, size - PREFIX_BYTES)
        self.write(b"".join((_RESPONSE_HEAD, number, RESPONSE, head, payload, _GOOD_HEAD, number, GOOD)))
        self._close(stream)

    def finish(self, stream: Stream, block: bytes) -> None:
        """Ends a call with its trailers; all else was sent."""
        if stream.open:
            self._end(stream, block)

    def _end(self, stream: Stream, block: bytes) -> None:
        self.write_headers(stream, frames.END_HEADERS | frames.END_STREAM, block)
        self._close(stream)

    def write_headers(self, stream: Stream, flags: int, block: bytes) -> None:
        """Sends headers, or trailers."""
        if self._narrowed:
            block, self._narrowed = NO_TABLE + block, False
        self.write(frames.frame(frames.HEADERS, flags, stream.number, block))

    def _close(self, stream: Stream) -> None:
        """It is answered; a client that still sends is told that nobody reads."""
        self._patience = min(_PATIENCE, self._patience + 1)
        if not stream.ended:
            self.write(frames.reset(stream.number, Code.NO_ERROR))
        self._remove(stream)

    def reset(self, stream: Stream, code: Code) -> None:
        """Ends a call without a status."""
        if stream.open:
            self.write(frames.reset(stream.number, code))
            self._drop(stream)

    def _spoil(self, stream: Stream, code: Code) -> None:
        """Ends a call whose client does what HTTP/2 does not allow."""
        self.reset(stream, code)
        self._spend()

    def _drop(self, stream: Stream) -> None:
        """Nobody waits for it."""
        self._remove(stream)
        self.application.gone(stream)

    def _remove(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)
        if stream.pending:
            stream.pending.clear()
            if stream in self._sending:
                self._sending.remove(stream)
        stream.close()
        if self.leaving and not self.streams:
            self.part()

    def pump(self, stream: Stream) -> None:
        """Sends what a call has to be sent, as far as the client lets it."""
        if stream not in self._sending:
            self._sending.append(stream)
        self._pump()

    def _pump(self) -> None:
        """Sends data of all calls in turn, a frame of each."""
        now = 0.0
        if self._sending:
            self._useful()
            now = self.loop.time()
        while self._sending and self._writable and self._window > 0:
            stream = self._sending.popleft()
            if not stream.pending or stream.window <= 0:
                continue  # again when its window is wider
            piece = stream.pending[0]
            size = min(len(piece), frames.MOST_BYTES, stream.window, self._window)
            self._out.append(frames.frame(frames.DATA, 0, stream.number, piece[:size].tobytes()))
            stream.window -= size
            self._window -= size
            stream.moved = now
            if size < len(piece):
                stream.pending[0] = piece[size:]
                self._sending.append(stream)
            else:
                stream.pending.popleft()
                if stream.pending:
                    self._sending.append(stream)
                else:
                    stream.sent()
            self._together += size
            if self._together >= _PIECES:
                self._flush()
        if self._out and not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    # The end.

    def ping(self) -> None:
        """Asks whether the client is there."""
        self.pinged = self.loop.time()
        self.write(frames.frame(frames.PING, 0, 0, bytes(8)))

    def leave(self, code: Code = Code.NO_ERROR, text: str = "") -> None:
        """Takes no more calls, and ends when those that it has are answered."""
        if not self.leaving:
            self.leaving = True
            self.write(frames.goaway(self._last_taken, code, text))
            if not self.streams:
                self.part()

    def abandon(self, code: Code, text: str) -> None:
        """Ends it now, with the reason."""
        if self.ending:
            return
        self._out.append(frames.goaway(self._last_taken, code, text))
        self.part()
        for stream in list(self.streams.values()):
            self._drop(stream)

    @property
    def ending(self) -> bool:
        """Whether nothing that comes or goes matters any more."""
        return self._gone or self.parted or self.transport.is_closing()

    def part(self) -> None:
        """Sends what is left, and waits for the client to close its side too.

        Closed at once with bytes of the client's unread, as a client that is busy always has on their way, TCP would
        throw away what it has not read yet: its answers, and why the connection ends.
        """
        if self.ending:
            return
        self._flush()
        self.leaving = self.parted = True
        try:
            if self.transport.can_write_eof():
                self.transport.write_eof()
                self.transport.resume_reading()
                return
        except OSError:  # the client is gone
            pass
        self.transport.close()  # TLS waits for the other side by itself
