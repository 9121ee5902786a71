"""Calls over HTTP/2: their messages however they are cut, each end of theirs, and what is counted of it."""

from __future__ import annotations

import asyncio
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from convoynet.server.memory.budget import Budget
from tests.server.http2.conftest import LARGEST, OVER_BUDGET, Port
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
    WINDOW_UPDATE,
    Answer,
    block,
    frame,
    message,
    number,
    rpc_path,
    settings,
)

STREAMING = "ModelStreamInfer"


def head(stream: int = 1, flags: int = END_HEADERS, rpc: str = "ModelInfer", **more: str | None) -> bytes:
    return frame(HEADERS, flags, stream, block(rpc_path(rpc), **more))


def data(payload: bytes, *, stream: int = 1, end: bool = True) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)


def reset(stream: int = 1) -> bytes:
    return frame(RST_STREAM, 0, stream, number(8))


def large_head() -> bytes:
    fields = block(FIELDS, x_a="y" * 70_000)
    first, rest = fields[:16_384], fields[16_384:]
    parts = [rest[at : at + 16_384] for at in range(0, len(rest), 16_384)]
    return frame(HEADERS, 0, 1, first) + b"".join(
        frame(CONTINUATION, END_HEADERS if part is parts[-1] else 0, 1, part) for part in parts
    )


def whole_call() -> bytes:
    """A call with all that a client may do to it."""
    fields = block(FIELDS, x_a="1")
    content = message(b"hello")
    return b"".join(
        (
            PREFACE,
            settings(_1=4096, _4=100_000),
            frame(HEADERS, PADDED | 0x20, 1, b"\x03" + b"\0\0\0\0\x10" + fields[:20] + bytes(3)),
            frame(CONTINUATION, 0, 1, fields[20:40]),
            frame(CONTINUATION, END_HEADERS, 1, fields[40:]),
            frame(WINDOW_UPDATE, 0, 0, number(1000)),
            frame(DATA, PADDED, 1, b"\x02" + content[:3] + bytes(2)),
            frame(DATA, 0, 1, b""),
            frame(0xBE, 0xFF, 1, b"unknown"),
            frame(DATA, 0, 1, content[3:6]),
            frame(2, 0, 1, b"\0\0\0\0\x10"),
            frame(DATA, END_STREAM, 1, content[6:]),
        )
    )


@contextmanager
def filled(budget: Budget, but: int) -> Iterator[None]:
    """Holds all of the budget but so many bytes, as many small things."""
    parts = [10_000] * ((budget.limit - but) // 10_000) + [(budget.limit - but) % 10_000]
    for size in parts:
        budget.take(size)
    try:
        yield
    finally:
        budget.give(sum(parts))


def answered(answer: Answer, payload: bytes = b"hello") -> None:
    assert (answer.status, answer.data) == ("0", message(payload)), answer
    assert (answer.fields[":status"], answer.fields["content-type"]) == ("200", "application/grpc")


async def test_frames_may_be_split_anywhere(port: Port) -> None:
    sent = whole_call()
    clients = [await port.client(hello=sent[:at]) for at in range(1, len(sent))]
    await asyncio.sleep(0.05)  # for the first parts to come alone
    for at, client in enumerate(clients, 1):
        client.send(sent[at:])
    for client in clients:
        answered(await client.answer())
    assert port.echo.counted == [("ModelInfer", "OK")] * len(clients)
    assert port.echo.asked[0].metadata == (("x-a", "1"),)
    for client in clients:
        client.close()


async def test_frames_may_come_byte_by_byte_and_all_at_once(port: Port) -> None:
    client = await port.client(hello=b"")
    for byte in whole_call():
        client.send(bytes([byte]))
        await asyncio.sleep(0)
    answered(await client.answer())
    many = b"".join(head(stream) + data(message(b"hello"), stream=stream) for stream in range(3, 203, 2))
    client.send(many)
    for stream in range(3, 203, 2):
        answered(await client.answer(stream))
    client.close()


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_530, 65_531, 65_536, LARGEST])
@pytest.mark.parametrize("rpc", ["ModelInfer", STREAMING])
async def test_messages_of_every_size_come_back(port: Port, rpc: str, size: int) -> None:
    client = await port.client()
    client.send(settings(_4=2**31 - 1) + frame(WINDOW_UPDATE, 0, 0, number(2**30)))
    payload = bytes(size)
    client.call(rpc)
    await client.upload(message(payload))
    client.send(data(b""))
    answered(await client.answer(), payload)
    await port.settled()
    client.close()


