"""The channel between a front end and the core: payloads, calls, replies and streams that cross it."""

from __future__ import annotations

import asyncio
import dataclasses
import mmap
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.errors import OverBudget
from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import Channel, Ring, Shelf
from convoynet.server.frontend.remote import Remote
from convoynet.server.frontend.session import Session
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.types import Call

Message = tuple[int, int, bytes, bytes]


class HasChannel(Protocol):
    """What has an end of a channel."""

    @property
    def channel(self) -> Channel: ...


class End:
    """One end of a channel and what came in by it."""

    def __init__(
        self, out: mmap.mmap, into: mmap.mmap, received: Callable[..., None] | None = None, shelf: int = 0
    ) -> None:
        self.got: list[Message] = []
        self.lost = asyncio.Event()
        self.changed = asyncio.Event()
        self.channel = Channel(out, into, received or self._take, self.lost.set, shelf)

    def _take(self, *message: Any) -> None:
        self.got.append(message)
        self.changed.set()

    async def wait_for(self, count: int) -> list[Message]:
        while len(self.got) < count:
            self.changed.clear()
            await self.changed.wait()
        return self.got


async def connect(*ends: HasChannel) -> None:
    loop = asyncio.get_running_loop()
    for end, way in zip(ends, socket.socketpair(), strict=True):
        await loop.create_unix_connection(lambda end=end: end.channel, sock=way)  # type: ignore[misc]


@asynccontextmanager
async def channels(ring: int) -> AsyncIterator[tuple[End, End]]:
    one, other = mmap.mmap(-1, ring), mmap.mmap(-1, ring)
    left, right = End(one, other), End(other, one)
    await connect(left, right)
    yield left, right
    left.channel.close()
    await right.lost.wait()


@pytest.mark.parametrize("ring", [64, 4096])
async def test_payloads_of_any_size_arrive_whole_and_in_order_both_ways(ring: int) -> None:
    sizes = [0, 1, ring - 1, ring, ring + 1, 10 * ring, 3, 0, ring // 2, ring // 2 + 1]
    sent = [(messages.MESSAGE, i, b"m" * (i % 3), os.urandom(size)) for i, size in enumerate(sizes * 5)]
    async with channels(ring) as (left, right):
        for message in sent:
            left.channel.send(*message)
            right.channel.send(*message)
        async with asyncio.timeout(60):
            assert await right.wait_for(len(sent)) == sent
            assert await left.wait_for(len(sent)) == sent


async def test_a_channel_tells_that_the_other_end_is_gone_and_takes_no_more() -> None:
    async with channels(4096) as (left, right):
        right.channel.close()
        async with asyncio.timeout(60):
            await left.lost.wait()
        left.channel.send(messages.MESSAGE, 1, b"", b"late")


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(16, 256))
def test_spans_of_a_ring_never_overlap_what_is_not_read(wanted: list[int], size: int) -> None:
    ring, unread = Ring(size), list[tuple[int, int]]()
    for want in wanted:
        offset, length = ring.take(want)
        assert 0 <= offset <= offset + length <= size
        assert length <= want
        for begin, end in unread:
            assert offset + length <= begin or end <= offset or not length
        if length:
            unread.append((offset, offset + length))
        else:
            assert sum(end - begin for begin, end in unread) == size
        if want % 3 == 0 or not length:
            begin, end = unread.pop(0)
            ring.freed += end - begin


BLOCK = 64 * 2**10


@given(st.lists(st.tuples(st.integers(1, 5 * BLOCK), st.integers(0, 9)), max_size=60))
def test_spans_of_a_shelf_never_overlap_and_come_free_in_any_order(steps: list[tuple[int, int]]) -> None:
    shelf, held = Shelf(4096, 8 * BLOCK), list[tuple[int, int]]()
    for length, which in steps:
        offset = shelf.take(length)
        if offset >= 0:
            assert 4096 <= offset <= offset + length <= 4096 + 8 * BLOCK
            assert all(offset + length <= begin or begin + size <= offset for begin, size in held)
            held.append((offset, length))
        elif which < len(held):
            shelf.give_back(held.pop(which)[0])
    for offset, _ in held:
        shelf.give_back(offset)
    assert shelf.take(8 * BLOCK) == 4096


