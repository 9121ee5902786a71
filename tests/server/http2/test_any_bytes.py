"""Whatever a client sends: no exception, no bug in the log, nothing left, and only frames that a client may be sent."""

from __future__ import annotations

import asyncio
import gzip
import random

import pytest

from convoynet.server.http2.connection import Connection
from convoynet.server.http2.listener import Limits
from convoynet.server.http2.sending import FAREWELL
from tests.server.http2.conftest import Port
from tests.server.http2.test_calls import data, head, reset
from tests.server.raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    FIELDS,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    SETTINGS,
    WINDOW_UPDATE,
    Received,
    block,
    frame,
    message,
    number,
    settings,
)

BLOCK = block(FIELDS, x_a="1")
FRAMES = [
    settings(_4=50),
    head(1) + data(message(b"hello")),
    frame(HEADERS, 0, 3, BLOCK[:30]) + frame(CONTINUATION, END_HEADERS, 3, BLOCK[30:]),
    frame(DATA, PADDED, 3, b"\x03" + message(b"large 300")[:7] + bytes(3)),
    frame(DATA, 1, 3, message(b"large 300")[7:]),
    frame(WINDOW_UPDATE, 0, 3, number(100)),
    head(5, rpc="ModelStreamInfer") + data(message(b"a") + message(b"many 9") + message(b"")[:3], stream=5, end=False),
    frame(PING, 0, 0, bytes(8)),
    data(message(b"")[3:], stream=5),
    head(7, grpc_encoding="gzip") + data(message(gzip.compress(b"x"), compressed=1), stream=7),
    head(9, grpc_timeout="1S", x_refuse="1"),
    head(11) + data(message(b"wait"), stream=11, end=False),
    frame(PRIORITY, 0, 1, bytes(5)),
    settings(_4=0, _1=0),
    frame(WINDOW_UPDATE, 0, 0, number(1000)),
    reset(11),
    settings(_4=200),
    frame(HEADERS, 5, 19, b"\x82\x86\x40\x03x-a\x01b\x40\x05:path\x01/"),
    frame(HEADERS, 5, 21, BLOCK + b"\xbe"),
    frame(GOAWAY, 0, 0, bytes(8)),
    frame(PING, 1, 0, FAREWELL),
]
LONG = [
    head(17) + data(message(bytes(80_000))[:40_000], stream=17, end=False),
    frame(DATA, PADDED, 17, b"\x09" + message(bytes(80_000))[40_000:58_000] + bytes(9)),
    frame(DATA, PADDED | 1, 17, b"\xff" + message(bytes(80_000))[58_000:] + bytes(255)),
]
HELLO = PREFACE + frame(SETTINGS, 0, 0)


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and checks what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.received, self.over = Received(), False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.over
        self.received.feed(bytes(data))

    def is_closing(self) -> bool:
        return self.over

    def close(self) -> None:
        self.over = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.over

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def piece(chance: random.Random, usual: bytes, other: bytes) -> bytes:
    """Something else in the place of some frames."""
    place = chance.randrange(len(usual) + 1)
    random_frame = chance.randrange(11), chance.randrange(256), chance.randrange(17), chance.randbytes(place % 20)
    flags = bytes([chance.choice([0, 1, 4, 5, 8, 9, 12, 13, 32, 36])])
    return chance.choice(
        [
            b"",
            other,
            usual + other,
            usual[:place] + chance.randbytes(1) + usual[place + 1 :],
            usual[:place] + usual[place + chance.randrange(5) :],
            usual[:place] + chance.randbytes(chance.randrange(4)) + usual[place:],
            usual + frame(*random_frame),
            usual[:4] + flags + usual[5:],
        ]
    )


def changed(chance: random.Random) -> tuple[bool, bytes]:
    """What a client may send, with some changes, and whether it is long."""
    frames = list(FRAMES)
    if long := not chance.randrange(8):
        frames[-4:-4] = LONG
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        at, other = chance.randrange(len(frames)), chance.randrange(len(FRAMES))
        frames[at] = piece(chance, frames[at], FRAMES[other])
    return long, HELLO + b"".join(frames)


async def one(port: Port, seed: int) -> None:
    """What one client sends, in pieces, with pauses of both sides, and its end."""
    chance = random.Random(seed)
    wire, lost = Wire(), False

    def gone(_: Connection) -> None:
        nonlocal lost
        lost = True

    connection = Connection(port.calls, Limits(strikes=chance.choice([0, 2])), lambda _: None, gone)
    connection.connection_made(wire)
    long, sent = changed(chance)
    most = chance.choice([400, 10_000, 100_000] if long else [3, 40, 400, 10_000])
    while sent and not wire.over:
        size = chance.randint(1, most)
        if chance.randrange(2):
            place = connection.get_buffer(-1)
            size = min(size, len(place), len(sent))
            place[:size] = sent[:size]
            connection.buffer_updated(size)
        else:
            connection.data_received(sent[:size])
        sent = sent[size:]
        if not chance.randrange(8):
            connection.pause_writing()
            await asyncio.sleep(0)
            connection.resume_writing()
        if not chance.randrange(3):
            await asyncio.sleep(0)
        if not chance.randrange(100):
            connection.leave()
        assert len(connection._kept) < 2**18 + 9
        assert all(stream.open and stream.number == at for at, stream in connection.streams.items())
        assert all(stream.open for stream in connection._sending)
        assert len(set(connection._sending)) == len(connection._sending)
        assert not (connection.parted and connection.streams)
    if not chance.randrange(4):
        connection.leave()
    for _ in range(chance.randrange(6)):
        await asyncio.sleep(0)
    if chance.randrange(2):
        connection.abandon(0, "")  # type: ignore[arg-type]
    wire.over = True
    connection.connection_lost(None)
    assert lost
    assert not connection.streams
    for _ in range(2000):
        if port.quiet():
            break
        await asyncio.sleep(0 if port.echo.running else 0.001)
    assert port.quiet()


@pytest.mark.parametrize(
    "part", [range(600), pytest.param(range(600, 30_000), marks=pytest.mark.slow)], ids=["some", "many"]
)
async def test_any_bytes(port: Port, caplog: pytest.LogCaptureFixture, part: range) -> None:
    for seed in part:
        try:
            await one(port, seed)
        except BaseException as error:
            raise AssertionError(f"the bytes of seed {seed}") from error
        assert not caplog.records, f"the bytes of seed {seed}: {caplog.text}"
    counted = port.echo.counted
    assert len(counted) > len(part)
    assert {code for _, code in counted} >= {"OK", "CANCELLED", "UNAUTHENTICATED", "UNIMPLEMENTED"}