async def test_several_messages_of_a_stream_in_any_frames(port: Port) -> None:
    wanted = [b"", b"a", b"bb" * 500, b"", b"c"]
    sent = b"".join(message(payload) for payload in wanted)
    for size in (1, 4, 7, len(sent)):
        client = await port.client()
        client.send(head(rpc=STREAMING))
        for at in range(0, len(sent), size):
            client.send(data(sent[at : at + size], end=at + size >= len(sent)))
        answer = await client.answer()
        assert (answer.status, answer.data) == ("0", sent)
        client.close()


async def test_a_stream_goes_on_beyond_its_first_window(port: Port) -> None:
    client = await port.client()
    client.send(settings(_4=2**31 - 1) + frame(WINDOW_UPDATE, 0, 0, number(2**30)))
    client.call(STREAMING)
    await client.upload(message(bytes(995)) * 300, size=997)
    client.send(data(b""))
    answer = await client.answer()
    assert (answer.status, len(answer.data)) == ("0", 300 * 1000)
    client.close()


Sends = Callable[[], bytes]
DEFLATED = zlib.compress(b"hello" * 100)
ENDS: dict[str, tuple[Sends, str, str]] = {
    "answered": (lambda: head() + data(message(b"x")), "0", "OK"),
    "END_STREAM comes alone": (lambda: head() + data(message(b"x"), end=False) + data(b""), "0", "OK"),
    "END_STREAM comes as trailers": (
        lambda: head() + data(message(b"x"), end=False) + frame(HEADERS, 5, 1, block({}, x_a="b")), "0", "OK"
    ),
    "no END_STREAM": (lambda: head() + data(message(b"x"), end=False), "0", "OK"),
    "a second message": (lambda: head() + data(message(b"x") + message(b"y")), "0", "OK"),
    "a second message that is too large": (
        lambda: head() + data(message(b"x") + b"\0\xff\xff\xff\xff", end=False), "0", "OK"
    ),
    "nothing": (lambda: head(flags=5), "12", "UNIMPLEMENTED"),
    "nothing, later": (lambda: head() + data(b""), "12", "UNIMPLEMENTED"),
    "a part of a prefix": (lambda: head() + data(b"\0\0"), "12", "UNIMPLEMENTED"),
    "a part of a message": (lambda: head() + data(message(b"hello")[:-1]), "12", "UNIMPLEMENTED"),
    "too large": (lambda: head() + data(b"\0\xff\xff\xff\xff", end=False), "8", "RESOURCE_EXHAUSTED"),
    "an unknown flag of a message": (lambda: head() + data(message(b"x", compressed=2)), "3", "INVALID_ARGUMENT"),
    "compressed, with no encoding": (lambda: head() + data(message(b"x", compressed=1)), "3", "INVALID_ARGUMENT"),
    "compressed, with none": (
        lambda: head(grpc_encoding="identity") + data(message(b"x", compressed=1)), "3", "INVALID_ARGUMENT"
    ),
    "gzip": (
        lambda: head(grpc_encoding="gzip") + data(message(gzip.compress(b"x"), compressed=1)), "0", "OK"
    ),
    "deflate": (lambda: head(grpc_encoding="deflate") + data(message(DEFLATED, compressed=1)), "0", "OK"),
    "an encoding, and not compressed": (lambda: head(grpc_encoding="gzip") + data(message(b"x")), "0", "OK"),
    "no gzip": (
        lambda: head(grpc_encoding="gzip") + data(message(b"x", compressed=1)), "3", "INVALID_ARGUMENT"
    ),
    "gzip that ends early": (
        lambda: head(grpc_encoding="deflate") + data(message(DEFLATED[:-5], compressed=1)), "3", "INVALID_ARGUMENT"
    ),
    "a bomb": (
        lambda: head(grpc_encoding="gzip") + data(message(gzip.compress(bytes(10**7)), compressed=1)),
        "8", "RESOURCE_EXHAUSTED",
    ),
    "an encoding that there is not": (
        lambda: head(grpc_encoding="snappy") + data(message(b"x")), "12", "UNIMPLEMENTED"
    ),
    "too much metadata": (large_head, "8", "RESOURCE_EXHAUSTED"),
    "a method that there is not": (lambda: head(rpc="Nothing") + data(message(b"x")), "12", "UNIMPLEMENTED"),
    "no right to it": (lambda: head(x_refuse="1") + data(message(b"x")), "16", "UNAUTHENTICATED"),
    "an answer without room": (lambda: head() + data(message(b"large 5000000")), "8", "RESOURCE_EXHAUSTED"),
    "a cancel before the request": (lambda: head() + reset(), "", "CANCELLED"),
    "a cancel within it": (lambda: head() + data(b"\0\0\0\0\x09ab", end=False) + reset(), "", "CANCELLED"),
    "a cancel behind it": (lambda: head() + data(message(b"wait")) + reset(), "", "CANCELLED"),
    "a cancel while it is inflated": (
        lambda: head(grpc_encoding="gzip") + data(message(gzip.compress(b"wait"), compressed=1)) + reset(),
        "", "CANCELLED",
    ),
    "more than the window": (
        lambda: head() + data(message(b"wait") + message(bytes(90_000))[:16_000], end=False)
        + data(bytes(16_000), end=False) * 4, "", "CANCELLED"
    ),
    "data behind the end": (lambda: head() + data(message(b"wait")) + data(b"x"), "", "CANCELLED"),
    "headers within": (lambda: head() + head(), "", "CANCELLED"),
    "a window that is too wide": (
        lambda: head() + frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1)), "", "CANCELLED"
    ),
    "a window of nothing more": (lambda: head() + frame(WINDOW_UPDATE, 0, 1, number(0)), "", "CANCELLED"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
async def test_every_end_is_told_and_counted_once_and_leaves_nothing(port: Port, name: str) -> None:
    sends, status, code = ENDS[name]
    client = await port.client()
    client.send(sends())
    if code == "CANCELLED":
        assert await client.alive()
    else:
        assert (await client.answer()).status == status
    assert [how for _, how in await port.settled(1)] == [code]
    assert await client.alive(), "the connection goes on"
    client.send(head(3) + data(message(b"after"), stream=3))
    answered(await client.answer(3), b"after")
    client.close()


STREAM_ENDS: dict[str, tuple[bytes, str, int]] = {
    "answered": (data(message(b"x")), "0", 1),
    "no messages": (data(b""), "0", 0),
    "a part of a prefix at the end": (data(message(b"x") + b"\0\0"), "3", 2),
    "a part of a message at the end": (data(message(b"x") + message(b"yy")[:-1]), "3", 2),
    "a message that is too large": (data(message(b"x") + b"\0\xff\xff\xff\xff", end=False), "8", 2),
    "a message of an unknown flag": (data(message(b"x", compressed=7), end=False), "3", 1),
    "compressed, with no encoding": (data(message(b"x", compressed=1), end=False), "3", 1),
}


@pytest.mark.parametrize("name", STREAM_ENDS)
async def test_every_end_of_a_stream_is_told_and_leaves_nothing(port: Port, name: str) -> None:
    """Each request is counted, and the one that cannot be taken too."""
    sent, status, counted = STREAM_ENDS[name]
    client = await port.client()
    client.send(head(rpc=STREAMING) + sent)
    assert (await client.answer()).status == status
    await port.settled()
    if status != "0":
        assert port.echo.counted.pop(-1)[1] in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        counted -= 1
    assert len(port.echo.asked) == counted
    client.close()


async def test_a_bug_is_told_as_one(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    client = await port.client()
    client.send(head() + data(message(b"bug")))
    answer = await client.answer()
    assert (answer.status, answer.fields["grpc-message"]) == ("13", "internal error")
    assert await port.settled(1) == [("ModelInfer", "INTERNAL")]
    client.send(head(3, rpc=STREAMING) + data(message(b"bug"), stream=3))
    assert (await client.answer(3)).status == "13"
    assert caplog.text.count("a bug in the server") == 2
    caplog.clear()
    client.close()


@pytest.mark.parametrize("rpc", ["ModelInfer", STREAMING])
@pytest.mark.parametrize("sent", [b"", b"\0\0", message(bytes(1000))[:500], message(b"wait"), message(b"large 90000")])
@pytest.mark.parametrize("how", ["reset", "close", "abort", "broken"])
async def test_a_client_that_goes_away_leaves_nothing(port: Port, rpc: str, sent: bytes, how: str) -> None:
    """At each stage, and in each way."""
    client = await port.client()
    client.send(settings(_4=100))
    for stream in (1, 3):
        client.send(head(stream, rpc=rpc) + (data(sent, stream=stream, end=False) if sent else b""))
    await client.alive()
    if how == "reset":
        client.send(reset(1) + reset(3))
    elif how == "close":
        client.close()
    elif how == "abort":
        client.abort()
    else:
        client.send(frame(5, 0, 1))
        assert await client.end()
    await port.settled()
    client.close()


async def test_a_thousand_calls_of_each_kind_leave_nothing(port: Port) -> None:
    client = await port.client()
    stream = 1
    for _ in range(100):
        for rpc, sent, end in (
            ("ModelInfer", message(b"x"), b""),
            ("ModelInfer", b"\0\0", reset),
            ("ModelInfer", message(b"wait"), reset),
            (STREAMING, message(b"x"), lambda at: data(b"", stream=at)),
            (STREAMING, message(b"wait"), reset),
            ("Nothing", b"", b""),
        ):
            client.send(head(stream, rpc=rpc) + data(sent, stream=stream, end=False))
            if not callable(end):
                await client.answer(stream)
            else:
                client.send(end(stream))
            stream += 2
        assert await client.alive()
    (connection,) = port.connections
    await port.settled()
    assert not connection.streams
    assert not connection._sending
    assert not port.calls._open
    assert not port.calls._tasks
    client.close()


async def test_inflating_gives_back_what_it_counted_when_its_call_is_cancelled(port: Port) -> None:
    client = await port.client()
    packed = message(gzip.compress(bytes(LARGEST)) + b"", compressed=1)
    large = message(gzip.compress(os.urandom(40_000) + bytes(900_000)), compressed=1)
    for stream in range(1, 41, 2):
        client.send(head(stream, grpc_encoding="gzip"))
        sent = packed if stream % 4 == 1 else large
        for at in range(0, len(sent), 16_000):
            client.send(data(sent[at : at + 16_000], stream=stream, end=False))
        await asyncio.sleep(stream % 3 / 1000)
        client.send(reset(stream))
    await client.alive()
    await port.settled()
    client.close()


async def test_small_parts_of_a_message_take_no_more_than_they_count_for(port: Port) -> None:
    client = await port.client()
    client.send(head() + data(message(bytes(30_000))[:9], end=False))
    for _ in range(10):
        client.send(b"".join(data(b"ab", end=False) for _ in range(1000)))
        await client.alive()
    (stream,) = port.connections[0].streams.values()
    assert sys.getsizeof(stream._whole) < 2 * 20_004
    assert port.budget.held == 20_004
    client.send(data(bytes(9_996)))
    answer = await client.answer()
    assert answer.data == message(bytes(4) + b"ab" * 10_000 + bytes(9_996))
    client.close()


async def test_a_message_for_which_there_is_no_room_is_refused(port: Port) -> None:
    client = await port.client()
    for rpc, stream in (("ModelInfer", 1), (STREAMING, 3)):
        with filled(port.budget, but=10_000):
            client.send(head(stream, rpc=rpc) + data(message(bytes(20_000))[:15_000], stream=stream, end=False))
            answer = await client.answer(stream)
        assert answer.status == "8"
        assert "--max-inflight-bytes" in answer.fields["grpc-message"]
    assert [how for _, how in await port.settled(2)] == ["RESOURCE_EXHAUSTED"] * 2
    client.close()


async def test_a_call_that_ends_before_its_handler_begins_takes_no_room(port: Port) -> None:
    client = await port.client()
    client.send(head(rpc=STREAMING) + data(message(bytes(300_000))[:5], end=False) + reset())
    await client.alive()
    await port.settled()
    client.close()


async def test_parts_of_large_messages_never_take_the_room_of_small_ones(port: Port) -> None:
    client = await port.client()
    streams, size, part = range(1, 11, 2), 500_000, 3_000
    client.send(frame(WINDOW_UPDATE, 0, 0, number(2**24)))
    with filled(port.budget, but=700_000):
        for stream in streams:
            client.send(head(stream) + data(message(bytes(size))[:5], stream=stream, end=False))
        await client.alive()
        for turn in range(700_000 // part):
            client.send(data(bytes(part), stream=streams[turn % len(streams)], end=False))
            small = 101 + 2 * turn
            client.send(head(small) + data(message(bytes(4_000)), stream=small))
            answered(await client.answer(small), bytes(4_000))
        assert any(stream not in port.connections[0].streams for stream in streams)  # there was no room for all
    client.close()


async def test_a_message_for_which_there_will_be_no_room_is_refused_before_it_comes(port: Port) -> None:
    """And takes none of what is left, which small ones need."""
    client = await port.client()
    with filled(port.budget, but=100_000):
        client.send(head() + data(message(bytes(200_000))[:10], end=False))
        assert (await client.answer()).status == "8"
        assert port.budget.held == OVER_BUDGET - 100_000
        client.send(head(3) + data(message(b"small"), stream=3))
        answered(await client.answer(3), b"small")
    await port.settled(2)
    client.close()
