"""Frames of HTTP/2 (RFC 9113, sections 4 and 6) and the errors that end a connection."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
HEAD = struct.Struct(">HBBBI")
"""Of a frame: its length, in 16 and 8 bits, its kind, its flags, the number of its stream."""
HEAD_BYTES = 9
MOST_BYTES = 2**14
"""The largest frame that either side may send unasked, and that is ever sent from here."""
LONGEST_DATA = 2**20
"""The largest frame of data that a client may send: a large message in a few of them is read to where it stays."""
FIRST_WINDOW = 2**16 - 1
MOST_WINDOW = 2**31 - 1
_PRIORITY_BYTES = 5
_SIZES = {PRIORITY: _PRIORITY_BYTES, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
"""Of kinds whose frames have one."""
_OF_CONNECTIONS = (SETTINGS, PING, GOAWAY)
_OF_STREAMS = (PRIORITY, RST_STREAM)


class Code(IntEnum):
    """Why a stream or a connection ended (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Broken(Exception):
    """What a client sent ends its connection."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A frame that says what this side takes."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", name, value) for name, value in values.items()))


def settings_from_bytes(payload: bytes) -> dict[int, int]:
    """What the client says in one, where it says something twice the last of it; raises Broken."""
    if len(payload) % 6:
        raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of settings has {len(payload)} bytes")
    found = list(struct.iter_unpack(">HI", payload))
    for name, value in found:
        if name == INITIAL_WINDOW_SIZE and value > MOST_WINDOW:
            raise Broken(Code.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
        if name == MAX_FRAME_SIZE and not MOST_BYTES <= value < 2**24:
            raise Broken(Code.PROTOCOL_ERROR, f"frames of {value} bytes")
        if name == ENABLE_PUSH and value > 1:
            raise Broken(Code.PROTOCOL_ERROR, f"push is {value}")
    return dict(found)


def check(kind: int, number: int, size: int) -> None:
    """Raises Broken for a frame that has another size than all of its kind, or is on no stream of its kind."""
    if (known := _SIZES.get(kind)) is not None and size != known:
        raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of kind {kind} has {size} bytes in place of {known}")
    if (kind in _OF_CONNECTIONS and number) or (kind in _OF_STREAMS and not number):
        raise Broken(Code.PROTOCOL_ERROR, f"a frame of kind {kind} on stream {number}")


def bare(flags: int, payload: bytes, *, headers: bool = False) -> bytes:
    """The payload of a frame of data or headers without its padding and priority; raises Broken."""
    begin, end = 0, len(payload)
    if flags & PADDED:
        begin = 1
        end -= payload[0] if payload else 1
    if headers and flags & WITH_PRIORITY:
        begin += _PRIORITY_BYTES
    if begin > end:
        raise Broken(Code.PROTOCOL_ERROR, "a frame is shorter than its padding")
    return payload[begin:end]


def goaway(last: int, code: Code, text: str = "") -> bytes:
    """A frame that says that no stream above `last` was looked at, and why the connection ends."""
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + text.encode())


def window_update(stream: int, size: int) -> bytes:
    """A frame that allows so many more bytes of data; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))


def reset(stream: int, code: Code) -> bytes:
    """A frame that ends one stream."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))
