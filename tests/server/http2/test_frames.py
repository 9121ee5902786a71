"""Frames: what of them is wrong by itself."""

from __future__ import annotations

import pytest

from convoynet.server.http2 import frames
from convoynet.server.http2.frames import Broken, Code
from tests.server import raw_http2


def test_frames_are_as_a_client_writes_them() -> None:
    assert frames.frame(0, 1, 5, b"abc") == raw_http2.frame(0, 1, 5, b"abc")
    assert frames.settings({3: 7}) == raw_http2.settings(_3=7)
    assert frames.reset(3, Code.CANCEL) == raw_http2.frame(3, 0, 3, raw_http2.number(8))
    assert frames.window_update(0, 9) == raw_http2.frame(8, 0, 0, raw_http2.number(9))
    assert frames.goaway(3, Code.NO_ERROR, "bye") == raw_http2.frame(7, 0, 0, bytes([0, 0, 0, 3, 0, 0, 0, 0]) + b"bye")


@pytest.mark.parametrize(
    ("flags", "payload", "content"),
    [
        (0, b"abc", b"abc"),
        (8, b"\0abc", b"abc"),
        (8, b"\x02abc\0\0", b"abc"),
        (8, b"\x03abc", b""),
        (8, b"\x04abc", None),
        (8, b"\xff", None),
        (8, b"", None),
    ],
)
def test_padding(flags: int, payload: bytes, content: bytes | None) -> None:
    if content is None:
        with pytest.raises(Broken) as raised:
            frames.bare(flags, payload)
        assert raised.value.code is Code.PROTOCOL_ERROR
    else:
        assert frames.bare(flags, payload) == content


@pytest.mark.parametrize(
    ("flags", "payload", "content"),
    [
        (0x20, b"12345abc", b"abc"),
        (0x20, b"12345", b""),
        (0x20, b"1234", None),
        (0x28, b"\x0112345abc\0", b"abc"),
        (0x28, b"\x0412345abc", None),
    ],
)
def test_priority_of_headers(flags: int, payload: bytes, content: bytes | None) -> None:
    if content is None:
        with pytest.raises(Broken):
            frames.bare(flags, payload, headers=True)
    else:
        assert frames.bare(flags, payload, headers=True) == content
        assert frames.bare(flags & ~8, payload) == payload, "data has none"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"_4": 2**31 - 1}, None),
        ({"_4": 2**31}, Code.FLOW_CONTROL_ERROR),
        ({"_5": 2**14 - 1}, Code.PROTOCOL_ERROR),
        ({"_5": 2**24 - 1}, None),
        ({"_5": 2**24}, Code.PROTOCOL_ERROR),
        ({"_2": 2}, Code.PROTOCOL_ERROR),
        ({"_2": 1, "_1": 2**32 - 1, "_3": 0, "_6": 0, "_99": 7}, None),
    ],
)
def test_settings(values: dict[str, int], code: Code | None) -> None:
    payload = raw_http2.settings(**values)[9:]
    if code is None:
        assert frames.settings_from_bytes(payload) == {int(name[1:]): value for name, value in values.items()}
        payload += b"\0"
    with pytest.raises(Broken) as raised:
        frames.settings_from_bytes(payload)
    assert raised.value.code is (code or Code.FRAME_SIZE_ERROR)


def test_of_what_is_set_twice_the_last_counts_and_all_must_be_allowed() -> None:
    first, last = raw_http2.settings(_4=5)[9:], raw_http2.settings(_4=6)[9:]
    assert frames.settings_from_bytes(first + last) == {4: 6}
    with pytest.raises(Broken):
        frames.settings_from_bytes(raw_http2.settings(_4=2**31)[9:] + last)


@pytest.mark.parametrize(
    ("kind", "number", "size", "code"),
    [
        (frames.PRIORITY, 1, 5, None),
        (frames.PRIORITY, 1, 4, Code.FRAME_SIZE_ERROR),
        (frames.PRIORITY, 0, 5, Code.PROTOCOL_ERROR),
        (frames.RST_STREAM, 1, 4, None),
        (frames.RST_STREAM, 1, 5, Code.FRAME_SIZE_ERROR),
        (frames.RST_STREAM, 0, 4, Code.PROTOCOL_ERROR),
        (frames.PING, 0, 8, None),
        (frames.PING, 0, 7, Code.FRAME_SIZE_ERROR),
        (frames.PING, 1, 8, Code.PROTOCOL_ERROR),
        (frames.SETTINGS, 1, 0, Code.PROTOCOL_ERROR),
        (frames.GOAWAY, 1, 8, Code.PROTOCOL_ERROR),
        (frames.WINDOW_UPDATE, 0, 4, None),
        (frames.WINDOW_UPDATE, 1, 4, None),
        (frames.WINDOW_UPDATE, 1, 3, Code.FRAME_SIZE_ERROR),
        (99, 1, 3, None),
    ],
)
def test_kinds_have_their_sizes_and_streams(kind: int, number: int, size: int, code: Code | None) -> None:
    if code is None:
        frames.check(kind, number, size)
        return
    with pytest.raises(Broken) as raised:
        frames.check(kind, number, size)
    assert raised.value.code is code
