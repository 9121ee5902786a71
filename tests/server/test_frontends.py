"""Front ends in processes of their own: the channel to the core, and whole servers over it."""

from __future__ import annotations

import asyncio
import dataclasses
import mmap
import os
import select
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from server import config as server_config
from server.app import App
from server.config import ServeConfig
from server.dispatch import Reply
from server.frontend import messages
from server.frontend.channel import RING_BYTES, Channel, Ring
from server.frontend.processes import FrontEndProcesses
from server.frontend.remote import Remote
from server.frontend.session import Session
from server.types import Call
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request, sums
from tests.server.test_serve import Served

Message = tuple[int, int, bytes, bytes]
HEALTH = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class End:
    """One end of a channel and what came in by it."""

    def __init__(self, out: mmap.mmap, into: mmap.mmap, received: Callable[..., None] | None = None) -> None:
        self.got: list[Message] = []
        self.lost = asyncio.Event()
        self.changed = asyncio.Event()
        self.channel = Channel(out, into, received or self._take, self.lost.set)

    def _take(self, *message: Any) -> None:
        self.got.append(message)
        self.changed.set()

    async def wait_for(self, count: int) -> list[Message]:
        while len(self.got) < count:
            self.changed.clear()
            await self.changed.wait()
        return self.got


async def connect(*ends: End) -> None:
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
        async with asyncio.timeout(20):
            assert await right.wait_for(len(sent)) == sent
            assert await left.wait_for(len(sent)) == sent


async def test_a_channel_tells_that_the_other_end_is_gone_and_takes_no_more() -> None:
    async with channels(4096) as (left, right):
        right.channel.close()
        async with asyncio.timeout(5):
            await left.lost.wait()
        left.channel.send(messages.MESSAGE, 1, b"", b"late")


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(16, 256))
@settings(deadline=None)
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
async def forwarded() -> AsyncIterator[tuple[Echo, Remote]]:
    echo, remote = Echo(), Remote()
    session = Session(echo)
    one, other = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    front, core = End(one, other, remote.received), End(other, one, session.received)
    remote.attach(front.channel)
    session.attach(core.channel)
    await connect(front, core)
    async with asyncio.timeout(20):
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


