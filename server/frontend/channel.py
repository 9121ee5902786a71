"""Messages between two processes: what is small over a stream socket, payloads through shared memory."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np

RING_BYTES = 8 * 2**20
"""Shared memory of one direction. A payload that is larger than what is free travels in pieces as that comes free."""

SHELF_BYTES = 16 * 2**20
"""Shared memory beside the ring for payloads that the reader leaves where they are until nobody needs them."""

ACK, RETURN = 0, 255
"""The kinds of messages that are the channel's own: one only tells how much was read, the other that a payload on the
shelf is not needed any more."""

_HEAD = struct.Struct("<IBBQQII")
"""Bytes of `meta` that follow, kind, how the payload comes, call, bytes read so far, offset, length."""
_WHOLE, _GOES_ON, _ON_THE_SHELF = 0, 1, 2
_SHELVED_FROM = 64 * 2**10
"""Bytes of a payload: copying fewer costs less than the message that returns their place."""
_BLOCK = 64 * 2**10
_MOST_WAITING = 1024
"""Messages that may wait for memory before the channel is full."""

Received = Callable[[int, int, bytes, Any], None]
"""The payload is bytes, or a memoryview of what lies on the shelf."""


def shared_memory(shelf: int = 0) -> int:
    """A file descriptor of anonymous memory for a ring and a shelf; it goes when the last process that has it ends."""
    descriptor = os.memfd_create("convoy-frontend")
    os.ftruncate(descriptor, RING_BYTES + shelf)
    return descriptor


class Ring:
    """The writer's account of one direction's memory: spans are taken in order and come free in the same order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.freed = 0
        """Bytes that the reader has read in all."""
        self._taken = 0
        self._head = 0

    def take(self, wanted: int) -> tuple[int, int]:
        """The offset and the length of a span that may be written; shorter than wanted where it must, 0 where full."""
        used = self._taken - self.freed
        if not used:
            # From the start again: small traffic stays in the processor's cache and touches few pages.
            self._head = 0
        offset = self._head
        length = min(wanted, self.size - offset, self.size - used)
        self._head = (offset + length) % self.size
        self._taken += length
        return offset, length


