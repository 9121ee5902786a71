"""What a connection of HTTP/2 asks of whoever it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from convoynet.server.errors import ServerError
from convoynet.server.memory.budget import Budget

if TYPE_CHECKING:
    from convoynet.server.http2.stream import Stream


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

    def place(self, stream: Stream, size: int) -> memoryview | None:
        """Memory that a message of so many bytes may be put in as it comes; None for memory of its own.

        What was placed and does not come whole is dropped; Stream.move_out() is called where it takes long.
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
