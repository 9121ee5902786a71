"""The half of a connection of HTTP/2 that reads: bytes become frames, and data is put where it stays."""

from __future__ import annotations

import logging
import threading

from convoynet.server.errors import OverBudget, ServerError
from convoynet.server.http2 import frames
from convoynet.server.http2.application import Application
from convoynet.server.http2.frames import Broken, Code
from convoynet.server.http2.headers import MOST_DECODED
from convoynet.server.http2.sending import Sending
from convoynet.server.http2.stream import PREFIX_BYTES, Stream

log = logging.getLogger(__name__)

ROOM = 2**30
"""What a client may send on a connection before it hears from it: what counts are the windows of its calls."""
_LONGEST = {frames.DATA: frames.LONGEST_DATA, frames.HEADERS: MOST_DECODED, frames.CONTINUATION: MOST_DECODED}
"""Bytes of frames that may have more than MOST_BYTES."""
_LONG_HEADERS = frames.HEAD_BYTES + frames.MOST_BYTES
"""Bytes of headers from which they count while they are not whole."""
_LANDING_BYTES = 2**17
_IN_PLACE = 2**15
"""Bytes of a frame from which its data has a read of its own: a call of the system costs what copying so many does."""


class _Landing(threading.local):
    """Where bytes are read to: one for all connections of a thread, since they are taken in the same turn."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_LANDING_BYTES))


_landing = _Landing()


class Receiving(Sending):
    """The half of a connection that reads; what is no data is for whoever derives from it.

    Attributes:
        greeted: Whether the client has said that it speaks HTTP/2.
    """

    def __init__(self, application: Application) -> None:
        super().__init__(application)
        self.greeted = False
        self._last = 0
        """The last stream that the client has opened."""
        self._block: tuple[int, int, bytearray] | None = None
        """Headers of which more are to come: stream, flags, what there is."""
        self._owed = 0
        self._landing = _landing.view
        self._kept = bytearray()
        self._short = 0
        """Of a frame that has to come whole: what there is, and at least so many bytes more."""
        self.headers_since = 0.0
        """When long headers began to come that are not whole; 0 where there are none."""
        self._counted_headers = 0
        """Bytes of them, of what the application may hold."""
        self._left = 0
        """Bytes that are to come of a frame of data whose beginning was taken ..."""
        self._frame: tuple[Stream | None, int] | None = None
        """... its call, if it has one, and flags."""
        self._padding = 0
        """Bytes behind them that mean nothing."""
        self._placing = False
        """Whether they are being read to their place in a message."""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes are to be read to (asyncio.BufferedProtocol)."""
        self._placing = False
        if self._left >= _IN_PLACE and self._frame is not None and (stream := self._frame[0]) is not None:
            place = stream.place(self._left)
            if place is not None and len(place) >= _IN_PLACE:
                self._placing = True  # the view itself is not kept: it may be that nothing has come
                return place
        return self._landing

    def buffer_updated(self, nbytes: int) -> None:
        """Takes what has come (asyncio.BufferedProtocol)."""
        if self._placing:
            self.data_received(b"", nbytes)
        else:
            landed = self._landing[:nbytes]
            self.data_received(bytes(landed) if nbytes < _IN_PLACE else landed)  # slices of bytes are faster, if short

    def data_received(self, data: bytes | memoryview, placed: int = 0) -> None:
        """Takes what has come: bytes, or so many of the frame that was begun which are in their place already."""
        if self.parted:
            return
        self.heard, self.pinged = self.loop.time(), 0.0
        try:
            if self._short:
                data = self._joined(data)
            elif self._frame is not None:
                data = self._rest(data, placed)
            if data and not self.greeted:
                data = self._greet(data)
            if data and self.greeted:
                self._take(data)
        except Broken as error:
            self.abandon(error.code, str(error))
        except Exception:
            log.exception("a bug in the server")
            self.abandon(Code.INTERNAL_ERROR, "internal error")
        if self._owed > ROOM // 2:
            self._useful()
            self._out.append(frames.window_update(0, self._owed))
            self._owed = 0
        self._flush()

    def _joined(self, data: bytes | memoryview) -> memoryview:
        """What was kept, and what has come after it, once it is enough; nothing before."""
        self._kept += data  # as few bytes as they are, however small the pieces
        self._short -= len(data)
        if self._short > 0:
            return memoryview(b"")
        whole = memoryview(self._kept)
        self._kept, self._short = bytearray(), 0
        if self._counted_headers:
            self._count_headers()
        return whole

    def _keep(self, data: bytes | memoryview, short: int) -> None:
        """Keeps the beginning of a frame until so many bytes more are there."""
        if len(data) + short > _LONG_HEADERS:
            self._count_headers(len(data) + short)
        self._kept, self._short = bytearray(data), short

    def _count_headers(self, coming: int = 0) -> None:
        """Counts long headers that have not come whole, `coming` bytes of them as one frame: no other frame waits so.

        Raises:
            Broken: There is no room for them.
        """
        block = 0 if self._block is None else len(self._block[2])
        wanted, budget = coming + (block if block > _LONG_HEADERS else 0), self.application.budget
        self.headers_since = (self.headers_since or self.heard) if wanted else 0.0
        if wanted <= self._counted_headers:
            budget.give(self._counted_headers - wanted)
        else:
            try:
                budget.take(wanted - self._counted_headers)
            except OverBudget as error:
                raise Broken(Code.ENHANCE_YOUR_CALM, f"no room for headers of {wanted} bytes") from error
        self._counted_headers = wanted

    # Frames.

    def _take(self, data: bytes | memoryview) -> None:
        at, end = 0, len(data)
        streams, unpack, application = self.streams, frames.HEAD.unpack_from, self.application
        while end - at >= frames.HEAD_BYTES:
            high, low, kind, flags, number = unpack(data, at)
            size = high << 8 | low
            body = at + frames.HEAD_BYTES
            after = body + size
            if after > end:
                check_size(kind, size)
                if lacking := self._begin(number, flags, size, data[body:]) if kind == frames.DATA else after - end:
                    self._keep(data[at:], lacking)
                return
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
                    application.message(stream, bytes(data[body + PREFIX_BYTES : after]), compressed=False)
                    if flags and stream.open:
                        application.half_closed(stream)
                else:
                    self._data(stream, flags, data[body:after])
            else:
                self._control(kind, flags, number & frames.MOST_WINDOW, bytes(data[body:after]))
            if self.ending:
                return
        if at < end:
            self._keep(data[at:], frames.HEAD_BYTES - (end - at))

    def _greet(self, data: bytes | memoryview) -> bytes | memoryview:
        """What comes behind the client's hello, once that has come whole."""
        size = len(frames.PREFACE)
        if not frames.PREFACE.startswith(bytes(data[:size])):
            raise Broken(Code.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
        self.greeted = len(data) >= size
        if not self.greeted:
            self._keep(data, size - len(data))
        return data[size:]

    def _begin(self, number: int, flags: int, size: int, part: bytes | memoryview) -> int:
        """Takes the beginning of a frame of data, if it is long or of a large message; others have to come whole.

        Returns:
            How many bytes more have to come before it can be taken; 0 where it was.
        """
        stream = self.streams.get(number)
        if size <= frames.MOST_BYTES and (stream is None or flags > frames.END_STREAM or not stream.fills(part)):
            return size - len(part)
        if self._block is not None:
            raise Broken(Code.PROTOCOL_ERROR, "headers are not continued as they should be")
        padded = flags & frames.PADDED
        if padded and not part:  # it says first how much of it is padding
            return 1
        self._owed += size
        stream = self._usable(number & frames.MOST_WINDOW, size)
        self._left, self._padding = size, 0
        if padded:
            self._padding, part = part[0], part[1:]
            self._left = size - 1 - self._padding  # more than nothing: a frame that may come whole is not begun
            if stream is not None:
                self._drop_padding(stream, 1 + self._padding)
        self._frame = stream, flags & frames.END_STREAM
        if part:
            self._rest(part)
        return 0

    def _rest(self, data: bytes | memoryview, placed: int = 0) -> bytes | memoryview:
        """Takes more of the frame that was begun, where there is one, and its padding; what comes behind it."""
        while self._frame is not None and (data or placed):
            part, data = data[: self._left], data[self._left :]
            self._go_on(*self._frame, part, placed)
            placed = 0
        return data

    def _drop_padding(self, stream: Stream, size: int) -> None:
        """Counts padding, and lets the client send as much again."""
        self._spend()
        stream.credit -= size
        stream.allow(size)

    def _go_on(self, stream: Stream | None, flags: int, part: bytes | memoryview, placed: int = 0) -> None:
        """Takes more of the frame that was begun: what is in its place already, or `part`."""
        size = placed or len(part)
        self._left -= size
        last = not self._left
        if last:
            self._frame = (None, 0) if self._padding else None  # padding is as data of nobody
            self._left, self._padding = self._padding, 0
        if stream is None or not stream.open:
            return
        stream.ended = flags == frames.END_STREAM and last
        stream.credit -= size
        try:
            if placed:
                stream.came(size)
            else:
                stream.feed(part)
        except ServerError as error:
            self.application.refuse(stream, error)
        if stream.ended and stream.open:
            self.application.half_closed(stream)

    def _data(self, stream: Stream, flags: int, payload: bytes | memoryview) -> None:
        if not payload and not flags & frames.END_STREAM:
            self._spend()
        stream.ended = bool(flags & frames.END_STREAM)
        try:
            stream.feed(payload)
        except ServerError as error:
            self.application.refuse(stream, error)
        if stream.ended and stream.open:
            self.application.half_closed(stream)

    def _usable(self, number: int, size: int) -> Stream | None:
        """The call that so much data is for, if it may have that."""
        stream = self._known(number)
        if stream is None:  # refused or answered while it was on its way
            if not size:
                self._spend()
        elif stream.ended:
            self._spoil(stream, Code.STREAM_CLOSED)
        elif size > stream.credit:
            self._spoil(stream, Code.FLOW_CONTROL_ERROR)
        else:
            return stream
        return None

    def _odd_data(self, number: int, flags: int, payload: bytes | memoryview) -> None:
        """Data with padding, or of no call that is open."""
        stream = self._usable(number & frames.MOST_WINDOW, len(payload))
        if stream is None:
            return
        content = frames.bare(flags, bytes(payload))
        stream.credit -= len(content)
        if len(content) < len(payload):
            self._drop_padding(stream, len(payload) - len(content))
        self._data(stream, flags, content)

    def _known(self, number: int) -> Stream | None:
        """A call; None where it is over. Raises Broken where there was none."""
        if (stream := self.streams.get(number)) is None and not (0 < number <= self._last and number % 2):
            raise Broken(Code.PROTOCOL_ERROR, f"a frame of stream {number}, which was never opened")
        return stream

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Takes a frame that is not data."""
        raise NotImplementedError


def check_size(kind: int, size: int) -> None:
    """Raises Broken for a frame that is larger than one of its kind may be."""
    if size > frames.MOST_BYTES and size > _LONGEST.get(kind, 0):
        raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
