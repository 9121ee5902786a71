"""One connection of HTTP/2: what clients ask for beside their data, and the limits on it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

from convoynet.server.http2 import frames
from convoynet.server.http2.application import Application, Pings
from convoynet.server.http2.frames import Broken, Code
from convoynet.server.http2.headers import (
    MOST_DECODED,
    MOST_METADATA,
    Heads,
    Malformed,
    refusal,
)
from convoynet.server.http2.receiving import ROOM, Receiving, check_size
from convoynet.server.http2.sending import FAREWELL, LONG_AGO
from convoynet.server.http2.stream import Stream
from convoynet.server.security.tls import identity_from_peer

_USUAL_TABLE = 4096
_BRIEF_SECONDS = 0.01
"""A call keeps its place among those that a connection may have for so long, even if its client cancels it before."""
_NUMBER = struct.Struct(">I")


class Connection(Receiving):
    """One connection.

    Attributes:
        identity: The name in the client's certificate.
    """

    def __init__(
        self,
        application: Application,
        pings: Pings,
        made: Callable[[Connection], None],
        lost: Callable[[Connection], None],
    ) -> None:
        super().__init__(application)
        self.identity = ""
        self._pings, self._made, self._lost = pings, made, lost
        self._heads = Heads()
        self._brief, self._brief_since = 0, 0.0
        """Calls that were cancelled before their time, and since when they are counted."""

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
            frames.MAX_FRAME_SIZE: frames.LONGEST_DATA,
            frames.MAX_HEADER_LIST_SIZE: MOST_METADATA,
        }
        self.transport.write(frames.settings(stated) + frames.window_update(0, ROOM - frames.FIRST_WINDOW))
        self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Everyone who waited is gone (asyncio.Protocol)."""
        self._gone, self._frame, self._block = True, None, None
        self._count_headers()
        self._end_farewell()
        for stream in list(self.streams.values()):
            self._drop(stream)
        self._lost(self)

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        check_size(kind, len(payload))
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
            self._count_headers()

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
        self._count_headers()
        if flags & frames.END_HEADERS:
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
        if self.leaving and self.shut.is_set():  # it was told that this one is not looked at
            return
        self._last_taken = number
        if len(self.streams) + self._brief >= self.application.most_streams and not self._has_room():
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
        if (stream := self._known(number)) is None:
            self._spend()
            return
        if self.heard - stream.begun < _BRIEF_SECONDS:
            self._has_room()
            self._brief += 1
        self._drop(stream)

    def _has_room(self) -> bool:
        """Whether there may be one more call; those that were cancelled a while ago count no more.

        Clients whose calls have deadlines cancel any number of them where the server is busy. What they must not is
        have more of them begun than there may be at once.
        """
        if self.heard - self._brief_since >= _BRIEF_SECONDS:
            self._brief, self._brief_since = 0, self.heard
        return len(self.streams) + self._brief < self.application.most_streams

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
            if self.leaving and payload == FAREWELL:
                self.close_door()
            return
        if self._last_ping != LONG_AGO:  # nothing was sent since the last one
            self._spend()
        soon = self.heard - self._last_ping < self._pings.least_seconds
        self._last_ping = self.heard
        if soon and self._pings.strikes:
            self._strikes += 1
            if self._strikes > self._pings.strikes:
                raise Broken(Code.ENHANCE_YOUR_CALM, "too_many_pings")
        self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
