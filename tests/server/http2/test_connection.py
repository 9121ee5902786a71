"""One connection: what breaks it, what does not, floods, and how far answers go that a client takes slowly."""

from __future__ import annotations

import asyncio
import struct

import pytest

from convoynet.server.http2 import connection, sending
from convoynet.server.http2.connection import _BRIEF_SECONDS
from convoynet.server.http2.frames import Code
from convoynet.server.http2.sending import FAREWELL
from tests.server.http2.conftest import Port, listening, until
from tests.server.http2.test_calls import answered, data, head, reset
from tests.server.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    FIELDS,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    RawClient,
    block,
    frame,
    literal,
    message,
    number,
    settings,
)

CALL = data(message(b"x"))
PROTOCOL, FLOW, SIZE, CALM = Code.PROTOCOL_ERROR, Code.FLOW_CONTROL_ERROR, Code.FRAME_SIZE_ERROR, Code.ENHANCE_YOUR_CALM
BLOCK = block(FIELDS)
WIDEST = number(2**31 - 1)
BREAKS = {
    "data of stream 0": (frame(DATA, 0, 0, b"x"), PROTOCOL),
    "data of a stream that was not opened": (frame(DATA, 0, 5, b"x"), PROTOCOL),
    "data of an even stream": (head(3) + frame(DATA, 0, 2, b"x"), PROTOCOL),
    "padding of more than the frame": (head() + frame(DATA, PADDED, 1, b"\x02x"), PROTOCOL),
    "no padding where there is some": (head() + frame(DATA, PADDED, 1, b""), PROTOCOL),
    "padding of more than the headers": (frame(HEADERS, PADDED | END_HEADERS, 1, b"\xff" + BLOCK), PROTOCOL),
    "headers of stream 0": (frame(HEADERS, END_HEADERS, 0, BLOCK), PROTOCOL),
    "headers of an even stream": (frame(HEADERS, END_HEADERS, 2, BLOCK), PROTOCOL),
    "headers that cannot be read": (frame(HEADERS, END_HEADERS, 1, b"\xbe"), Code.COMPRESSION_ERROR),
    "trailers that cannot be read": (head() + frame(HEADERS, 5, 1, b"\xbe"), Code.COMPRESSION_ERROR),
    "late trailers that cannot be read": (head(3) + frame(HEADERS, 5, 1, b"\xbe"), Code.COMPRESSION_ERROR),
    "data within headers": (frame(HEADERS, 0, 1, BLOCK) + CALL, PROTOCOL),
    "a ping within headers": (frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)), PROTOCOL),
    "headers within headers": (frame(HEADERS, 0, 1, BLOCK) + head(3), PROTOCOL),
    "an unknown frame within headers": (frame(HEADERS, 0, 1, BLOCK) + frame(99, 0, 1), PROTOCOL),
    "headers go on on another stream": (frame(HEADERS, 0, 1) + frame(CONTINUATION, 4, 3, BLOCK), PROTOCOL),
    "headers go on on stream 0": (frame(HEADERS, 0, 1) + frame(CONTINUATION, 4, 0, BLOCK), PROTOCOL),
    "nothing goes on": (frame(CONTINUATION, 4, 1, BLOCK), PROTOCOL),
    "headers go on behind their end": (head() + frame(CONTINUATION, 4, 1, BLOCK), PROTOCOL),
    "headers without end": (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(2**14)) * 20, CALM),
    "headers without end, of nothing": (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 1200, CALM),
    "a reset of stream 0": (frame(RST_STREAM, 0, 0, number(8)), PROTOCOL),
    "a reset of a stream that was not opened": (frame(RST_STREAM, 0, 1, number(8)), PROTOCOL),
    "a reset of an even stream": (head(3) + frame(RST_STREAM, 0, 2, number(8)), PROTOCOL),
    "a reset of another size": (head() + frame(RST_STREAM, 0, 1, bytes(5)), SIZE),
    "a window of a stream that was not opened": (frame(WINDOW_UPDATE, 0, 1, number(1)), PROTOCOL),
    "a window of another size": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE),
    "a window that is too wide": (frame(WINDOW_UPDATE, 0, 0, WIDEST), FLOW),
    "a window of nothing more": (frame(WINDOW_UPDATE, 0, 0, number(0)), PROTOCOL),
    "windows that get too wide": (head() + frame(WINDOW_UPDATE, 0, 1, number(2**30)) + settings(_4=2**31 - 1), FLOW),
    "a first window that is too wide": (settings(_4=2**31), FLOW),
    "frames that are too small": (settings(_5=100), PROTOCOL),
    "settings of a stream": (frame(SETTINGS, 0, 1), PROTOCOL),
    "settings of another size": (frame(SETTINGS, 0, 0, bytes(5)), SIZE),
    "settings that are acknowledged, and more": (frame(SETTINGS, ACK, 0, bytes(6)), SIZE),
    "a ping of a stream": (frame(PING, 0, 1, bytes(8)), PROTOCOL),
    "a ping of another size": (frame(PING, 0, 0, bytes(7)), SIZE),
    "a priority of stream 0": (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "a priority of another size": (frame(PRIORITY, 0, 1, bytes(4)), SIZE),
    "a goodbye of a stream": (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    "a push": (frame(PUSH_PROMISE, 4, 1, number(2) + BLOCK), PROTOCOL),
    "a frame that is too large": (frame(DATA, 0, 1, bytes(2**20 + 1)), SIZE),
    "the head of one": (struct.pack(">I", 2**24 - 1)[1:] + bytes(6), SIZE),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_what_breaks_a_connection_says_why_and_leaves_nothing(port: Port, name: str) -> None:
    sent, code = BREAKS[name]
    client, other = await port.client(), await port.client()
    client.send(sent + frame(DATA, 0, 1, bytes(1000)) * 100)  # what is on its way does not keep it from being told
    gone = await client.end()
    assert gone is not None
    assert gone[1] == code
    assert gone[2]
    await port.settled()
    other.send(head() + CALL)
    answered(await other.answer(), b"x")
    other.close()


LET_BE = {
    "priorities": frame(PRIORITY, 0, 1, bytes(5)) * 100,
    "unknown frames": frame(99, 255, 1, b"x") + frame(200, 0, 0, b"y" * 1000),
    "unknown settings and flags": frame(SETTINGS, 0xFE, 0, struct.pack(">HI", 0xFFFF, 7)),
    "a settled table of headers": settings(_1=2**32 - 1),
    "an answer to no ping": frame(PING, ACK, 0, bytes(8)),
    "data of a call that is over": frame(DATA, 0, 1, bytes(2**14)) * 10 + frame(DATA, 1, 1),
    "data of a call that is over, with its reserved bit": frame(DATA, 0, 2**31 + 1, b"x"),
    "a reset of a call that is over": frame(RST_STREAM, 0, 1, number(8)) * 3,
    "a window of a call that is over": frame(WINDOW_UPDATE, 0, 1, WIDEST),
    "reserved bits": frame(WINDOW_UPDATE, 0, 2**31, number(2**31 + 1)) + frame(PING, 0, 2**31, bytes(8)),
    "trailers of a call that is over": frame(HEADERS, 5, 1, block({}, x_a="b")),
    "malformed headers": frame(HEADERS, 5, 3, BLOCK + literal("X-A", "b")),
    "no call of gRPC": head(3, flags=5, content_type="text/html"),
    "a number that was left out": frame(RST_STREAM, 0, 3, number(8)),
    "a goodbye": frame(GOAWAY, 0, 0, bytes(8)),
}


@pytest.mark.parametrize("name", LET_BE)
async def test_what_does_not_break_a_connection(port: Port, name: str) -> None:
    client = await port.client()
    client.send(head(1) + CALL)
    answered(await client.answer(), b"x")
    if name == "a number that was left out":
        client.send(head(5, flags=5))
    client.send(LET_BE[name])
    assert await client.alive()
    client.send(head(7) + data(message(b"y"), stream=7))
    answered(await client.answer(7), b"y")
    client.close()


async def test_calls_that_are_none_are_told_so(port: Port) -> None:
    client = await port.client()
    client.send(
        head(1, content_type="application/json", flags=5) + frame(HEADERS, 5, 3, block({**FIELDS, ":method": "GET"}))
    )
    assert (await client.answer(1)).fields == {":status": "415"}
    assert (await client.answer(3)).fields == {":status": "405"}
    client.send(frame(HEADERS, 5, 5, BLOCK + literal("X-A", "b")))
    assert (await client.answer(5)).reset == PROTOCOL
    client.send(head(7) + data(message(b"x"), stream=7))
    answered(await client.answer(7), b"x")
    client.send(head(7) + frame(HEADERS, 4, 9, BLOCK) + data(message(b"x"), stream=9))
    answered(await client.answer(9), b"x")
    assert client.received.answers[7].reset == Code.STREAM_CLOSED, "a number is used once"
    client.close()


@pytest.mark.parametrize(
    "hello",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x02\0\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r!", b"\0" * 50],
)
async def test_what_is_no_http2_is_told_so(port: Port, hello: bytes) -> None:
    client = await port.client(hello=hello)
    gone = await client.end()
    assert gone is not None
    assert gone[1:] == (PROTOCOL, "this port speaks gRPC over HTTP/2")


FLOODS = {
    "cancelled calls": b"".join(head(stream) + reset(stream) for stream in range(1, 3001, 2)),
    "settings": frame(SETTINGS, 0, 0) * 1500,
    "pings": frame(PING, 0, 0, bytes(8)) * 1500,
    "empty data": head() + frame(DATA, 0, 1) * 1500,
    "empty data of no call": head(3) + frame(DATA, 0, 1) * 1500,
    "padding": head() + frame(DATA, PADDED, 1, b"\x05" + bytes(5)) * 1500,
    "priorities": frame(PRIORITY, 0, 1, bytes(5)) * 1500,
    "unknown frames": frame(99, 0, 0) * 1500,
    "resets of no call": head(3) + reset(1) * 1500,
    "malformed headers": b"".join(frame(HEADERS, 5, stream, b"\x82") for stream in range(1, 3001, 2)),
    "headers of no call": head(3) + head(1) * 1500,
    "goodbyes": frame(GOAWAY, 0, 0, bytes(8)) * 1500,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_floods_end_their_connection(port: Port, name: str) -> None:
    client = await port.client()
    client.send(FLOODS[name])
    gone = await client.end()
    assert gone is not None
    assert gone[1] == CALM
    assert len(client.received.frames) < 1300
    await port.settled()


async def test_what_clients_do_beside_their_calls_is_no_flood(port: Port) -> None:
    """Cancels among answers, and pings beside a stream of answers, as clients do that measure how fast the way is."""
    client = await port.client()
    client.send(head(1, rpc="ModelStreamInfer"))
    await client.alive()
    (connection,) = port.connections
    connection._patience, connection._counted = 20, asyncio.get_running_loop().time() + 3600
    for turn in range(100):
        client.send(data(message(b"x"), end=False) + frame(WINDOW_UPDATE, 0, 1, number(6)))
        await client.gets(6 * (turn + 1), exactly=False)
        client.send(frame(PING, 0, 0, bytes(8)))
    for stream in range(3, 203, 4):
        client.send(head(stream) + data(message(b"y"), stream=stream) + head(stream + 2) + reset(stream + 2))
        assert (await client.answer(stream)).status == "0"
    client.close()


async def test_calls_that_are_given_up_at_their_deadlines_are_no_flood(port: Port) -> None:
    """As clients do whose server is busy: a connection that ended for it would take their other calls along."""
    client = await port.client()
    client.send(head(1) + data(message(b"wait")))
    await client.alive()
    (connection,) = port.connections
    connection._patience, connection._counted = 20, asyncio.get_running_loop().time() + 3600
    for first in (3, 103, 203):
        given_up = range(first, first + 100, 2)
        calls = [head(stream) + data(message(b"wait"), stream=stream) for stream in given_up]
        # Those of a server that is late come with their cancels.
        client.send(b"".join(call + reset(stream) for call, stream in zip(calls, given_up, strict=True)))
        assert await client.alive()
        await asyncio.sleep(2 * _BRIEF_SECONDS)
    port.echo.go.set()
    answered(await client.answer(1), b"wait")
    client.close()
    await port.settled()


async def test_who_cancels_calls_at_once_has_no_more_of_them_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BRIEF_SECONDS", 3600)
    async with listening(most_streams=3) as port:
        client = await port.client()
        client.send(
            b"".join(head(stream) + data(message(b"wait"), stream=stream) + reset(stream) for stream in (1, 3, 5))
        )
        client.send(head(7))
        assert (await client.answer(7)).reset == Code.REFUSED_STREAM
        monkeypatch.setattr(connection, "_BRIEF_SECONDS", 0)
        client.send(head(9) + data(message(b"x"), stream=9))
        answered(await client.answer(9), b"x")
        client.close()
        await port.settled()


async def test_patience_comes_back_with_time(port: Port) -> None:
    client = await port.client()
    client.send(frame(99, 0, 0) * 990)
    assert await client.alive()
    (connection,) = port.connections
    connection._counted -= 60
    client.send(frame(99, 0, 0) * 990)
    assert await client.alive()
    client.close()


# Windows.


async def test_answers_go_as_far_as_the_windows_let_them(port: Port) -> None:
    client = await port.client()
    client.send(settings(_4=0) + head() + data(message(b"hello")))
    assert await client.alive()
    answer = client.received.answers[1]
    assert (answer.data, answer.over) == (b"", False)
    wanted = message(b"hello")
    for size in range(1, len(wanted) + 1):
        client.send(frame(WINDOW_UPDATE, 0, 1, number(1)))
        await client.alive()
        assert answer.data == wanted[:size]
    answered(answer)
    client.close()


async def test_a_window_may_shrink_below_nothing_and_grow_again(port: Port) -> None:
    client = await port.client()
    client.send(settings(_4=1000) + head() + data(message(b"large 5000")))
    answer = client.received.answers[1]
    await client.gets(1000)
    client.send(settings(_4=0))  # the window is -1000 now
    client.send(frame(WINDOW_UPDATE, 0, 1, number(1000)) + settings(_4=0))
    await client.alive()
    assert len(answer.data) == 1000
    client.send(frame(WINDOW_UPDATE, 0, 1, number(1)))
    await client.alive()
    assert len(answer.data) == 1001
    client.send(settings(_4=500))
    await client.alive()
    assert len(answer.data) == 1501
    client.send(settings(_4=10) + settings(_4=600) + head(3) + data(message(b"large 700"), stream=3))
    await client.gets(600, 3)
    assert len(answer.data) == 1601
    client.send(settings(_4=2**20))
    answered(await client.answer(), bytes(5000))
    answered(await client.answer(3), bytes(700))
    client.close()


async def until_all(client: RawClient, size: int) -> None:
    """Waits until all calls together have so many bytes, and no more come."""
    while sum(len(answer.data) for answer in client.received.answers.values()) < size:
        assert await client.more()
    await client.alive()


async def test_the_window_of_the_connection_is_shared_in_turn(port: Port) -> None:
    client = await port.client()
    client.send(settings(_4=2**31 - 1))
    for stream in range(1, 21, 2):
        client.send(head(stream) + data(message(b"large 100000"), stream=stream))
    await until_all(client, 65_535)
    got = {stream: len(client.received.answers[stream].data) for stream in range(1, 21, 2)}
    assert sum(got.values()) == 65_535
    client.send(frame(WINDOW_UPDATE, 0, 0, number(10 * 16_384)))
    await until_all(client, 65_535 + 10 * 16_384)
    grown = [len(client.received.answers[stream].data) - before for stream, before in got.items()]
    assert max(grown) - min(grown) <= 2**15
    client.send(reset(1) + frame(WINDOW_UPDATE, 0, 0, number(2**30)))
    for stream in range(3, 21, 2):
        answered(await client.answer(stream), bytes(100_000))
    assert await client.alive()
    client.close()


async def test_many_settings_of_many_calls_cost_little(port: Port) -> None:
    """A first window that is said again and again, of calls that all wait."""
    async with listening(most_streams=1000) as wide:
        client = await wide.client()
        client.send(settings(_4=0))
        for stream in range(1, 1601, 2):
            client.send(head(stream) + data(message(b"x"), stream=stream))
        await client.alive()
        many = b"".join(struct.pack(">HI", 4, value % 2) for value in range(2700))
        for _ in range(100):
            client.send(frame(SETTINGS, 0, 0, many[:16_200]))
        async with asyncio.timeout(60):
            assert await client.alive()
        client.close()


async def test_a_client_that_reads_nothing_holds_up_nobody_and_little_memory(port: Port) -> None:
    client, other = await port.client(), await port.client()
    client.send(settings(_4=2**31 - 1) + frame(WINDOW_UPDATE, 0, 0, number(2**30)))
    client.send(head(1, rpc="ModelStreamInfer") + data(message(b"many 9999999"), end=False))
    waiting = port.connections[0]
    await until(lambda: not waiting._writable)
    for stream in range(1, 201, 2):
        other.send(head(stream) + data(message(b"hello"), stream=stream))
        answered(await other.answer(stream))
    assert waiting.transport.get_write_buffer_size() < 2**20
    assert not waiting._writable
    assert sum(len(piece) for piece in waiting.streams[1].pending) < 2**20
    await client.more()
    client.close()
    other.close()


async def test_a_stream_that_its_client_reads_slowly_makes_no_more_answers(port: Port) -> None:
    client = await port.client()
    client.send(settings(_4=100) + head(1, rpc="ModelStreamInfer") + data(message(b"many 1000"), end=False))
    await client.alive()
    before = len(port.echo.asked)
    assert before < 20
    client.send(frame(WINDOW_UPDATE, 0, 1, number(140)))
    await client.alive()
    assert before < len(port.echo.asked) < before + 20
    client.close()


# Headers that go out.


@pytest.mark.parametrize("values", [{"_1": 0}, {"_1": 100}])
async def test_a_client_with_a_smaller_table_is_told_that_none_is_used(port: Port, values: dict[str, int]) -> None:
    client = await port.client()
    client.send(settings(**values))
    await client.until(SETTINGS, ACK)
    client.received._decoder.max_allowed_table_size = values["_1"]
    for stream, sent in ((1, CALL), (3, frame(DATA, 1, 3)), (5, data(message(b"x"), stream=5))):
        client.send(head(stream) + sent)
        assert (await client.answer(stream)).status
    assert [payload[:1] for kind, _, _, payload in client.received.frames if kind == HEADERS] == [
        b"\x20", b"\0", b"\x88", b"\x88", b"\0"
    ]  # fmt: skip
    client.close()


async def test_more_calls_than_there_may_be_are_refused_and_counted_by_nobody() -> None:
    async with listening(most_streams=3) as port:
        client = await port.client()
        for stream in (1, 3, 5, 7, 9):
            client.send(head(stream) + data(message(b"wait"), stream=stream))
        for stream in (7, 9):
            assert (await client.answer(stream)).reset == Code.REFUSED_STREAM
        assert struct.pack(">HI", 3, 3) in client.received.frames[0][3]
        port.echo.go.set()
        for stream in (1, 3, 5):
            answered(await client.answer(stream), b"wait")
        assert len(await port.settled(3)) == 3
        client.close()


# Goodbyes.


async def test_a_connection_that_leaves_answers_what_it_has_and_looks_at_nothing_else(port: Port) -> None:
    """What it has is what the client had opened before it heard: it says so by its answer to a ping."""
    client = await port.client()
    client.send(head(1) + data(message(b"wait")))
    await until(lambda: port.echo.running == 1)
    (connection,) = port.connections
    connection.leave()
    client.send(head(3) + data(message(b"wait"), stream=3))
    await client.until(GOAWAY)
    assert client.received.gone == (2**31 - 1, 0, "")
    await client.until(GOAWAY)
    assert client.received.gone == (3, 0, "")
    client.send(head(5) + data(message(b"x"), stream=5) + head(7, flags=5))
    assert await client.alive()
    assert not client.received.answers[5].over
    port.echo.go.set()
    client.send(b"".join(head(stream) + data(bytes(9000), stream=stream) for stream in range(9, 99, 2)))
    answered(await client.answer(1), b"wait")
    answered(await client.answer(3), b"wait")
    await client.end()
    assert await port.settled(2) == [("ModelInfer", "OK")] * 2


async def test_what_is_said_last_is_heard_by_a_client_that_goes_on_sending(port: Port) -> None:
    """Closed with bytes unread, the system would throw away what is not on its way yet."""
    client = await port.client()
    client.send(settings(_4=2**20) + frame(WINDOW_UPDATE, 0, 0, number(2**20)))
    await client.alive()
    client.send(head(rpc="ModelStreamInfer"))
    (connection,) = port.connections
    await until(lambda: connection.streams)
    connection.leave()
    client.send(data(message(b"large 250000")))
    for _ in range(20):
        client.send(frame(99, 0, 0, bytes(2**14)) * 20)
        await asyncio.sleep(0)
    await until(lambda: not connection.streams)
    answered(await client.answer(), bytes(250_000))
    await client.end()


@pytest.mark.parametrize("pong", [True, False])
async def test_a_client_that_does_not_say_it_has_heard_has_some_time(
    port: Port, monkeypatch: pytest.MonkeyPatch, pong: bool
) -> None:
    """Another ping's answer is none, and neither is a bare one of before."""
    monkeypatch.setattr(sending, "FAREWELL_SECONDS", 0.05)
    client = await port.client()
    client.send(frame(PING, 1, 0, FAREWELL))
    await client.alive()
    monkeypatch.setattr(client, "send", lambda _: None)  # it answers no ping
    port.connections[0].leave()
    if pong:
        client._writer.write(frame(PING, 1, 0, bytes(8)))
    await client.until(GOAWAY)
    assert client.received.gone == (2**31 - 1, 0, "")
    assert await client.end() == (0, 0, "")


async def test_a_connection_that_leaves_because_of_an_error_takes_nothing_more(port: Port) -> None:
    client = await port.client()
    await client.alive()
    port.connections[0].leave(Code.ENHANCE_YOUR_CALM, "calm")
    client.send(head(1) + data(message(b"x")))
    assert await client.end() == (0, Code.ENHANCE_YOUR_CALM, "calm")
    assert client.received.count(GOAWAY) == 1
    assert not port.echo.asked


async def test_a_connection_that_breaks_while_it_leaves_says_no_later_stream(port: Port) -> None:
    client = await port.client()
    client.send(head(1) + data(message(b"wait")))
    await until(lambda: port.echo.running)
    port.connections[0].leave()
    await client.until(GOAWAY)
    await client.until(GOAWAY)
    client.send(head(3) + frame(DATA, 0, 0, b"x"))
    gone = await client.end()
    assert gone is not None
    assert gone[:2] == (1, PROTOCOL)


async def test_a_client_that_says_goodbye_gets_its_answers(port: Port) -> None:
    client = await port.client()
    client.send(head(1) + data(message(b"wait")) + frame(GOAWAY, 0, 0, bytes(8)))
    await until(lambda: port.echo.running)
    port.echo.go.set()
    answered(await client.answer(), b"wait")
    client.close()
