"""What goes out on a connection of HTTP/2: answers as far as the client lets them, and the connection's end."""

from __future__ import annotations

import asyncio
import struct
from collections import deque

from convoynet.server.http2 import frames
from convoynet.server.http2.application import Application
from convoynet.server.http2.frames import Broken, Code
from convoynet.server.http2.headers import GOOD, NO_TABLE, RESPONSE
from convoynet.server.http2.stream import PREFIX_BYTES, Stream

_PATIENCE, _PATIENCE_A_SECOND = 1000.0, 200.0
"""How many frames that ask for work and bring none a connection may send, at once and in a second."""
FAREWELL_SECONDS = 1.0
"""What a client may take to hear that it should open no more calls; those that it has opened by then are taken."""
FAREWELL = b"farewell"
"""The ping behind that."""
LONG_AGO = -float("inf")
_PIECES = 2**16
"""Bytes of answers that are put together at a time, before anyone looks whether the client reads."""
_RESPONSE_HEAD = frames.HEAD.pack(0, len(RESPONSE), frames.HEADERS, frames.END_HEADERS, 0)[:5]
_GOOD_HEAD = frames.HEAD.pack(0, len(GOOD), frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0)[:5]
_NUMBER = struct.Struct(">I")
_ANSWER = struct.Struct(">HBBBIBI")
"""The head of a frame of data and the prefix of the message in it."""


class Sending(asyncio.BufferedProtocol):
    """The half of a connection that sends.

    Attributes:
        application: Answers its calls.
        streams: Calls that are not over, by number.
        heard: When something last came, on the loop's clock.
        begun: When it began.
        leaving: Whether the client was told to open no more calls.
        shut: Set when it takes none: those that come now were never looked at, and the client knows that.
        parted: Whether nothing more is sent, nor looked at.
        pinged: When this side has asked whether the client is there; 0 where it has heard from it since.
        held: Whether nothing is read, since what it asks for could go nowhere.
    """

    transport: asyncio.Transport

    def __init__(self, application: Application) -> None:
        self.application = application
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self.begun = self.heard = self.loop.time()
        self.leaving = self.parted = self.held = False
        self.pinged = 0.0
        self.shut = asyncio.Event()
        self._reason = Code.NO_ERROR, ""
        self._farewell: asyncio.TimerHandle | None = None
        self._last_taken = 0
        """The last stream that was looked at."""
        self._narrowed = False
        """Whether the client has made its table of headers smaller, and was sent none since."""
        self._out: list[bytes] = []
        self._flushing = False
        self._together = 0
        self._window = self._first_window = frames.FIRST_WINDOW
        self._sending: deque[Stream] = deque()
        self._writable = True
        self._patience, self._counted = _PATIENCE, self.begun
        self._last_ping, self._strikes = LONG_AGO, 0
        self._gone = False

    def pause_writing(self) -> None:
        """The client does not read: it is not read from either (asyncio.Protocol)."""
        self._writable = False
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It has read (asyncio.Protocol)."""
        self._writable = True
        self._read_again()
        self._pump()
        self._flush()

    def hold(self, held: bool) -> None:
        """Reads nothing while `held`."""
        self.held = held
        if not held:
            self._read_again()
        elif not self.ending:
            self.transport.pause_reading()

    def _read_again(self) -> None:
        if self._writable and not self.held and not self.ending:
            self.transport.resume_reading()

    def _spend(self) -> None:
        """Counts a frame that brings nothing; raises Broken where there are too many."""
        self._patience -= 1
        if self._patience < 0:
            now = self.loop.time()
            self._patience = min(_PATIENCE, (now - self._counted) * _PATIENCE_A_SECOND) - 1
            self._counted = now
            if self._patience < 0:
                raise Broken(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

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
        self._strikes, self._last_ping = 0, LONG_AGO

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
        if self.leaving and not self.streams and self.shut.is_set():
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
        """Has the client open no more calls, and ends when those that it has are answered.

        Calls that are on their way when it hears of this are taken as well, unless there is an error: it answers a ping
        behind what it has sent before, and has FAREWELL_SECONDS for that (RFC 9113, section 6.8).
        """
        if self.leaving:
            return
        self.leaving, self._reason = True, (code, text)
        if code is not Code.NO_ERROR:
            self.close_door()
            return
        self.write(frames.goaway(frames.MOST_WINDOW, code, text) + frames.frame(frames.PING, 0, 0, FAREWELL))
        self._farewell = self.loop.call_later(FAREWELL_SECONDS, self.close_door)

    def close_door(self) -> None:
        """Takes no more calls: the client is told which was the last."""
        if self.ending or self.shut.is_set():
            return
        self._end_farewell()
        self.write(frames.goaway(self._last_taken, *self._reason))
        if not self.streams:
            self.part()

    def _end_farewell(self) -> None:
        """Nobody waits for its end any more."""
        self.shut.set()
        if self._farewell is not None:
            self._farewell.cancel()
            self._farewell = None

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
        self._end_farewell()
        try:
            if self.transport.can_write_eof():
                self.transport.write_eof()
                self.transport.resume_reading()
                return
        except OSError:  # the client is gone
            pass
        self.transport.close()  # TLS waits for the other side by itself