@pytest.fixture
def processes(serving: Serving) -> Callable[..., Any]:
    """`serving` with two front ends, and the check that they leave nothing behind."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[tuple[Running, FrontEndProcesses]]:
        async with serving(frontends="2", **settings) as running:
            front = running.app._listeners._grpc[0]
            assert isinstance(front, FrontEndProcesses)
            pids = front.pids
            assert len(pids) == 2
            assert "convoy-frontend" in Path("/proc/self/maps").read_text()
            yield running, front
            pids += front.pids
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert "convoy-frontend" not in Path("/proc/self/maps").read_text()

    return run


async def through_new_connections(port: int, count: int, ask: Callable[[aio.Channel], Any]) -> list[Any]:
    """What `ask` gives over `count` connections, so that the kernel spreads them over the front ends."""

    async def one() -> Any:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            return await ask(channel)

    return await asyncio.gather(*(one() for _ in range(count)))


INFER = "/inference.GRPCInferenceService/ModelInfer"


def infer(channel: aio.Channel) -> Callable[..., Any]:
    from protos.inference import grpc_service_pb2_grpc

    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer  # type: ignore[no-any-return]


async def test_two_front_ends_answer_what_one_does(serving: Serving, processes: Any, tmp_path: Path) -> None:
    fake_model(tmp_path)

    async def ask(channel: aio.Channel) -> list[Any]:
        rows = [[i, i + 1, 2 * i][: i % 3 + 1] for i in range(40)]
        answers = await asyncio.gather(*(infer(channel)(infer_request(*r)) for r in rows))
        assert [sums(a) for a in answers] == rows
        bad = await code_of(infer(channel)(infer_request(1, model="absent")))
        # More than a ring holds.
        raw = await code_of(channel.unary_unary(INFER)(b"\xff" * (RING_BYTES + 1)))
        health = await health_pb2_grpc.HealthStub(channel).Check(HEALTH)
        return [[a.SerializeToString() for a in answers], bad, raw, health.status]

    async with serving() as running:
        one = await ask(running.channel)
    async with processes() as (running, _):
        for two in await through_new_connections(running.app.grpc_port, 6, ask):
            assert two == one
        assert one[-1] == SERVING
        assert running.metric("convoy_inferences_total", model="sum", version="1") == 6 * sum(
            i % 3 + 1 for i in range(40)
        )


async def test_deadlines_and_cancellation_reach_the_core(processes: Any, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.5, config="max_batch_size: 1\ndynamic_batching { }\n")

    def rejected(reason: str) -> float:
        value: float = running.metric("convoy_rejected_total", model="sum", version="1", reason=reason)
        return value

    async with processes() as (running, _):
        first = asyncio.ensure_future(running.stub.ModelInfer(infer_request(1)))
        late = running.stub.ModelInfer(infer_request(2), timeout=0.2)
        gone = running.stub.ModelInfer(infer_request(3))
        while running.metric("convoy_inflight_requests", model="sum", version="1") < 3:
            await asyncio.sleep(0.01)
        gone.cancel()
        assert (await code_of(late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert sums(await first) == [1]
        while running.metric("convoy_inflight_requests", model="sum", version="1"):
            await asyncio.sleep(0.01)
        assert (rejected("deadline"), rejected("cancelled")) == (1, 1)


async def test_a_front_end_that_is_killed_is_replaced(processes: Any, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.5, config="max_batch_size: 8\ndynamic_batching { }\n")

    async def ask(channel: aio.Channel) -> grpc.StatusCode:
        return (await code_of(infer(channel)(infer_request(1))))[0]

    async with processes() as (running, front):
        port, victim = running.app.grpc_port, front.pids[0]
        asked = asyncio.ensure_future(through_new_connections(port, 16, ask))
        while running.metric("convoy_inflight_requests", model="sum", version="1") < 16:
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        codes = await asked
        # Whoever was at the other front end has its answer; with 16 connections both had some, but for 1 in 30,000.
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        while len(front.pids) < 2 or victim in front.pids:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(child.ready for child in front._children))
        assert set(await through_new_connections(port, 12, ask)) == {grpc.StatusCode.OK}
        check = [
            h.status
            for h in await through_new_connections(port, 6, lambda c: health_pb2_grpc.HealthStub(c).Check(HEALTH))
        ]
        assert check == [SERVING] * 6


async def test_a_drain_answers_what_was_accepted_and_says_so_everywhere(tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.3, config="max_batch_size: 1\ndynamic_batching { }\n")
    config = ServeConfig(
        (str(tmp_path),), threads=1, grpc_port=0, http_port=-1, metrics_port=0, frontends="2", drain_seconds=0.5
    )
    app = App(config)
    await app.start()
    watched: list[int] = []

    async def watch(channel: aio.Channel) -> None:
        async for change in health_pb2_grpc.HealthStub(channel).Watch(HEALTH):
            watched.append(change.status)
            if change.status == NOT_SERVING:
                return

    async def ask(channel: aio.Channel) -> list[float]:
        return sums(await infer(channel)(infer_request(7)))

    watching = asyncio.ensure_future(through_new_connections(app.grpc_port, 6, watch))
    asked = asyncio.ensure_future(through_new_connections(app.grpc_port, 6, ask))
    while len(watched) < 6 or sum(m.inflight for m in app.core) < 6:
        await asyncio.sleep(0.01)
    assert await app.stop()
    assert await asked == [[7.0]] * 6
    await watching
    assert watched == [SERVING] * 6 + [NOT_SERVING] * 6


async def test_a_taken_port_is_said_before_anything_starts(processes: Any, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with processes() as (running, _):
        port = running.app.grpc_port
        for frontends in ("1", "2"):
            config = ServeConfig(
                (str(tmp_path),), threads=1, grpc_port=port, http_port=-1, metrics_port=0, frontends=frontends
            )
            second = App(config)
            with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port} for gRPC: is the port taken\?"):
                await second.start()
            await second.stop()


def test_front_ends_go_with_a_core_that_is_killed(tmp_path: Path) -> None:
    fake_model(tmp_path)
    served = Served(tmp_path, "--frontends", "2")
    core = served.process
    below = [int(p) for t in Path(f"/proc/{core.pid}/task").iterdir() for p in (t / "children").read_text().split()]
    children = [pid for pid in below if b"server.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(children) == 2
    watches = [os.pidfd_open(child) for child in children]
    core.kill()
    served.rest()
    for watch in watches:
        assert select.select([watch], [], [], 20)[0], "a front end outlived its core by 20 s"
        os.close(watch)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (200, 16)])
def test_auto_leaves_most_cores_to_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    monkeypatch.setattr(server_config, "available_cpus", lambda: cores)
    assert ServeConfig((str(tmp_path),), threads=1).frontend_count == expected
    assert ServeConfig((str(tmp_path),), threads=1, frontends="3").frontend_count == 3