class Shelf:
    """The writer's account of memory whose spans come free in any order."""

    def __init__(self, begin: int, size: int) -> None:
        """Args: where it begins in the memory of its direction, and its bytes."""
        self._begin = begin
        self._used = bytearray(size // _BLOCK)
        self._spans: dict[int, int] = {}
        self._promised = 0
        """Blocks of spans that are being filled."""
        self.dropped: deque[int] = deque()
        """Offsets of those that nobody fills any more; any thread adds to it."""

    def promise(self, length: int) -> int:
        """As take(), for a payload that is still to come, or not: such may have half of the shelf together."""
        while self.dropped:
            offset = self.dropped.popleft()
            self.fulfil(offset)
            self.give_back(offset)
        count = -(-length // _BLOCK)
        if (self._promised + count) * 2 > len(self._used) or (offset := self.take(length)) < 0:
            return -1
        self._promised += count
        return offset

    def fulfil(self, offset: int) -> None:
        """The payload that was promised is there."""
        self._promised -= self._spans[offset]

    def take(self, length: int) -> int:
        """The offset of a span of that length, which may be written; -1 where there is none."""
        count = -(-length // _BLOCK)
        at = self._used.find(bytes(count))
        if at < 0:
            return -1
        self._used[at : at + count] = b"\1" * count
        offset = self._begin + at * _BLOCK
        self._spans[offset] = count
        return offset

    def give_back(self, offset: int) -> None:
        """The span there is free again."""
        count = self._spans.pop(offset)
        at = (offset - self._begin) // _BLOCK
        self._used[at : at + count] = bytes(count)


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """The bytes of a payload on the shelf: whatever is a view of them, in any thread, keeps them there."""

    def lend(self, offset: int, returned: deque[int]) -> memoryview:
        """The bytes, whose offset is added to `returned` when nobody has them any more."""
        self._offset, self._returned = offset, returned
        return self.data.toreadonly()

    def __del__(self) -> None:
        self._returned.append(self._offset)


class _Promised(np.ndarray[Any, np.dtype[np.uint8]]):
    """A span of the shelf for a payload that is to come: free when nobody has a view of it and it was not sent."""

    def lend(self, offset: int, dropped: deque[int]) -> memoryview:
        """The memory, whose offset is added to `dropped` in that case."""
        self.offset, self._dropped, self.sent = offset, dropped, False
        return self.data

    def __del__(self) -> None:
        if not self.sent:
            self._dropped.append(self.offset)


class Channel(asyncio.Protocol):
    """One end. Messages arrive whole and in the order in which they were sent; send() never waits.

    Attributes:
        full: Whether the other end does not read as fast as this one writes: who sends more has it lie here.
        on_full: Called with that whenever it changes.

    Args:
        outgoing, incoming: The shared memory of either direction.
        received: Called with kind, call, meta and payload of each message.
        lost: Called once when the other end is gone.
        shelf: Bytes at the end of the outgoing memory that are a shelf. What lies there is received as a view of it.
    """

    def __init__(
        self,
        outgoing: mmap.mmap,
        incoming: mmap.mmap,
        received: Received,
        lost: Callable[[], None],
        shelf: int = 0,
    ) -> None:
        self._out, self._in = outgoing, incoming
        self._received, self._lost = received, lost
        self._ring = Ring(len(outgoing) - shelf)
        self._shelf = Shelf(self._ring.size, shelf)
        self._returned: deque[int] = deque()
        """Offsets of what was lent and is not needed any more; any thread adds to it."""
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._read = self._told = 0
        self._pieces: list[bytes] = []
        self._meta = b""
        self._waiting: deque[tuple[int, int, bytes, memoryview, Callable[[], None] | None]] = deque()
        self._unsent: list[bytes] = []
        self.full = self._paused = False
        self.on_full: Callable[[bool], None] = lambda full: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        # uvloop's transports derive from no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        while self._waiting:
            if (left := self._waiting.popleft()[-1]) is not None:
                left()
        self._look_if_full()
        # Not closed: what is on the shelf may still be read. The memory goes with the last view of it.
        del self._out, self._in
        self._lost()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._paused = True
        self._look_if_full()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._paused = False
        self._look_if_full()

    def _look_if_full(self) -> None:
        full = self._transport is not None and (self._paused or len(self._waiting) > _MOST_WAITING)
        if full != self.full:
            self.full = full
            self.on_full(full)

    def close(self) -> None:
        """Sends what is left in the socket's buffer, then ends the connection."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def place(self, length: int) -> memoryview | None:
        """Memory of the shelf for a payload that comes piece by piece; None where there is no room, or no other end.

        When it is there it is to be sent as it is, and nobody may write to it any more. What is dropped without that
        is given back by itself.
        """
        if self._transport is None or (offset := self._shelf.promise(length)) < 0:
            return None
        return _Promised(length, np.uint8, self._out, offset).lend(offset, self._shelf.dropped)

    def send(
        self,
        kind: int,
        call: int,
        meta: bytes = b"",
        payload: bytes | memoryview = b"",
        left: Callable[[], None] | None = None,
    ) -> None:
        """Sends a message; where the memory is full it goes out as the other end reads. Nothing once that is gone.

        A payload from place() needs no memory more, so that it overtakes what waits for some. With one that has none
        `left` may be given: it is called when neither this message nor any that was sent before waits here any more.
        """
        if self._transport is None:
            if left is not None:
                left()
            return
        if isinstance(payload, memoryview) and isinstance(owner := payload.obj, _Promised):
            owner.sent = True
            self._shelf.fulfil(owner.offset)
            self._write(_HEAD.pack(len(meta), kind, _ON_THE_SHELF, call, self._read, owner.offset, len(payload)) + meta)
            return
        if self._waiting:
            self._waiting.append((kind, call, meta, memoryview(payload), left))
            self._look_if_full()
            return
        if left is not None:
            left()
        length = len(payload)
        offset = taken = 0
        if length >= _SHELVED_FROM and (offset := self._shelf.take(length)) >= 0:
            self._out[offset : offset + length] = payload
            self._write(_HEAD.pack(len(meta), kind, _ON_THE_SHELF, call, self._read, offset, length) + meta)
            return
        if length:
            offset, taken = self._ring.take(length)
            if taken < length:
                self._waiting.append((kind, call, meta, memoryview(payload), None))
                self._write_pieces(offset, taken)
                return
            self._out[offset : offset + length] = payload
        else:
            offset = 0
        self._write(_HEAD.pack(len(meta), kind, _WHOLE, call, self._read, offset, length) + meta)

    def _write(self, message: bytes) -> None:
        """Everything that one turn of the event loop sends goes out in one system call, and wakes the reader once."""
        self._told = self._read
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        while self._returned:
            self._unsent.append(_HEAD.pack(0, RETURN, _WHOLE, 0, self._read, self._returned.popleft(), 0))
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def _write_pieces(self, offset: int, taken: int) -> None:
        """Sends what waits, piece by piece, beginning with the span that was taken for the first of it."""
        while self._waiting:
            kind, call, meta, payload, left = self._waiting.popleft()
            if payload and not taken:
                offset, taken = self._ring.take(len(payload))
            if payload and not taken:
                self._waiting.appendleft((kind, call, meta, payload, left))
                return
            self._out[offset : offset + taken] = payload[:taken]
            payload = payload[taken:]
            self._write(
                _HEAD.pack(len(meta), kind, _GOES_ON if payload else _WHOLE, call, self._read, offset, taken) + meta
            )
            if payload:
                self._waiting.appendleft((kind, call, b"", payload, left))
            elif left is not None:
                left()
            offset = taken = 0

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        while end - position >= _HEAD.size:
            size, kind, how, call, freed, offset, length = _HEAD.unpack_from(data, position)
            body = position + _HEAD.size
            if body + size > end:
                break
            position = body + size
            self._ring.freed = freed
            # These may come between the pieces of another.
            if kind == ACK:
                continue
            if kind == RETURN:
                self._shelf.give_back(offset)
                continue
            meta = data[body:position]
            if how == _ON_THE_SHELF:
                lent = _Lent(length, np.uint8, self._in, offset)
                self._received(kind, call, meta, lent.lend(offset, self._returned))
                continue
            payload = self._in[offset : offset + length]
            self._read += length
            if how == _GOES_ON or self._pieces:
                self._pieces.append(payload)
                self._meta += meta
                if how == _GOES_ON:
                    continue
                payload, meta = b"".join(self._pieces), self._meta
                self._pieces, self._meta = [], b""
            self._received(kind, call, meta, payload)
        self._rest = data[position:]
        if self._waiting:
            self._write_pieces(0, 0)
            self._look_if_full()
        if self._read - self._told >= len(self._in) // 4 and self._transport is not None:
            # Past the messages that wait: the other end may be waiting for this one.
            self._write(_HEAD.pack(0, ACK, 0, 0, self._read, 0, 0))
