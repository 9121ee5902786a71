"""Whole servers with front ends in processes of their own."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.server import config as server_config
from convoynet.server.app import App
from convoynet.server.config import ServeConfig
from convoynet.server.frontend import grpcio_server
from convoynet.server.frontend import processes as front_processes
from convoynet.server.frontend.channel import RING_BYTES
from convoynet.server.frontend.processes import FrontEndProcesses
from convoynet.server.host import package_environment
from convoynet.server.supervision import ending
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request, sums
from tests.server.test_serve import Served

HEALTH = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            return await ask(channel)

    return await asyncio.gather(*(one() for _ in range(count)))


INFER = "/inference.GRPCInferenceService/ModelInfer"


def infer(channel: aio.Channel) -> Callable[..., Any]:
    from convoynet.protos.inference import grpc_service_pb2_grpc

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
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")

    def rejected(reason: str) -> float:
        value: float = running.metric("convoy_rejected_total", model="sum", version="1", reason=reason)
        return value

    async with processes() as (running, _):
        with running.held():
            late = await running.late(lambda seconds: running.stub.ModelInfer(infer_request(2), timeout=seconds))
            assert late is grpc.StatusCode.DEADLINE_EXCEEDED
            await running.until(lambda model: model.inflight == 0)
            first = asyncio.ensure_future(running.stub.ModelInfer(infer_request(1)))
            await running.until(lambda model: model.inflight == 1)
            gone = running.stub.ModelInfer(infer_request(3))
            await running.until(lambda model: model.inflight == 2)
            gone.cancel()
            await running.until(lambda model: model.inflight == 1)
        assert sums(await first) == [1]
        assert (rejected("deadline"), rejected("cancelled")) == (1, 1)


async def test_a_front_end_that_is_killed_is_replaced(processes: Any, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 8\ndynamic_batching { }\n")

    async def ask(channel: aio.Channel) -> grpc.StatusCode:
        return (await code_of(infer(channel)(infer_request(1))))[0]

    async with processes() as (running, front):
        port, victim = running.app.grpc_port, front.pids[0]
        with running.held():
            asked = asyncio.ensure_future(through_new_connections(port, 24, ask))
            while running.metric("convoy_inflight_requests", model="sum", version="1") < 24:
                await asyncio.sleep(0.01)
            os.kill(victim, signal.SIGKILL)
            await running.until(lambda model: model.inflight < 24)
        codes = await asked
        # Whoever was at the other front end has its answer; with 24 connections both had some, but for 1 in 8 million.
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
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    config = ServeConfig(
        (str(tmp_path),),
        threads=1,
        grpc_port=0,
        http_port=-1,
        metrics_port=0,
        frontends="2",
        drain_seconds=0.5,
        drain_timeout_seconds=3600.0,
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

    async with aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
        with Running(app, None, channel).held():
            watching = asyncio.ensure_future(through_new_connections(app.grpc_port, 6, watch))
            asked = asyncio.ensure_future(through_new_connections(app.grpc_port, 6, ask))
            while len(watched) < 6 or sum(m.inflight for m in app.core) < 6:
                await asyncio.sleep(0.01)
            stopped = asyncio.ensure_future(app.stop())
            await watching
        assert await stopped
    assert await asked == [[7.0]] * 6
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
    children = [pid for pid in below if b"convoynet.server.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(children) == 2
    watches = [os.pidfd_open(child) for child in children]
    core.kill()
    served.rest()
    for watch in watches:
        assert select.select([watch], [], [], 60)[0], "a front end outlived its core by a minute"
        os.close(watch)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (200, 16)])
def test_auto_leaves_most_cores_to_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    monkeypatch.setattr(server_config, "available_cpus", lambda: cores)
    assert ServeConfig((str(tmp_path),), threads=1).frontend_count == expected
    assert ServeConfig((str(tmp_path),), threads=1, frontends="3").frontend_count == 3


async def _answers(running: Running) -> None:
    """Waits until eight new connections are answered, whichever front end they get."""
    while True:
        codes = await through_new_connections(
            running.app.grpc_port, 8, lambda channel: code_of(infer(channel)(infer_request(1), timeout=60))
        )
        if all(code is grpc.StatusCode.OK for code, _ in codes):
            return


async def test_a_front_end_that_stands_still_is_replaced(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_processes, "_TICK_SECONDS", 0.05)
    fake_model(tmp_path)
    async with processes() as (running, front):
        stopped = front.pids[0]
        os.kill(stopped, signal.SIGSTOP)
        while stopped in front.pids or front.up < 2:
            await asyncio.sleep(0.02)
        await _answers(running)


async def test_a_front_end_that_stands_still_before_it_listens_is_replaced(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_processes, "_TICK_SECONDS", 0.05)
    fake_model(tmp_path)
    spawn, stopped = front_processes.processes.spawn, []

    def stands_still(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = spawn(*arguments, **options)
        if not stopped:
            stopped.append(process.pid)
            process.send_signal(signal.SIGSTOP)
        return process

    async with processes() as (running, front):
        monkeypatch.setattr(front_processes.processes, "spawn", stands_still)
        os.kill(front.pids[0], signal.SIGKILL)
        while not stopped or stopped[0] in front.pids or front.up < 2:
            await asyncio.sleep(0.02)
        await _answers(running)


async def test_a_front_end_that_dies_just_before_the_server_stops_is_waited_for(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path)
    end, dead = ending.end, asyncio.Event()

    async def slow(process: subprocess.Popen[bytes], patience: float = 0.0) -> int | None:
        if not dead.is_set():
            dead.set()
            await asyncio.Event().wait()
        return await end(process, patience)

    monkeypatch.setattr(ending, "end", slow)
    async with processes() as (_, front):
        victim = front._children[0].process
        victim.kill()
        await dead.wait()
    assert victim.returncode == -signal.SIGKILL
    assert front.pids == []


SERVER_THAT_ENDS = """
import asyncio, runpy, sys
from convoynet.server.frontend import local
async def ended(self):
    await asyncio.sleep(0.2)
