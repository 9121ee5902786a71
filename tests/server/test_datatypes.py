"""convoynet.server.datatypes: round trips for every datatype, and refusal of bytes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convoynet.server import datatypes
from convoynet.server.datatypes import Array

FIXED = [name for name in datatypes.DATATYPES if name not in ("BYTES", "BF16")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def fixed_arrays(draw: st.DrawFn) -> Array:
    dtype = datatypes.numpy_dtype(draw(st.sampled_from(FIXED)))
    return draw(hnp.arrays(dtype, SHAPES))


@given(fixed_arrays())
def test_fixed_size_round_trip_keeps_every_bit(array: Array) -> None:
    name = datatypes.datatype(array.dtype)
    raw = datatypes.encode(array)
    back = datatypes.decode(name, array.shape, raw)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert len(raw) == array.size * datatypes.itemsize(name)


@given(SHAPES.flatmap(lambda shape: hnp.arrays(np.object_, shape, elements=st.binary(max_size=20))))
def test_bytes_round_trip(array: Array) -> None:
    back = datatypes.decode("BYTES", array.shape, datatypes.encode(array))
    assert back.dtype == np.object_
    assert back.shape == array.shape
    assert back.ravel().tolist() == array.ravel().tolist()


@given(st.binary(max_size=64), st.lists(st.integers(0, 6), max_size=3))
def test_bytes_of_any_content_parse_fully_or_raise(raw: bytes, shape: list[int]) -> None:
    try:
        array = datatypes.decode("BYTES", shape, raw)
    except ValueError:
        return
    assert array.shape == tuple(shape)
    assert datatypes.encode(array) == raw


@given(hnp.arrays(np.float32, SHAPES))
def test_bfloat16_is_the_nearest_and_a_second_trip_changes_nothing(array: Array) -> None:
    back = datatypes.decode("BF16", array.shape, datatypes.encode(array, "BF16"))
    assert back.dtype == np.float32
    assert back.shape == array.shape
    assert np.array_equal(np.isnan(back), np.isnan(array))
    finite = np.isfinite(array) & np.isfinite(back)
    wide, near = array[finite].astype(np.float64), back[finite].astype(np.float64)
    # 8 significant bits: at most half a unit in the last place, 2^-8 of it (or absolute: subnormals).
    assert np.all(np.abs(near - wide) <= np.maximum(np.abs(wide) * 2.0**-8, 2.0**-134))
    again = datatypes.decode("BF16", array.shape, datatypes.encode(back, "BF16"))
    assert np.array_equal(again, back, equal_nan=True)


def test_bfloat16_known_values() -> None:
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: the tie goes to the even one.
    # The NaN is one that rounding would turn into -0.
    nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    values = np.array([1.0, -2.0, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, nan, 3.4e38], np.float32)
    bits = np.frombuffer(datatypes.encode(values, "BF16"), "<u2")
    assert [hex(bit) for bit in bits] == [
        "0x3f80",
        "0xc000",
        "0x3f80",
        "0x3f82",
        "0x7f80",
        "0x7fff",
        "0x7f80",
    ]


def test_wire_form_is_little_endian_row_major() -> None:
    values = np.array([[1, 2], [3, 256]], np.int16)
    assert datatypes.encode(values) == b"\x01\x00\x02\x00\x03\x00\x00\x01"
    assert datatypes.encode(values.astype(">i2")) == b"\x01\x00\x02\x00\x03\x00\x00\x01"
    assert datatypes.encode(values.T) == b"\x01\x00\x03\x00\x02\x00\x00\x01"
    assert datatypes.encode(np.array([b"ab", "é", b""], np.object_)) == (
        b"\x02\0\0\0ab" + b"\x02\0\0\0\xc3\xa9" + b"\0\0\0\0"
    )
    assert datatypes.encode(np.array(["abc"])) == b"\x03\0\0\0abc"


@pytest.mark.parametrize("name", FIXED)
def test_fixed_size_decode_makes_no_copy(name: str) -> None:
    raw = bytes(datatypes.itemsize(name) * 6)
    array = datatypes.decode(name, [2, 3], raw)
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))
    assert not array.flags.writeable


def test_any_non_zero_byte_is_true() -> None:
    array = datatypes.decode("BOOL", [4], b"\x00\x01\x02\xff")
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_table_is_the_protocols() -> None:
    assert set(datatypes.DATATYPES) == {
        *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "BF16", "BYTES"),
    }
    assert datatypes.datatype(np.dtype("U5")) == datatypes.datatype(np.dtype("S3")) == "BYTES"
    assert (datatypes.itemsize("BF16"), datatypes.itemsize("BYTES")) == (2, 0)


@pytest.mark.parametrize(
    ("name", "shape", "raw", "message"),
    [
        ("FP32", [2, 2], bytes(15), r"FP32 tensor of shape \[2, 2\] takes 16 bytes, but got 15"),
        ("FP32", [2**62, 2**62], b"", r"takes \d+ bytes, but got 0"),
        ("BF16", [3], bytes(12), "takes 6 bytes, but got 12"),
        ("FP32", [-1, 4], b"", "negative dimension"),
        ("FP8", [1], b"\0", "unknown datatype 'FP8', expected one of BOOL"),
        ("UINT8", [0, 2**62, 2**62], b"", "beyond what an array can have"),
        ("UINT8", [1] * 100, b"\0", "beyond what an array can have"),
        ("BYTES", [2**40], b"\0\0\0\0", "takes 4398046511104 bytes or more, but got 4"),
        (
            "BYTES",
            [1],
            b"\xff\xff\xff\xffabc",
            "element 0 .* says 4294967295 bytes, but 3 are left",
        ),
        ("BYTES", [2], b"\x03\0\0\0abc\0", "ends before the length of element 1"),
        ("BYTES", [1], b"\x01\0\0\0ab", "followed by 1 more bytes"),
        ("BYTES", [0], b"\0\0\0\0", "0 elements is followed by 4 more bytes"),
    ],
)
def test_decode_refuses(name: str, shape: list[int], raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datatypes.decode(name, shape, raw)


@pytest.mark.parametrize(
    ("array", "name", "message"),
    [
        (np.zeros(2, np.complex64), None, "numpy dtype 'complex64' has no datatype"),
        (np.array([b"a", 3], np.object_), None, "bytes or str, got int"),
        (np.zeros(2, np.float32), "INT8", "array is FP32, but INT8 was asked for"),
        (np.zeros(2, np.int32), "BF16", "BF16 takes floating-point numbers, got 'int32'"),
    ],
)
def test_encode_refuses(array: Array, name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datatypes.encode(array, name)


@given(fixed_arrays(), st.booleans())
def test_views_and_buffers_are_what_decode_and_encode_give(array: Array, transposed: bool) -> None:
    if transposed:
        array = array.T
    name, raw = datatypes.datatype(array.dtype), datatypes.encode(array)
    assert bytes(datatypes.buffer(array, name)) == raw
    view = datatypes.view(name, list(array.shape), raw)
    if view is not None:
        decoded = datatypes.decode(name, array.shape, raw)
        assert (view.dtype, view.shape, view.tobytes()) == (decoded.dtype, decoded.shape, raw)
        assert not view.flags.writeable


def test_large_buffers_are_the_tensors_own_memory() -> None:
    array = np.arange(4096, dtype=np.float32)
    assert np.shares_memory(np.frombuffer(datatypes.buffer(array, "FP32"), np.float32), array)


@pytest.mark.parametrize(("shape", "size"), [([-1, -4], 16), ([4], 12), ([0], 0), ([], 4), ([2**62, 4], 16)])
def test_a_view_leaves_odd_shapes_and_sizes_to_decode(shape: list[int], size: int) -> None:
    assert datatypes.view("FP32", shape, bytes(size)) is None
    assert datatypes.view("BYTES", [1], b"\0\0\0\0") is None