@asynccontextmanager
async def shelved(blocks: int) -> AsyncIterator[tuple[End, End]]:
    """A sender and a receiver, with a shelf of so many blocks behind a ring of one."""
    out, back = mmap.mmap(-1, BLOCK * (blocks + 1)), mmap.mmap(-1, BLOCK)
    sender, receiver = End(out, back, shelf=BLOCK * blocks), End(back, out)
    await connect(sender, receiver)
    async with asyncio.timeout(60):
        yield sender, receiver
        sender.channel.close()
        await receiver.lost.wait()


async def test_large_payloads_stay_on_the_shelf_while_anybody_has_a_view_of_them() -> None:
    sent = [bytes([i]) * BLOCK for i in range(40)]
    async with shelved(3) as (sender, receiver):
        kept: list[Any] = []
        for i, payload in enumerate(sent):
            sender.channel.send(messages.UNARY, i, b"m", payload)
            sender.channel.send(messages.UNARY, i, b"", b"small")
            await receiver.wait_for(2)
            (_, number, meta, large), small = receiver.got
            receiver.got.clear()
            assert (number, meta, bytes(large), small[3]) == (i, b"m", payload, b"small")
            # Where the shelf is full payloads come through the ring, as bytes.
            assert isinstance(large, memoryview) == (i % 4 < 3)
            assert memoryview(large).readonly
            kept.append(np.frombuffer(large, np.uint8)[5:])
            del large
            if i % 4 == 3:
                for number, view in enumerate(kept, i - 3):
                    assert bytes(view) == sent[number][5:], "what is looked at was written to"
                kept.clear()
                del view
                receiver.channel.send(messages.PING, 0)  # which takes the news along
                await sender.wait_for(1)
                sender.got.clear()


async def test_what_lies_on_the_shelf_outlives_its_channel() -> None:
    async with shelved(2) as (sender, receiver):
        sender.channel.send(messages.UNARY, 1, b"", b"x" * 2 * BLOCK)
        payload: Any = (await receiver.wait_for(1))[0][3]
        receiver.got.clear()
    assert bytes(payload) == b"x" * 2 * BLOCK


async def test_a_view_may_end_in_any_thread() -> None:
    async with shelved(1) as (sender, receiver):
        for i in range(5):
            sender.channel.send(messages.UNARY, i, b"", bytes([i]) * BLOCK)
            held = [(await receiver.wait_for(1))[0][3]]
            receiver.got.clear()
            assert isinstance(held[0], memoryview)
            await asyncio.to_thread(held.clear)
            receiver.channel.send(messages.PING, 0)
            await sender.wait_for(1)
            sender.got.clear()


def test_every_field_of_a_call_and_a_reply_crosses() -> None:
    call = Call("http", 12.5, (("authorization", "Bearer ü"), ("x", "")), "client", False, 7)
    assert messages.call_from_bytes(messages.call_to_bytes("ModelInfer", call)) == ("ModelInfer", call)
    default = Call("grpc")
    for made in (call, default):
        _, back = messages.call_from_bytes(messages.call_to_bytes("R", made))
        assert dataclasses.asdict(back) == dataclasses.asdict(made)
    binary = Call("grpc", metadata=(("a-bin", b"\0"), ("b", "c")))
    assert messages.call_from_bytes(messages.call_to_bytes("R", binary))[1].metadata == (("b", "c"),)
    for reply in (
        Reply(grpc.StatusCode.OK, b"payload"),
        Reply(grpc.StatusCode.NOT_FOUND, b"", "it is not there", (("grpc-retry-pushback-ms", "5"),)),
        Reply(grpc.StatusCode.OK, b"p", "", (("t", ""),)),
    ):
        assert messages.reply_from_bytes(messages.reply_to_bytes(reply), reply.payload) == reply


