"""One call on its connection: the messages that come, and what goes out and how far the client lets it."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from convoynet.server.errors import InvalidRequest, MessageTooLarge
from convoynet.server.http2.frames import END_HEADERS, FIRST_WINDOW, Code
from convoynet.server.http2.headers import RESPONSE, Head, trailers

if TYPE_CHECKING:
    from convoynet.server.http2.connection import Connection

_PREFIX = struct.Struct(">BI")
PREFIX_BYTES = 5
_LARGE = 2**16


class Stream:
    """One call.

    Attributes:
        head: What its headers say.
        begun: When it began, on the loop's clock.
        since: When its last message began to come, or it did itself.
        size: Bytes of the message that comes, or came last.
        guest: Whether the message that comes is put in memory of the application's.
        ended: Whether the client sends nothing more.
        open: Whether it is still due something.
        note: Whatever the application keeps with it.
        credit: Bytes that the client may still send.
        window: Bytes that may still be sent to it.
        moved: When something was last sent to it.
    """

    __slots__ = (
        *(
            "begun",
            "connection",
            "credit",
            "ended",
            "head",
            "headed",
            "moved",
            "note",
            "number",
            "open",
            "since",
            "size",
            "window",
        ),
        *("_compressed", "_done", "_held", "_missing", "_prefix", "_reserved", "_trailers", "_whole"),
        *("guest", "pending"),
    )

    def __init__(self, connection: Connection, number: int, head: Head, window: int) -> None:
        self.connection, self.number, self.head, self.window = connection, number, head, window
        self.begun = self.moved = self.since = connection.heard
        self.credit = FIRST_WINDOW
        self.size = 0
        self.ended = self.headed = False
        self.open = True
        self.guest = False
        self.note: Any = None
        self.pending: deque[memoryview] = deque()
        """What is to be sent and could not be yet."""
        self._trailers: bytes | None = None
        self._prefix = b""
        self._missing = -1
        self._whole: bytes | bytearray | memoryview = b""
        self._compressed = False
        self._held = self._reserved = 0
        self._done: list[Callable[[], None]] = []

    # What comes.

    @property
    def within(self) -> bool:
        """Whether a part of a message has come."""
        return self._missing >= 0 or bool(self._prefix)

    def feed(self, data: bytes | memoryview) -> None:
        """Takes what has come, and tells the application of each message that is whole.

        Raises:
            ServerError: A message is too large, or there is no room for it.
        """
        application = self.connection.application
        if isinstance(self._whole, memoryview) and len(data) < self._missing:  # most of a large message
            self._hold(len(data))
            at = len(self._whole) - self._missing
            self._whole[at : at + len(data)] = data
            self._missing -= len(data)
            return
        while self.open:
            if self._missing < 0:
                if not data:
                    return
                self.since = self.connection.heard
                known = len(self._prefix)
                self._prefix, data = self._prefix + data[: PREFIX_BYTES - known], data[PREFIX_BYTES - known :]
                if len(self._prefix) < PREFIX_BYTES:
                    return
                compressed, self._missing = _PREFIX.unpack(self._prefix)
                self._prefix, self._compressed, self.size = b"", compressed != 0, self._missing
                if self._missing > application.largest:
                    raise MessageTooLarge(
                        f"SERVER: Received message larger than max ({self._missing} vs. {application.largest})"
                    )
                if compressed > 1:
                    raise InvalidRequest(f"a message says {compressed} where it is 1 if compressed, else 0")
                if self._missing - len(data) > self.credit:
                    application.lacks(self, self._missing - len(data) - self.credit)
                if self._missing > _LARGE:
                    self._whole = self._memory()
            part = data[: self._missing] if len(data) > self._missing else data
            data = data[len(part) :]
            self._missing -= len(part)
            if self._missing:
                if not part:
                    return
                self._hold(len(part))
                self._put(part)
                continue
            self._put(part)
            self._deliver()

    def _deliver(self) -> None:
        whole, self._whole, self._missing, self.guest = self._whole, b"", -1, False
        self.let_go()
        whole = bytes(whole) if isinstance(whole, bytearray) else whole
        self.connection.application.message(self, whole, compressed=self._compressed)

    def _put(self, part: bytes | memoryview) -> None:
        """Takes a part of a message; a large one is put where it stays."""
        if isinstance(self._whole, memoryview):
            at = len(self._whole) - self._missing
            self._whole[at - len(part) : at] = part
        elif isinstance(self._whole, bytearray):
            self._whole += part
        else:
            self._whole = bytearray(part) if self._missing else bytes(part)

    # What comes of a large message: its frames are read to where it stays.

    def _memory(self) -> memoryview:
        """For a message of which nothing has come: pages of it are there when they are written to."""
        place = None if self._compressed else self.connection.application.place(self, self._missing)
        self.guest = place is not None
        return place or np.empty(self._missing, np.uint8).data

    def fills(self, part: bytes | memoryview) -> bool:
        """Whether a frame that begins so is of a large message."""
        if self._missing >= 0:
            return isinstance(self._whole, memoryview)
        return not self._prefix and len(part) >= PREFIX_BYTES and _PREFIX.unpack_from(part)[1] > _LARGE

    def place(self, left: int) -> memoryview | None:
        """Where the next bytes of a frame with so many left may be read to; None where they are of no large message."""
        if not isinstance(self._whole, memoryview):
            return None
        at = len(self._whole) - self._missing
        return self._whole[at : at + min(left, self._missing)]

    def came(self, size: int) -> None:
        """So many bytes of a message were read to where place() says.

        Raises:
            ServerError: There is no room for them.
        """
        self._missing -= size
        if self._missing:
            self._hold(size)
        else:
            self._deliver()

    def move_out(self) -> None:
        """Gives the application's memory back: the rest of the message is too long in coming."""
        if self.guest and isinstance(self._whole, memoryview):
            own, come = np.empty(len(self._whole), np.uint8).data, len(self._whole) - self._missing
            own[:come] = self._whole[:come]
            self._whole, self.guest = own, False

    @property
    def lacking(self) -> int:
        """How many bytes more the client would have to be let send for its message to be whole."""
        return max(0, self._missing - self.credit)

    @property
    def held(self) -> int:
        """Bytes of a message that have come."""
        return self._held

    def allow(self, size: int) -> None:
        """Lets the client send so many bytes more."""
        if self.open and not self.ended:
            self.credit += size
            self.connection.allow(self.number, size)

    def reserve(self, size: int) -> None:
        """Counts so many bytes of a message before they come, and lets the client send them; raises OverBudget."""
        if not self.open:  # nobody would give it back
            return
        self.connection.application.budget.take(size, self.size)
        self._held += size
        self._reserved += size
        self.allow(size)

    def _hold(self, size: int) -> None:
        new = max(0, size - self._reserved)
        self._reserved -= size - new
        if new:
            self.connection.application.budget.take(new, self.size)
            self._held += new

    def let_go(self) -> None:
        """Nothing of a message is held here any more."""
        if self._held:
            self.connection.application.budget.give(self._held)
            self._held = self._reserved = 0

    # What goes.

    def send(self, payload: bytes | memoryview) -> None:
        """Sends a message; what the client does not let through yet waits here."""
        if not self.open:
            return
        self._write_head()
        if not self.pending:
            self.moved = self.connection.loop.time()
        self.pending.append(memoryview(_PREFIX.pack(0, len(payload)) + payload))
        self.connection.pump(self)

    def _write_head(self) -> None:
        if not self.headed:
            self.headed = True
            self.connection.write_headers(self, END_HEADERS, RESPONSE)

    def finish(self, trailers: bytes) -> None:
        """Ends the call when what is to be sent has been."""
        if self.open and self._trailers is None:
            self._trailers = trailers
            if not self.pending:
                self.connection.finish(self, trailers)

    def fail(self, code: int, text: str, more: Iterable[tuple[str, str]] = ()) -> None:
        """Ends the call with a status that is not OK."""
        self.finish(trailers(code, text, more, alone=not self.headed))

    def sent(self) -> None:
        """All that was to be sent has been."""
        if self._trailers is not None:
            self.connection.finish(self, self._trailers)
        else:
            self.connection.application.drained(self)

    @property
    def finishing(self) -> bool:
        """Whether its end is said, and only has to be sent."""
        return self._trailers is not None

    def on_close(self, done: Callable[[], None]) -> None:
        """Has `done` called when the call is over, at once where it is."""
        if self.open:
            self._done.append(done)
        else:
            done()

    def close(self) -> None:
        """It is over."""
        self.open = False
        self.pending.clear()
        self._whole, self.guest = b"", False
        self.let_go()
        for done in self._done:
            done()
        self._done.clear()

    def cancel(self, code: Code = Code.CANCEL) -> None:
        """Ends it without a status."""
        self.connection.reset(self, code)
