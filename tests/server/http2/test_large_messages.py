"""Large messages: long frames, read to where their data stays, and what clients may do in the middle of one."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import uvloop

from convoynet.server.http2 import listener
from convoynet.server.http2.connection import Connection
from convoynet.server.http2.frames import LONGEST_DATA, MAX_FRAME_SIZE, Code, settings_from_bytes
from convoynet.server.http2.listener import Limits
from convoynet.server.http2.stream import Stream
from convoynet.server.security.tls import HTTP2
from tests.server.http2.conftest import LARGEST, OVER_BUDGET, Port, listening, until
from tests.server.http2.test_any_bytes import Wire
from tests.server.http2.test_listener import secure, trusting
from tests.server.raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FIELDS,
    HEADERS,
    PADDED,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    RawClient,
    block,
    frame,
    message,
    number,
    rpc_path,
    settings,
)

WINDOW = 2**16 - 1


def head(stream: int = 1, rpc: str = "ModelInfer") -> bytes:
    return frame(HEADERS, END_HEADERS, stream, block(rpc_path(rpc)))


def small(stream: int) -> bytes:
    """A call that is answered with b"small"."""
    return head(stream) + frame(DATA, END_STREAM, stream, message(b"small"))


def padded(data: bytes, padding: int, stream: int = 1, flags: int = 0) -> bytes:
    """A frame of data with so many bytes behind it that mean nothing."""
    return frame(DATA, flags | PADDED, stream, bytes([padding]) + data + os.urandom(padding))


async def well(client: RawClient, stream: int) -> bool:
    """Whether a further call of a connection is answered."""
    client.send(small(stream))
    return (await client.answer(stream)).data == message(b"small")


async def opened(client: RawClient, sent: bytes, stream: int = 1) -> None:
    """Sends what the first window of a call takes, and waits for more."""
    client.send(head(stream) + frame(DATA, 0, stream, sent[:WINDOW]))
    await allowed(client, stream)


async def allowed(client: RawClient, stream: int = 1) -> None:
    """Waits until a client may send the rest of a message."""
    while not any(found[0] == WINDOW_UPDATE and found[2] == stream for found in client.received.frames):
        assert await client.more()


async def test_the_server_says_how_long_frames_may_be(port: Port) -> None:
    client = await port.client()
    assert settings_from_bytes(await client.until(SETTINGS))[MAX_FRAME_SIZE] == LONGEST_DATA
    client.close()


@pytest.mark.parametrize("frames", [2**14, 40_000, 2**20])
@pytest.mark.parametrize("rpc", ["ModelInfer", "ModelStreamInfer"])
async def test_messages_in_frames_of_every_length_come_back(port: Port, rpc: str, frames: int) -> None:
    client = await port.client()
    sent = [os.urandom(size) for size in (900_000, 1, LARGEST, 70_000)]
    for at, payload in enumerate(sent):
        stream = 2 * at + 1
        client.send(head(stream, rpc))
        client.allow(LARGEST)
        client.send(frame(WINDOW_UPDATE, 0, stream, number(LARGEST)))
        await client.upload(message(payload), stream, frames)
        client.send(frame(DATA, END_STREAM, stream))
        assert (await client.answer(stream)).data == message(payload)
    client.close()


async def test_two_calls_take_turns_in_the_middle_of_their_messages(port: Port) -> None:
    client = await port.client()
    client.send(frame(WINDOW_UPDATE, 0, 0, number(LARGEST)))
    sent = {stream: message(os.urandom(500_000)) for stream in (1, 3)}
    for stream, whole in sent.items():
        await opened(client, whole, stream)
        client.send(frame(WINDOW_UPDATE, 0, stream, number(LARGEST)))
    for at in range(WINDOW, 500_005, 100_000):
        for stream, whole in sent.items():
            part = whole[at : at + 100_000]
            client.send(frame(DATA, END_STREAM if at + 100_000 >= len(whole) else 0, stream, part))
    for stream, whole in sent.items():
        assert (await client.answer(stream)).data == whole
    client.close()


@pytest.mark.parametrize("cut", [0, 1, 9, 40_000])
async def test_a_long_frame_of_a_call_that_is_over_is_dropped(port: Port, cut: int) -> None:
    client = await port.client()
    whole = message(bytes(500_000))
    await opened(client, whole)
    rest = frame(DATA, END_STREAM, 1, whole[WINDOW:])
    client.send(frame(RST_STREAM, 0, 1, number(8)) + rest[:cut])
    await asyncio.sleep(0)
    client.send(rest[cut:])
    assert await well(client, 3)
    client.close()


async def test_a_call_may_end_in_the_middle_of_a_long_frame(port: Port) -> None:
    """Its deadline passes there; the frame goes on all the same."""
    client = await port.client()
    whole = message(bytes(500_000))
    client.send(frame(HEADERS, END_HEADERS, 1, block({**rpc_path("ModelInfer"), "grpc-timeout": "200m"})))
    client.send(frame(DATA, 0, 1, whole[:WINDOW]))
    rest = frame(DATA, END_STREAM, 1, whole[WINDOW:])
    await allowed(client)
    client.send(rest[:100_000])
    assert (await client.answer()).status == "4"
    await until(lambda: not port.budget.held)
    client.send(rest[100_000:])
    assert await well(client, 3)
    client.close()


async def test_more_than_a_call_may_send_ends_it_alone(port: Port) -> None:
    client = await port.client()
    client.send(head() + frame(DATA, 0, 1, bytes(WINDOW + 1)))
    assert (await client.answer()).reset == Code.FLOW_CONTROL_ERROR
    assert await well(client, 3)
    client.close()


BREAKING = {
    "long padded data within headers": (
        frame(HEADERS, 0, 1) + frame(DATA, PADDED, 1, bytes(2**18))[:9],
        Code.PROTOCOL_ERROR,
    ),
    "long padded data of a call that never was": (frame(DATA, PADDED, 9, bytes(2**17)), Code.PROTOCOL_ERROR),
    "padded data that is too long": (head() + frame(DATA, PADDED, 1, bytes(LONGEST_DATA + 1)), Code.FRAME_SIZE_ERROR),
    "long data of a call that never was": (frame(DATA, 0, 9, bytes(2**17)), Code.PROTOCOL_ERROR),
    "data that is too long": (head() + frame(DATA, 0, 1, bytes(LONGEST_DATA + 1)), Code.FRAME_SIZE_ERROR),
    "long data within headers": (frame(HEADERS, 0, 1) + frame(DATA, 0, 1, bytes(2**18)), Code.PROTOCOL_ERROR),
    "long settings": (frame(SETTINGS, 0, 0, bytes(2**15)), Code.FRAME_SIZE_ERROR),
    "long settings, the rest to come": (frame(SETTINGS, 0, 0, bytes(2**18))[:100], Code.FRAME_SIZE_ERROR),
    "long frames of no kind": (frame(99, 0, 0, bytes(2**15)), Code.FRAME_SIZE_ERROR),
    "headers that are too long": (frame(HEADERS, END_HEADERS, 1, bytes(2**19)), Code.FRAME_SIZE_ERROR),
    "headers that go on too long": (
        frame(HEADERS, 0, 1) + frame(CONTINUATION, END_HEADERS, 1, bytes(2**19)),
        Code.FRAME_SIZE_ERROR,
    ),
}


@pytest.mark.parametrize("name", BREAKING)
async def test_long_frames_that_break_a_connection(port: Port, name: str) -> None:
    sent, code = BREAKING[name]
    client = await port.client()
    client.send(sent)
    gone = await client.end()
    assert gone is not None
    assert gone[1] == code


async def test_headers_may_come_in_one_long_frame(port: Port) -> None:
    client = await port.client()
    for stream, size, status in ((1, 40_000, "0"), (3, 70_000, "8")):
        client.send(frame(HEADERS, END_HEADERS, stream, block(FIELDS, x_a="y" * size)))
        client.send(frame(DATA, END_STREAM, stream, message(b"small")))
        assert (await client.answer(stream)).status == status
    client.close()


async def test_long_headers_count_until_they_are_whole(port: Port) -> None:
    """As one frame, and as several; short ones do not."""
    shown, budget = Shown(port), port.budget
    whole = block(FIELDS, x_a="y" * 40_000)
    shown.read(frame(HEADERS, END_HEADERS, 1, whole)[:100])
    assert budget.held == len(whole) + 9
    shown.read(frame(HEADERS, END_HEADERS, 1, whole)[100:])
    assert not budget.held
    for stream, cut in ((3, 100), (5, 30_000)):
        shown.read(frame(HEADERS, 0, stream, whole[:cut]) + frame(CONTINUATION, 0, stream, whole[cut : cut + 9]))
        assert budget.held == (cut + 9 if cut > 2**14 else 0)
        rest = frame(CONTINUATION, END_HEADERS, stream, whole[cut + 9 :])
        shown.read(rest[:10])
        assert budget.held == (cut + 9 if cut > 2**14 else len(rest))
        shown.read(rest[10:])
        assert not budget.held
    assert sorted(shown.connection.streams) == [1, 3, 5]
    assert not shown.connection.headers_since
    shown.read(frame(HEADERS, END_HEADERS, 7, bytes(2**17))[:-1])
    assert budget.held == 2**17 + 9
    shown.connection.connection_lost(None)
    await until(port.quiet)


async def test_headers_for_which_there_is_no_room_end_their_connection(port: Port) -> None:
    fit = OVER_BUDGET * 15 // 16 // 250_009
    clients = [Shown(port) for _ in range(fit + 2)]
    for client in clients:
        client.read(frame(HEADERS, END_HEADERS, 1, bytes(250_000))[:100])
    assert port.budget.held == fit * 250_009
    gone = [client.wire.received.gone for client in clients]
    assert gone[:fit] == [None] * fit
    assert [None if end is None else end[1] for end in gone[fit:]] == [Code.ENHANCE_YOUR_CALM] * 2
    for client in clients:
        client.connection.connection_lost(None)
    await until(port.quiet)


async def test_long_headers_have_to_come_whole_soon(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADERS_SECONDS", 0.1)
    slow, idle = await port.client(), await port.client()
    slow.send(frame(HEADERS, END_HEADERS, 1, bytes(40_000))[:100])
    gone = await slow.end()
    assert gone is not None
    assert gone[1:] == (Code.ENHANCE_YOUR_CALM, "headers did not come whole within 0.1 s")
    assert await idle.alive()
    idle.close()


class Shown:
    """A connection of which the test is the event loop."""

    def __init__(self, port: Port) -> None:
        self.connection = Connection(port.calls, Limits(), lambda _: None, lambda _: None)
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        self.read(PREFACE + frame(SETTINGS, 0, 0))

    def read(self, data: bytes) -> list[memoryview]:
        """Puts bytes where they are asked for, as a socket does; the memory that they went to."""
        places = []
        while data:
            place = self.connection.get_buffer(-1)
            size = min(len(place), len(data))
            place[:size], data = data[:size], data[size:]
            places.append(place[:size])
            self.connection.buffer_updated(size)
        return places

    def allowed(self, stream: int = 1) -> list[int]:
        """What a call was let send beyond its first window."""
        frames = self.wire.received.frames
        return [int.from_bytes(more, "big") for kind, _, on, more in frames if (kind, on) == (WINDOW_UPDATE, stream)]

    @property
    def stream(self) -> Stream:
        """The one call."""
        (stream,) = self.connection.streams.values()
        return stream


async def test_long_frames_are_read_to_where_they_stay(port: Port) -> None:
    shown, whole = Shown(port), message(os.urandom(600_000))
    shown.read(head() + frame(DATA, 0, 1, whole[:WINDOW]))
    rest = frame(DATA, END_STREAM, 1, whole[WINDOW:])
    shown.read(rest[:9])
    here = np.frombuffer(shown.stream._whole, np.uint8)
    places = shown.read(rest[9:])
    assert sum(len(place) for place in places if np.shares_memory(place, here)) == len(rest) - 9
    assert here.tobytes() == whole[5:]
    del places, here
    shown.connection.connection_lost(None)
    await until(port.quiet)


@pytest.mark.parametrize("padding", [0, 255])
@pytest.mark.parametrize("pieces", [1, 10, 40_000, 10**6])
@pytest.mark.parametrize("ends", [False, True])
async def test_long_frames_may_be_padded(port: Port, padding: int, pieces: int, ends: bool) -> None:
    """In whatever pieces they come: what is padding is in no message, and counts for what the client may send."""
    shown, whole = Shown(port), message(os.urandom(600_000))
    shown.read(frame(WINDOW_UPDATE, 0, 0, number(2**20)) + settings(_4=2**20))
    shown.read(head() + padded(whole[:20_000], padding) + frame(DATA, 0, 1, whole[20_000:40_000]))
    assert shown.stream.credit == len(whole) - 40_000
    shown.stream.allow(1 + padding)  # as a client that pads a frame waits for, where it does not make it shorter
    rest = padded(whole[40_000:], padding, flags=END_STREAM if ends else 0)
    rest += b"" if ends else frame(DATA, END_STREAM, 1)
    for at in range(20):
        shown.read(rest[at : at + 1])
    for at in range(20, 20 * pieces, pieces):
        shown.read(rest[at : at + pieces])
    shown.read(rest[max(20, 20 * pieces) :] + small(3))
    answers = shown.wire.received.answers
    await until(lambda: answers[1].over and answers[3].over)
    assert (answers[1].data, answers[3].data) == (whole, message(b"small"))
    assert shown.connection._owed == len(whole) + 2 * (1 + padding) + len(message(b"small"))
    assert sum(shown.allowed()) == len(whole) - WINDOW + 3 * (1 + padding)
    shown.connection.connection_lost(None)
    await until(port.quiet)


@pytest.mark.parametrize("cut", [0, 9, 10, 30_000])
async def test_long_padded_frames_of_a_call_that_is_over_are_dropped(port: Port, cut: int) -> None:
    shown = Shown(port)
    shown.read(head() + frame(DATA, 0, 1, message(bytes(500_000))[:100]))
    rest = padded(bytes(40_000), 200)
    shown.read(rest[:cut])
    shown.read(frame(RST_STREAM, 0, 1, number(8)) if not cut else b"")
    if cut:
        shown.stream.cancel()
    shown.read(rest[cut:] + small(3))
    await until(lambda: shown.wire.received.answers[3].over)
    assert shown.wire.received.answers[3].data == message(b"small")
    shown.connection.connection_lost(None)
    await until(port.quiet)


async def test_padding_beyond_what_a_call_may_send_ends_it_alone(port: Port) -> None:
    client = await port.client()
    client.send(head() + padded(bytes(WINDOW - 200), 200))
    assert (await client.answer()).reset == Code.FLOW_CONTROL_ERROR
    assert await well(client, 3)
    client.close()


async def test_nothing_is_kept_where_nothing_came(port: Port) -> None:
    """An event loop asks where to read to, and there may be nothing to read."""
    shown, whole = Shown(port), message(bytes(600_000))
    shown.read(head() + frame(DATA, 0, 1, whole[:WINDOW]) + frame(DATA, END_STREAM, 1, whole[WINDOW:])[:20_000])
    assert len(shown.connection.get_buffer(-1)) > 400_000
    shown.read(b"")
    shown.stream.cancel()
    assert len(shown.connection.get_buffer(-1)) == 2**17
    shown.read(frame(DATA, END_STREAM, 1, whole[WINDOW:])[20_000:] + small(3))
    assert not shown.connection.parted
    await port.settled(2)
    shown.connection.connection_lost(None)


async def test_a_frame_in_tiny_pieces_takes_no_more_memory_than_its_bytes(port: Port) -> None:
    shown, headers = Shown(port), frame(HEADERS, END_HEADERS, 1, bytes(2**15))
    tracemalloc.start()
    try:
        for at in range(0, len(headers) - 2, 2):
            shown.read(headers[at : at + 2])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2**17
    shown.connection.connection_lost(None)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_every_event_loop_reads_large_messages(run: Callable[..., object], secured: bool, tmp_path: Path) -> None:
    authority, certificates = secure(tmp_path)
    client_context = trusting(authority, "h2") if secured else None

    async def answers() -> None:
        async with listening(context=certificates.context(HTTP2) if secured else None) as port:
            client = await port.client(context=client_context)
            client.send(frame(WINDOW_UPDATE, 0, 0, number(4 * LARGEST)))
            for stream, size in ((1, 2**14), (3, 200_000), (5, 2**20)):
                whole = message(os.urandom(LARGEST))
                client.send(head(stream) + frame(WINDOW_UPDATE, 0, stream, number(LARGEST)))
                await client.upload(whole, stream, size)
                client.send(frame(DATA, END_STREAM, stream))
                assert (await client.answer(stream)).data == whole
            client.close()
            with suppress(OSError):
                await client._writer.wait_closed()  # its loop ends

    run(answers())


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_every_event_loop_reads_nothing_while_connections_are_held(
    run: Callable[..., object], secured: bool, tmp_path: Path
) -> None:
    authority, certificates = secure(tmp_path)
    client_context = trusting(authority, "h2") if secured else None

    async def holds() -> None:
        async with listening(context=certificates.context(HTTP2) if secured else None) as port:
            early = await port.client(context=client_context)
            assert await well(early, 1)
            port.listener.hold(True)
            early.send(small(3))
            late = await port.client(context=client_context)  # is let in, and waits as well
            late.send(small(1))
            await until(lambda: len(port.connections) == 2)
            await asyncio.sleep(0.05)
            assert not port.connections[1].greeted
            assert len(port.echo.asked) == 1
            port.listener.hold(False)
            assert (await early.answer(3)).data == (await late.answer(1)).data == message(b"small")
            for client in (early, late):
                client.close()
                with suppress(OSError):
                    await client._writer.wait_closed()  # its loop ends

    run(holds())