local.LocalFrontEnd.ended = ended
runpy.run_module("convoynet.server.frontend", run_name="__main__", alter_sys=True)
"""


async def test_a_front_end_whose_server_ends_by_itself_ends_and_is_replaced(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path)
    spawn, first = front_processes.processes.spawn, []

    def ends(module: str, *arguments: str, descriptors: Any = (), **options: Any) -> subprocess.Popen[bytes]:
        if first:
            return spawn(module, *arguments, descriptors=descriptors, **options)
        command = [sys.executable, "-c", SERVER_THAT_ENDS, *arguments]
        first.append(subprocess.Popen(command, pass_fds=tuple(descriptors), env=package_environment()))
        return first[0]

    async with processes() as (running, front):
        monkeypatch.setattr(front_processes.processes, "spawn", ends)
        os.kill(front.pids[0], signal.SIGKILL)
        while not first or first[0].pid in front.pids or front.up < 2:
            await asyncio.sleep(0.02)
        assert first[0].returncode == 1
        await _answers(running)


def _lost_task(running: Running) -> None:
    """The task that grpcio waits in is cancelled, by nobody's wish: nothing is logged or raised."""
    (task,) = [t for t in asyncio.all_tasks() if "_server_main_loop" in getattr(t.get_coro(), "__qualname__", "")]
    task.cancel()


def _failing_call(running: Running) -> None:
    """What waits for the calls of every method cannot be told of another."""

    async def fails(self: object, method: bytes) -> None:
        raise MemoryError

    front: Any = running.app._listeners._grpc[0]
    type(front._server._server)._request_registered_call = fails


@pytest.mark.parametrize("fault", [_lost_task, _failing_call])
async def test_a_server_in_the_core_that_ends_by_itself_shows_and_is_started_again(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Running], None]
) -> None:
    fake_model(tmp_path)
    monkeypatch.setattr(grpcio_server._Calls, "_request_registered_call", cygrpc.AioServer._request_registered_call)
    async with serving(grpc_stack="grpcio", frontends="1") as running:
        front: Any = running.app._listeners._grpc[0]
        await running.stub.ModelInfer(infer_request(1))
        with monkeypatch.context() as broken:
            broken.setattr(front, "_listen", _no_port)
            fault(running)
            while front.up:
                with suppress(aio.AioRpcError):  # has what waits for calls look again
                    await running.stub.ModelInfer(infer_request(1), timeout=5)
            assert running.metric("convoy_frontends") == 0
            assert not running.app.core.ready
            grpcio_server._Calls._request_registered_call = cygrpc.AioServer._request_registered_call  # type: ignore[method-assign]
        while not front.up:
            await asyncio.sleep(0.01)
        assert running.metric("convoy_frontends") == 1
        assert running.app.core.ready
        await _answers(running)
        status = await through_new_connections(
            running.app.grpc_port, 1, lambda channel: health_pb2_grpc.HealthStub(channel).Check(HEALTH)
        )
        assert status[0].status == SERVING


async def _no_port(host: str, port: int) -> int:
    raise OSError("no port")


async def test_a_front_end_that_cannot_be_started_is_tried_again_and_counted(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path)
    async with processes() as (running, front):
        with monkeypatch.context() as broken:

            def no_descriptor(_: int) -> int:
                raise OSError(24, "Too many open files")

            broken.setattr(front_processes, "shared_memory", no_descriptor)
            descriptors = len(list(Path("/proc/self/fd").iterdir()))
            for pid in front.pids:
                os.kill(pid, signal.SIGKILL)
            while front.pids:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert running.metric("convoy_frontends") == 0
            assert not running.app.core.ready
            assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
        while front.up < 2:
            await asyncio.sleep(0.02)
        assert running.metric("convoy_frontends") == 2
        assert running.app.core.ready
        await _answers(running)
