"""What clients have compressed, taken no further than it may go."""

from __future__ import annotations

import zlib
from collections.abc import Callable

MAX_MEMBERS = 4096
"""The most members of one gzip stream: each costs some microseconds, however empty it is."""
_PIECE = 64 * 2**10
_INFLATED = 2**20


class Broken(ValueError):
    """It is not what it should be."""


class TooLarge(ValueError):
    """More comes out of it than may."""


def inflated(
    body: bytes | bytearray | memoryview, limit: int, hold: Callable[[int], None] = lambda size: None
) -> bytes:
    """What gzip or zlib has made `body` of; gzip may have several members.

    Args:
        body: The compressed bytes.
        limit: Bytes that may come out.
        hold: Told of each piece: twice its bytes, which are put together in the end. What it raises ends this.

    Raises:
        Broken, TooLarge: See there.
    """
    view, at, size, members = memoryview(body), 0, 0, 0
    parts: list[bytes] = []
    while at < len(body) or not members:
        stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | (32 if not members else 16))
        members += 1
        if members > MAX_MEMBERS:
            raise Broken(f"has more than {MAX_MEMBERS} members")
        while not stream.eof:
            piece = stream.unconsumed_tail or view[at : at + _PIECE]
            if not piece:
                raise Broken("is broken: it ends early")
            if not stream.unconsumed_tail:
                at += len(piece)
            try:
                parts.append(stream.decompress(piece, min(limit + 1 - size, _INFLATED)))
            except zlib.error as error:
                raise Broken(f"is broken: {error}") from None
            size += len(parts[-1])
            hold(2 * len(parts[-1]))
            if size > limit:
                raise TooLarge(f"has more than {limit} bytes when decompressed (--max-message-bytes)")
        at -= len(stream.unused_data)
    return b"".join(parts)
