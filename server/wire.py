"""Takes the raw tensors out of a serialized ModelInferRequest as views, so that protobuf does not copy them.

Protobuf copies a bytes field twice on its way to Python: for a 602 KB image that is 75 of the 78 microseconds that
parsing takes. The scan looks at the outermost fields alone; whatever it does not understand is left to protobuf.
"""

from __future__ import annotations

from protos.inference import grpc_service_pb2 as pb

SCAN_FROM = 32_768
"""Payloads of fewer bytes are parsed faster than they are scanned."""
_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def parse(payload: bytes | memoryview) -> tuple[pb.ModelInferRequest, tuple[memoryview, ...]]:
    """A request, and its raw tensors where they are not in the message but were left in the payload.

    Raises:
        DecodeError: The payload is not a ModelInferRequest.
    """
    message = pb.ModelInferRequest()
    if len(payload) >= SCAN_FROM and (found := split(payload)):
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
                if tag == _RAW:
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
