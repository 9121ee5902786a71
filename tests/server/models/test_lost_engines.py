"""Engines that die, hang, or cannot be started: the model goes on, or says that it does not."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoynet.server.engines import patience, process
from convoynet.server.engines.place import Place
from convoynet.server.engines.process import EngineProcess
from convoynet.server.models import instance
from convoynet.server.repository import repository
from convoynet.server.supervision import processes
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


async def until(holds: Any) -> None:
    """Waits for a condition; the test's own time limit is the only one."""
    while not holds():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 3])
async def test_whatever_signal_ends_an_engine_another_takes_its_place(
    serving: Serving, tmp_path: Path, number: int
) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        (one,) = running.app.core.model("sum")._instances
        os.kill(one.engine.pid, number)
        await until(lambda: running.metric("convoy_engine_restarts_total", model="sum", version="1") == 1)
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]


async def test_lost_batches_leave_no_buffers_to_the_collector(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.3)
    async with serving() as running:
        model = running.app.core.model("sum")
        (one,) = model._instances
        gc.collect()
        gc.disable()
        try:
            for count in range(1, 4):
                asked = [asyncio.ensure_future(code_of(running.stub.ModelInfer(infer_request(i)))) for i in range(3)]
                await until(lambda: one._running)
                os.kill(one.engine.pid, signal.SIGKILL)
                assert UNAVAILABLE in {code for code, _ in await asyncio.gather(*asked)}
                await until(
                    lambda c=count: running.metric("convoy_engine_restarts_total", model="sum", version="1") == c
                )
            await code_of(running.stub.ModelInfer(infer_request(1)))
            held = [path for path in Path("/proc/self/fd").iterdir() if _is_input(path)]
        finally:
            gc.enable()
    # Of the living engine: the file and its mapping of each of its places.
    assert len(held) <= 2 * len(one.engine._places)


def _is_input(descriptor: Path) -> bool:
    try:
        return "convoy inputs" in str(descriptor.readlink())
    except OSError:
        return False


@pytest.mark.parametrize("error", [OSError(12, "no memory"), MemoryError(), ValueError("odd"), TypeError("rank")])
async def test_a_batch_that_cannot_be_run_fails_alone(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        with monkeypatch.context() as broken:
            broken.setattr(Place, "plan", _raising(error))
            code, text = await code_of(running.stub.ModelInfer(infer_request(1)))
        assert code is grpc.StatusCode.INTERNAL
        assert text == f"model 'sum' failed to run the batch ({type(error).__name__})"
        assert sums(await running.stub.ModelInfer(infer_request(2))) == [2]
        assert running.metric("convoy_engine_restarts_total", model="sum", version="1") == 0


async def test_the_first_batch_of_an_engine_needs_no_descriptor(tmp_path: Path) -> None:
    fake_model(tmp_path)
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.spec is not None
    engine = await EngineProcess.start(found.spec)
    with all_descriptors_taken():
        ran = await engine.run([{"x": np.ones((3, 4), np.float32)}])
    assert ran.answers[0]["y"].ravel().tolist() == [4.0] * 3
    await engine.close()


@contextmanager
def all_descriptors_taken() -> Iterator[None]:
    usual, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, usual[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


async def test_an_engine_that_does_not_start_again_shows_until_it_does(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path, seconds=0.2, config="max_batch_size: 1\n")
    async with serving() as running:
        model = running.app.core.model("sum")
        (one,) = model._instances
        with running.held():
            waiting = [asyncio.ensure_future(code_of(running.stub.ModelInfer(infer_request(i)))) for i in range(5)]
            await until(lambda: model.queued >= 3)
        with monkeypatch.context() as broken:
            broken.setattr(EngineProcess, "_spawn", _raising(OSError(24, "Too many open files")))
            os.kill(one.engine.pid, signal.SIGKILL)
            ended = await asyncio.gather(*waiting)
            assert {code for code, _ in ended} <= {UNAVAILABLE, grpc.StatusCode.OK}
            assert any("does not start again: OSError: [Errno 24] Too many open files" in text for _, text in ended)
            assert model.state == "failed"
            assert not running.app.core.ready
            assert running.metric("convoy_engine_rows", model="sum", version="1") == 0
            (line,) = await running.app.core.index()
            assert (line.state, "Too many open files" in line.reason) == ("UNAVAILABLE", True)
            code, _ = await code_of(running.stub.ModelInfer(infer_request(1)))
            assert code is UNAVAILABLE
        await until(lambda: model.state == "ready")
        assert running.app.core.ready
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]


async def test_a_model_whose_engine_takes_long_to_start_again_says_so(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_DOWN_SECONDS", 0.05)
    fake_model(tmp_path)
    async with serving() as running:
        model = running.app.core.model("sum")
        (one,) = model._instances
        os.kill(one.engine.pid, signal.SIGKILL)
        await until(lambda: model.state == "failed")
        assert "has not started again yet" in model.reason
        await until(lambda: model.state == "ready")


async def test_an_engine_that_is_stopped_while_it_starts_again_keeps_its_model_down_no_longer(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.5)
    fake_model(tmp_path)
    spawn, started = processes.spawn, []

    def stands_still(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(spawn(*arguments, **options))
        if len(started) == 1:
            started[0].send_signal(signal.SIGSTOP)
        return started[-1]

    async with serving() as running:
        (one,) = running.app.core.model("sum")._instances
        monkeypatch.setattr(processes, "spawn", stands_still)
        os.kill(one.engine.pid, signal.SIGKILL)
        await until(lambda: running.metric("convoy_engine_restarts_total", model="sum", version="1") == 1)
        assert one.engine.pid == started[1].pid
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]


async def test_a_hung_engine_costs_its_batch_and_nobody_elses(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(patience, "_LEAST_SECONDS", 1.0)
    fake_model(tmp_path, "hung")
    fake_model(tmp_path, "good")
    async with serving() as running:
        await running.stub.ModelInfer(infer_request(1, model="hung"))
        (one,) = running.app.core.model("hung")._instances
        os.kill(one.engine.pid, signal.SIGSTOP)
        lost = asyncio.ensure_future(code_of(running.stub.ModelInfer(infer_request(1, model="hung"))))
        assert sums(await running.stub.ModelInfer(infer_request(2, model="good"))) == [2]
        assert await lost == (UNAVAILABLE, "engine of model 'hung' was lost while it ran the batch; try again")
        assert sums(await running.stub.ModelInfer(infer_request(3, model="hung"))) == [3]
        assert running.metric("convoy_engine_hangs_total", model="hung", version="1") == 1
        assert running.metric("convoy_engine_restarts_total", model="good", version="1") == 0


async def test_a_server_whose_load_hangs_stops_at_once(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, "good")
    fake_model(tmp_path, "hung", seconds=100000)
    async with serving(start_patience_seconds=0) as running:
        assert running.app.core.ready
        assert running.app.core.loading == ["hung"]
        assert sums(await running.stub.ModelInfer(infer_request(2, model="good"))) == [2]
        async with asyncio.timeout(60):
            await running.app.stop()


def _raising(error: Exception) -> Any:
    def call(*args: object, **kwargs: Mapping[str, object]) -> None:
        raise error

    return call