def test_a_name_cannot_smuggle_fields() -> None:
    call = Call("grpc", identity="me\0authorization\0Bearer stolen")
    back = messages.call_from_bytes(messages.call_to_bytes("R", call))[1]
    assert back.metadata == ()
    reply = Reply(grpc.StatusCode.NOT_FOUND, message="'a\0b' is not found")
    assert messages.reply_from_bytes(messages.reply_to_bytes(reply), b"").trailers == ()


class Echo:
    """Answers a stream with each of its payloads, doubled; counts what it has taken; `hold` makes it wait."""

    def __init__(self) -> None:
        self.taken = 0
        self.cancelled = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def unary(self, rpc: str, payload: bytes, call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError("nothing sets it")

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        try:
            async for payload in payloads:
                self.taken += 1
                if self.hold is not None:
                    await self.hold.wait()
                yield Reply(grpc.StatusCode.OK, payload * 2)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if call.header("fail"):
            yield Reply(grpc.StatusCode.INTERNAL, message="as asked")


@asynccontextmanager
async def forwarded(kind: type[Echo] = Echo) -> AsyncIterator[tuple[Echo, Remote]]:
    echo, remote = kind(), Remote(Budget(2**30))
    session = Session(echo)
    one, other = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    front, core = End(one, other, remote.received), End(other, one, session.received)
    remote.attach(front.channel)
    session.attach(core.channel)
    await connect(front, core)
    async with asyncio.timeout(60):
        yield echo, remote
    front.channel.close()
    await core.lost.wait()
    session.lost()


async def numbers(count: int, stopped: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for i in range(count):
        yield i.to_bytes(2) * 400
    if stopped is not None:
        await stopped.wait()


async def test_a_stream_is_forwarded_message_by_message_to_its_end() -> None:
    async with forwarded() as (_, remote):
        call = Call("grpc", metadata=(("fail", "yes"),))
        replies = [r async for r in remote.stream("ModelStreamInfer", numbers(100), call)]
    assert [r.payload for r in replies[:-1]] == [i.to_bytes(2) * 800 for i in range(100)]
    assert (replies[-1].code, replies[-1].message) == (grpc.StatusCode.INTERNAL, "as asked")


async def test_a_slow_reader_stops_the_stream_behind_it() -> None:
    async with forwarded() as (echo, remote):
        replies = remote.stream("ModelStreamInfer", numbers(200), Call("grpc"))
        assert (await anext(replies)).payload == bytes(1600)
        for _ in range(200):
            await asyncio.sleep(0)
        # One window on its way out and one on its way back, and the one in hand.
        assert echo.taken <= 2 * messages.WINDOW + 2
        assert len([r async for r in replies]) == 199


async def test_a_cancelled_call_and_a_cancelled_stream_are_cancelled_in_the_core() -> None:
    async with forwarded() as (echo, remote):
        task = asyncio.ensure_future(remote.unary("ModelInfer", b"x" * 9000, Call("grpc")))
        await asyncio.sleep(0.05)
        task.cancel()
        await echo.cancelled.wait()
        echo.cancelled.clear()
        echo.hold = asyncio.Event()
        reading = asyncio.ensure_future(
            anext(remote.stream("ModelStreamInfer", numbers(3, asyncio.Event()), Call("grpc")))
        )
        while not echo.taken:
            await asyncio.sleep(0.01)
        reading.cancel()
        await echo.cancelled.wait()


class Broken(Echo):
    """Has a bug."""

    def over(self, rpc: str, call: Call) -> None:
        pass

    async def unary(self, rpc: str, payload: bytes, call: Call) -> Reply:
        raise ZeroDivisionError

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        async for payload in payloads:
            yield Reply(grpc.StatusCode.OK, payload)
            raise ZeroDivisionError


async def test_a_bug_in_the_core_ends_its_call(caplog: pytest.LogCaptureFixture) -> None:
    async with forwarded(Broken) as (_, remote):
        replies = [await remote.unary("ModelInfer", b"x", Call("grpc"))]
        replies += [reply async for reply in remote.stream("ModelStreamInfer", numbers(3), Call("grpc"))]
    assert [reply.code.name for reply in replies] == ["INTERNAL", "OK", "INTERNAL"]
    assert replies[0].message == replies[2].message == "internal error; the server's log has the details"
    assert caplog.text.count("a bug in the server") == 2


async def test_a_call_whose_front_end_is_lost_before_it_begins_is_counted_once() -> None:
    over = []

    class Counting(Echo):
        def over(self, rpc: str, call: Call) -> None:
            over.append(call.code)

    answers: Any = Counting()
    session = Session(answers)
    one, other = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    front, core = End(one, other), End(other, one)
    session.attach(core.channel)
    await connect(front, core)
    for number in range(3):
        session.received(messages.UNARY, number, messages.call_to_bytes("ModelInfer", Call("grpc")), b"x")
    session.received(messages.CANCEL, 0, b"", b"")
    session.lost()
    async with asyncio.timeout(60):
        while session._tasks:
            await asyncio.sleep(0)
        front.channel.close()
        await core.lost.wait()
    assert over == ["CANCELLED"] * 3


@pytest.mark.parametrize("ends", ["the core reads it", "the core is gone"])
async def test_a_withdrawn_call_counts_for_its_bytes_as_long_as_they_lie_here(ends: str) -> None:
    """Else who cancels large requests as fast as he sends them would have them pile up without a limit."""
    remote = Remote(Budget(10_000))
    out, into = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    front, other = End(out, into), End(into, out)
    await connect(front, other)
    remote.attach(front.channel)
    assert other.channel._transport is not None
    other.channel._transport.pause_reading()
    async with asyncio.timeout(60):
        remote.withdraw(remote.ask("R", b"x" * 6000, Call("grpc"), lambda reply: None))
        assert remote.budget.held == 6000
        with pytest.raises(OverBudget):
            remote.ask("R", b"x" * 6000, Call("grpc"), lambda reply: None)
        if ends == "the core reads it":
            other.channel._transport.resume_reading()
            got = await other.wait_for(3)
            assert [kind for kind, *_ in got] == [messages.UNARY, messages.CANCEL, messages.REFUSED]
            assert got[0][3] == b"x" * 6000
            assert not remote.budget.held
            front.channel.close()
            await other.lost.wait()
        else:
            other.channel.close()
            await front.lost.wait()
            assert not remote.budget.held


async def test_a_call_is_told_its_answer_once_or_withdrawn_and_counts_for_its_bytes_until_then() -> None:
    remote = Remote(Budget(100))
    out, into = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    front = End(out, into)
    other = End(into, out)
    await connect(front, other)
    remote.attach(front.channel)
    told: list[Reply] = []
    async with asyncio.timeout(60):
        first, second, third = (remote.ask("R", b"x" * 30, Call("grpc"), told.append) for _ in range(3))
        assert remote.budget.held == 90
        with pytest.raises(OverBudget):
            remote.ask("R", b"x" * 30, Call("grpc"), told.append)
        for _ in range(2):
            remote.received(messages.REPLY, first, messages.reply_to_bytes(Reply(grpc.StatusCode.OK)), b"answer")
            remote.withdraw(second)
        assert [reply.payload for reply in told] == [b"answer"]
        assert remote.budget.held == 30
        sent = [message[:2] for message in await other.wait_for(6)]
        assert sent[:3] == [(messages.UNARY, number) for number in (first, second, third)]
        assert sent[3:] == [(messages.REFUSED, 0), *[(messages.CANCEL, second)] * 2]  # the core knows which it has
        remote.lost()
        assert [reply.code for reply in told] == [grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE]
        assert remote.budget.held == 0
        front.channel.close()
        await other.lost.wait()
