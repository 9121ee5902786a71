"""The protocol's tensor datatypes in numpy: their table, and tensors to and from raw little-endian bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FIXED: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_PLAIN = {name: dtype for name, dtype in _FIXED.items() if name != "BOOL"}
# numpy has no bfloat16; its values are exact in float32, which is what BF16 tensors are here.
_TABLE = {**_FIXED, "BF16": np.dtype("<f4"), "BYTES": np.dtype(np.object_)}
_DATATYPES = {dtype: name for name, dtype in _FIXED.items()}
_COPIED_BELOW = 4096
"""Bytes that are copied faster than a view of them is made."""
_LENGTH = struct.Struct("<I")

DATATYPES: tuple[str, ...] = tuple(_TABLE)
MAX_RANK = 64
"""The most dimensions of a tensor, as in numpy; more would make the product of a shape itself a burden."""


def numpy_dtype(datatype: str) -> np.dtype[np.generic]:
    """The dtype that holds a tensor of `datatype`: float32 for BF16, object (of `bytes`) for BYTES.

    Raises:
        ValueError: the protocol has no such datatype.
    """
    try:
        return _TABLE[datatype]
    except KeyError:
        raise ValueError(f"unknown datatype '{datatype}', expected one of {', '.join(DATATYPES)}") from None


def itemsize(datatype: str) -> int:
    """Bytes that one element takes on the wire; 0 for BYTES, whose elements differ.

    Raises:
        ValueError: the protocol has no such datatype.
    """
    dtype = numpy_dtype(datatype)
    return {"BF16": 2, "BYTES": 0}.get(datatype, dtype.itemsize)


def datatype(dtype: np.dtype[np.generic]) -> str:
    """The protocol's name for a numpy dtype; strings, bytes and objects are BYTES.

    Raises:
        ValueError: the protocol cannot carry the dtype (complex numbers, dates, structures).
    """
    if dtype.kind in "OSU":
        return "BYTES"
    try:
        return _DATATYPES[dtype.newbyteorder("<")]
    except KeyError:
        raise ValueError(f"numpy dtype '{dtype}' has no datatype in the protocol") from None


_datatype_of = datatype  # below, `datatype` is a parameter


def decode(datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Array:
    """A tensor from its raw bytes.

    Fixed-size types are a read-only view of `raw` (no copy); BF16 and BYTES are new arrays. Nothing is
    allocated before the sizes are checked.

    Args:
        datatype: the protocol's name, e.g. "FP32".
        shape: the tensor's dimensions, each >= 0; () is one element.
        raw: row-major little-endian values; for BYTES every element is a uint32 length and that many bytes.

    Raises:
        ValueError: unknown datatype, impossible shape, or `raw` does not hold exactly the shape's elements.
    """
    item = itemsize(datatype)
    dims = tuple(shape)
    if any(dim < 0 for dim in dims):
        raise ValueError(f"shape {list(dims)} has a negative dimension")
    count = math.prod(dims)
    if item and count * item != len(raw):
        raise ValueError(f"{datatype} tensor of shape {list(dims)} takes {count * item} bytes, but got {len(raw)}")
    if datatype == "BYTES":
        flat = _bytes_elements(raw, count)
    elif datatype == "BF16":
        flat = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    elif datatype == "BOOL":
        flat = _booleans(raw)
    else:
        flat = np.frombuffer(raw, _FIXED[datatype])
    return shaped(flat, dims)


def shaped(flat: Array, shape: Sequence[int]) -> Array:
    """The elements in that shape, which has as many.

    Raises:
        ValueError: No array has that shape.
    """
    try:
        return flat.reshape(tuple(shape))
    except (ValueError, OverflowError):  # too many dimensions, or a huge one beside a 0
        raise ValueError(f"shape {list(shape)} is beyond what an array can have") from None


def view(datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Array | None:
    """The same as decode() in a fraction of the time for a plain tensor of the right size; None for any other."""
    dtype = _PLAIN.get(datatype)
    if dtype is None or math.prod(shape) * dtype.itemsize != len(raw) or not shape or min(shape) < 1:
        return None
    return np.ndarray(shape, dtype, raw)


def held_bytes(array: Array) -> int:
    """What a tensor holds in memory, the texts of a BYTES tensor included."""
    return array.nbytes if array.dtype.kind != "O" else array.nbytes + sum(map(len, array.ravel().tolist()))


def encode(array: Array, datatype: str | None = None) -> bytes:
    """The raw bytes of a tensor, row-major and little-endian.

    Args:
        array: numbers or booleans; or an object, bytes or str array (a str element is sent as UTF-8).
        datatype: only needed for "BF16", which rounds floats to the nearest bfloat16 (ties to even); with
            another name the array has to be of that type.

    Raises:
        ValueError: the array's dtype has no datatype in the protocol or is not `datatype`, or a BYTES element
            is neither bytes nor str.
    """
    if datatype == "BF16":
        return _bfloat16(array)
    own = _datatype_of(array.dtype)
    if datatype is not None and datatype != own:
        raise ValueError(f"array is {own}, but {datatype} was asked for")
    if own != "BYTES":
        return array.astype(_FIXED[own], copy=False).tobytes()
    parts: list[bytes] = []
    for element in array.flat:
        value = _as_bytes(element)
        parts += (_LENGTH.pack(len(value)), value)
    return b"".join(parts)


def buffer(array: Array, datatype: str) -> bytes | memoryview:
    """The same bytes as encode(), but a view of the tensor's own memory where they stand there as they are."""
    if _FIXED.get(datatype) != array.dtype:
        return encode(array, datatype)
    if array.nbytes < _COPIED_BELOW or not array.flags.c_contiguous:
        return array.tobytes()
    return array.reshape(-1).view(np.uint8).data


def _bytes_elements(raw: bytes | memoryview, count: int) -> Array:
    total = len(raw)
    # Each element has a 4-byte length: this bounds `count` by what was really sent, before the array is made.
    if 4 * count > total:
        raise ValueError(f"BYTES tensor of {count} elements takes {4 * count} bytes or more, but got {total}")
    elements = np.empty(count, np.object_)
    offset = 0
    for index in range(count):
        if offset + 4 > total:
            raise ValueError(f"BYTES tensor of {count} elements ends before the length of element {index}")
        (length,) = _LENGTH.unpack_from(raw, offset)
        offset += 4
        if length > total - offset:
            raise ValueError(f"element {index} of a BYTES tensor says {length} bytes, but {total - offset} are left")
        elements[index] = bytes(raw[offset : offset + length])
        offset += length
    if offset != total:
        raise ValueError(f"BYTES tensor of {count} elements is followed by {total - offset} more bytes")
    return elements


def _booleans(raw: bytes | memoryview) -> Array:
    values = np.frombuffer(raw, np.uint8)
    # numpy takes it for granted that a bool is 0 or 1; clients may send any non-zero byte for true.
    return values != 0 if values.size and values.max() > 1 else values.view(np.bool_)


def _bfloat16(array: Array) -> bytes:
    if array.dtype.kind != "f":
        raise ValueError(f"BF16 takes floating-point numbers, got '{array.dtype}'")
    values = np.ascontiguousarray(array, "<f4")
    bits = values.view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's payload into infinity or zero.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2").tobytes()


def _as_bytes(element: object) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    if isinstance(element, bytearray | memoryview):
        return bytes(element)
    raise ValueError(f"a BYTES element has to be bytes or str, got {type(element).__name__}")
