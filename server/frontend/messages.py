"""What the messages between a front end and the core mean, and how calls and replies are written down in them."""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import grpc

from convoynet.server.protocol.dispatch import Reply
from convoynet.server.types import Call

# From the front end to the core. 0 is the channel's own.
UNARY, OPEN, HALF_CLOSE, CANCEL, READY, FAILED = 1, 2, 3, 4, 5, 6
# From the core to the front end.
REPLY, END, STATE, STOP = 7, 8, 9, 10
# From the front end to the core: it refused a call for want of room.
REFUSED = 15
# A call that is over and did not come to the core, with the name of its status; number 1 for one that is too large.
OVER = 14
# How a call ended whose answer is large: the front end may have no room for it; with the name of its status.
WRITTEN = 16
# Both ways: a message of a stream, and that the other side took one.
MESSAGE, TAKEN = 11, 12
# From the core, and back at once: whether the front end is there.
PING = 13

WINDOW = 16
"""Messages of one stream and direction that may wait on the other side."""

_CALL = struct.Struct("<dq??")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_OK = bytes([0])
_Texts: TypeAlias = tuple[str, str, tuple[tuple[str, str], ...]]
_READ: dict[bytes, _Texts] = {}
"""Name of the RPC, identity and metadata of calls, as they were written."""
_MOST_READ, _LONGEST_READ = 256, 1024


def call_to_bytes(rpc: str, call: Call) -> bytes:
    """A call without its payload. Binary metadata stays behind: nothing in the server reads any.

    A zero byte, which grpcio lets through, becomes a space, as a recipient of HTTP may have it.
    """
    deadline = math.inf if call.deadline is None else call.deadline
    texts = [rpc, call.identity]
    for name, value in call.metadata:
        if isinstance(value, str):
            texts += (name, value)
    joined = "\0".join(texts)
    if joined.count("\0") >= len(texts):
        joined = "\0".join([text.replace("\0", " ") for text in texts])
    # Both clocks are the system's own, the same in every process.
    return _CALL.pack(deadline, call.arrived, call.management, call.protocol == "http") + joined.encode()


def call_from_bytes(data: bytes) -> tuple[str, Call]:
    """What call_to_bytes() wrote."""
    deadline, arrived, management, http = _CALL.unpack_from(data)
    written = data[_CALL.size :]
    rpc, identity, metadata = _READ.get(written) or _read(written)
    protocol = "http" if http else "grpc"
    return rpc, Call(protocol, None if deadline == math.inf else deadline, metadata, identity, management, arrived)


def _read(written: bytes) -> _Texts:
    """The texts of a call; most calls of a client have the same."""
    rpc, identity, *texts = written.decode().split("\0")
    read = rpc, identity, tuple(zip(texts[::2], texts[1::2], strict=True))
    if len(written) <= _LONGEST_READ:
        if len(_READ) >= _MOST_READ:
            _READ.clear()
        _READ[written] = read
    return read


def reply_to_bytes(reply: Reply) -> bytes:
    """A reply without its payload."""
    if reply.code is grpc.StatusCode.OK and not reply.trailers:
        return _OK
    texts = [reply.message.replace("\0", "")]
    for pair in reply.trailers:
        texts += pair
    return bytes([reply.code.value[0]]) + "\0".join(texts).encode()


def reply_from_bytes(data: bytes, payload: bytes) -> Reply:
    """What reply_to_bytes() wrote, with its payload."""
    if data == _OK:
        return Reply(grpc.StatusCode.OK, payload)
    message, *texts = data[1:].decode().split("\0")
    return Reply(_CODES[data[0]], payload, message, tuple(zip(texts[::2], texts[1::2], strict=True)))
