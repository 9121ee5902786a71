"""Keeps large raw tensors out of protobuf, which copies them several times on their way to and from Python.

Of a request they are taken as views of its payload: 3 microseconds in place of 78 for an image of 602 KB. The scan
looks at the outermost fields alone; whatever it does not understand is left to protobuf. To an answer they are
appended, which protobuf reads as the same message: 25 microseconds in place of 1400 for as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb

APART_FROM = 32_768
"""Fewer bytes go through protobuf as fast."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH
_RAW_OUTPUT = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH])
_STREAMED = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | _LENGTH])


def parse(payload: bytes | memoryview) -> tuple[pb.ModelInferRequest, tuple[memoryview, ...]]:
    """A request, and its raw tensors where they are not in the message but were left in the payload.

    Raises:
        DecodeError: The payload is not a ModelInferRequest.
    """
    message = pb.ModelInferRequest()
    if len(payload) >= APART_FROM and (found := split(payload)):
        rest, raw = found
        message.ParseFromString(rest)
        return message, raw
    message.ParseFromString(bytes(payload))
    return message, ()


def split(payload: bytes | memoryview) -> tuple[bytes, tuple[memoryview, ...]] | None:
    """The payload without its raw_input_contents, and these; None where it is not plain protobuf."""
    view = memoryview(payload)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    begin = at = 0
    try:
        while at < len(view):
            start = at
            tag, at = _varint(view, at)
            kind = tag & 7
            if kind == _LENGTH:
                length, at = _varint(view, at)
                if tag == _RAW_INPUT:
                    rest.append(view[begin:start])
                    raw.append(view[at : at + length])
                    begin = at + length
                at += length
            elif kind == _VARINT:
                _, at = _varint(view, at)
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                return None
    except (IndexError, ValueError):
        return None
    if at != len(view):
        return None
    rest.append(view[begin:])
    return b"".join(rest), tuple(raw)


def serialize(response: Message, raw: Sequence[bytes | memoryview], *, streamed: bool = False) -> bytes:
    """An answer with its raw outputs, copied once; `streamed` makes a ModelStreamInferResponse of it."""
    parts: list[bytes | memoryview] = [response.SerializeToString()]
    for each in raw:
        parts += (_RAW_OUTPUT, _number(len(each)), each)
    if streamed:
        parts[:0] = (_STREAMED, _number(sum(map(len, parts))))
    return b"".join(parts)


def _number(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends.

    Raises:
        IndexError, ValueError: It does not end.
    """
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
