"""Large requests of a front end's clients, which come to where the core reads them: what is promised is kept or given
back."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from convoynet.server.frontend import channel, messages
from convoynet.server.frontend.calls import Calls
from convoynet.server.frontend.channel import Channel, Shelf
from convoynet.server.frontend.remote import Remote
from convoynet.server.http2 import connection, listener
from convoynet.server.http2.listener import Limits, Listener
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import Reply
from tests.server.frontend.test_frontend_channel import BLOCK, End, connect
from tests.server.http2.conftest import until
from tests.server.http2.test_large_messages import WINDOW, allowed, head, well
from tests.server.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    WINDOW_UPDATE,
    RawClient,
    block,
    frame,
    message,
    number,
    rpc_path,
)

BLOCKS, RING = 32, 16
LARGE = message(bytes(10 * BLOCK - 100))


def unused(shelf: Shelf) -> bool:
    """Whether all of a shelf is free, and nothing promised."""
    if (offset := shelf.promise(1)) >= 0:
        shelf.fulfil(offset)
        shelf.give_back(offset)
    return not any(shelf._used) and not shelf._promised


class Front:
    """A front end in the test's process; the other end of its channel answers every call with its payload's end.

    Attributes:
        received: How each payload came.
    """

    def __init__(self) -> None:
        self.remote = Remote(Budget(2**30))
        out, back = mmap.mmap(-1, BLOCK * (BLOCKS + RING)), mmap.mmap(-1, BLOCK)
        self.lost = asyncio.Event()
        self.channel = Channel(out, back, self.remote.received, self.lost.set, BLOCK * BLOCKS)
        self.core = End(back, out, self._answer)
        self.remote.attach(self.channel)
        self.calls = Calls(self.remote, self.remote.budget, 2**30, 100)
        self.listener = Listener(self.calls, Limits())
        self.channel.on_full = self.listener.hold
        self.received: list[type] = []
        self.port = 0

    @property
    def shelf(self) -> Shelf:
        """Its account."""
        return self.channel._shelf

    def _answer(self, kind: int, call: int, meta: bytes, payload: Any) -> None:
        if kind == messages.UNARY:
            self.received.append(type(payload))
            reply = messages.reply_to_bytes(Reply(grpc.StatusCode.OK))
            self.core.channel.send(messages.REPLY, call, reply, bytes(payload[-5:]))

    async def client(self) -> RawClient:
        """One that says hello."""
        return await RawClient.connect(self.port)


@asynccontextmanager
async def fronting() -> AsyncIterator[Front]:
    front = Front()
    await connect(front, front.core)
    front.port = await front.listener.start("127.0.0.1", 0)
    try:
        yield front
    finally:
        await front.listener.stop(0.0)
        front.channel.close()
        await front.core.lost.wait()


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """A front end whose shelf is all free in the end."""
    async with fronting() as running:
        yield running
        await until(lambda: unused(running.shelf))
        assert not running.remote.budget.held


async def begun(client: RawClient, stream: int = 1, whole: bytes = LARGE, rpc: str = "ModelInfer") -> None:
    """The beginning of a large request, as far as the first window."""
    client.send(head(stream, rpc) + frame(DATA, 0, stream, whole[:WINDOW]))
    await allowed(client, stream)


@pytest.mark.parametrize("size", [2**14, 2**20])
async def test_a_large_request_comes_to_where_the_core_reads_it(front: Front, size: int) -> None:
    client = await front.client()
    for stream in (1, 3, 5):
        whole = message(os.urandom(10 * BLOCK))
        client.send(head(stream))
        await client.upload(whole[:70_000], stream, size)
        assert front.shelf._promised == 10
        await client.upload(whole[70_000:], stream, size)
        client.send(frame(DATA, END_STREAM, stream))
        assert (await client.answer(stream)).data == message(whole[-5:])
    assert front.received == [memoryview] * 3
    client.close()


ENDS = {
    "reset": lambda client: client.send(frame(RST_STREAM, 0, 1, number(8))),
    "half of it": lambda client: client.send(frame(DATA, END_STREAM, 1, bytes(100))),
    "more than it may send": lambda client: client.send(frame(DATA, 0, 1, bytes(2**20))),
    "the connection is gone": lambda client: client.abort(),
    "the connection ends": lambda client: client.close(),
    "what breaks it": lambda client: client.send(frame(DATA, 0, 99, b"x")),
}


@pytest.mark.parametrize("name", ENDS)
async def test_what_is_promised_to_a_request_that_ends_is_given_back(front: Front, name: str) -> None:
    client = await front.client()
    await begun(client)
    assert front.shelf._promised == 10
    ENDS[name](client)
    await until(lambda: unused(front.shelf))
    client.close()


async def test_a_deadline_gives_it_back(front: Front) -> None:
    client = await front.client()
    client.send(frame(HEADERS, END_HEADERS, 1, block({**rpc_path("ModelInfer"), "grpc-timeout": "100m"})))
    client.send(frame(DATA, 0, 1, LARGE[:WINDOW]))
    assert (await client.answer()).status == "4"
    await until(lambda: unused(front.shelf))
    client.close()


async def test_a_server_that_stops_gives_it_back() -> None:
    async with fronting() as front:
        client = await front.client()
        await begun(client)
        front.calls.end()
        assert (await client.answer()).status == "14"
        assert unused(front.shelf)
        client.close()


async def test_a_slow_request_leaves_the_shelf_and_is_answered(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_GUEST_SECONDS", 0.0)
    client = await front.client()
    whole = message(os.urandom(10 * BLOCK))
    await begun(client, whole=whole)
    await until(lambda: unused(front.shelf))
    client.send(frame(DATA, END_STREAM, 1, whole[WINDOW:]))
    assert (await client.answer()).data == message(whole[-5:])
    client.close()


async def test_promises_leave_half_of_the_shelf_to_what_has_come(front: Front) -> None:
    """Clients that say they send much and do not hold up nobody: what comes whole finds room."""
    slow, client = await front.client(), await front.client()
    for stream in range(1, 100, 2):
        slow.send(head(stream) + frame(DATA, 0, stream, LARGE[:10]))
    assert await slow.alive()
    assert front.shelf._promised == 10
    client.send(head() + frame(WINDOW_UPDATE, 0, 1, number(2**20)))
    await client.upload(LARGE)
    client.send(frame(DATA, END_STREAM, 1))
    assert (await client.answer()).status == "0"
    assert front.received == [memoryview]
    assert await well(client, 3)
    slow.close()
    client.close()


async def test_requests_of_streams_and_compressed_ones_are_promised_nothing(front: Front) -> None:
    client = await front.client()
    compressed = message(bytes(10 * BLOCK), compressed=1)
    await begun(client, 1, compressed)
    client.send(head(3) + frame(DATA, 0, 3, LARGE[:4]))
    assert await client.alive()
    assert not front.shelf._promised
    client.send(frame(RST_STREAM, 0, 1, number(8)))
    client.close()


async def test_what_was_promised_outlives_the_core() -> None:
    async with fronting() as front:
        client = await front.client()
        await begun(client)
        front.core.channel.close()
        await front.lost.wait()
        assert front.channel.place(BLOCK) is None
        client.send(frame(DATA, END_STREAM, 1, LARGE[WINDOW:]))
        assert await client.alive()
        client.close()


async def test_a_promised_payload_overtakes_what_waits_for_room() -> None:
    async with fronting() as front:
        got: list[tuple[int, bytes]] = []
        front.core.channel._received = lambda kind, call, meta, payload: got.append((call, bytes(payload)))
        place = front.channel.place(2 * BLOCK)
        assert place is not None
        place[:] = b"p" * len(place)
        waiting = os.urandom(BLOCK * (BLOCKS + 5))
        front.channel.send(messages.UNARY, 1, b"", waiting)
        front.channel.send(messages.UNARY, 2, b"meta", place)
        del place
        await until(lambda: len(got) == 2)
        assert got == [(2, b"p" * 2 * BLOCK), (1, waiting)]
        await until(lambda: unused(front.shelf))


@pytest.mark.parametrize("payload", [b"", b"x"])
async def test_calls_that_are_cancelled_at_once_do_not_pile_up_before_a_busy_core(
    front: Front, monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    """Each leaves something for the core to do, and their client waits for no answer."""
    monkeypatch.setattr(connection, "_BRIEF_SECONDS", 0.0)
    monkeypatch.setattr(channel, "_MOST_WAITING", 32)
    flood, other = await front.client(), await front.client()
    assert await well(other, 1)
    core, way = front.core.channel._transport, front.channel._transport
    assert core is not None
    assert way is not None
    core.pause_reading()
    count, metadata = 600, {"x-long": "m" * 2**14}
    if payload:  # the memory for payloads is full as well
        front.channel.send(messages.UNARY, 2**40, b"", bytes(BLOCK * (BLOCKS + RING)))
    for stream in range(1, 2 * count, 2):
        whole = frame(HEADERS, END_HEADERS, stream, block({**rpc_path("ModelInfer"), **metadata}))
        flood.send(
            whole + frame(DATA, 0, stream, message(payload)) * bool(payload) + frame(RST_STREAM, 0, stream, number(8))
        )
    await until(lambda: front.channel.full)
    await until(lambda: not flood._writer.transport.get_write_buffer_size() or not flowing(front))
    assert way.get_write_buffer_size() + sum(len(each[2]) for each in front.channel._waiting) < 2**21
    late = await front.client()  # is let in, and waits as well
    core.resume_reading()
    assert await flood.alive()
    assert await well(other, 3)
    assert await well(late, 1)
    for client in (flood, other, late):
        client.close()


def flowing(front: Front) -> bool:
    """Whether anything is read from any client."""
    return any(each.transport.is_reading() for each in front.listener._connections)
