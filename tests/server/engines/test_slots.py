"""Several batches in flight in one engine process: own answers, cancellations, and its death."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoynet.server.app import App
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import EngineLost
from convoynet.server.models.model import Model
from convoynet.server.spec import ModelSpec
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums
from tests.server.engine_setup import spec_of

SLOTS = 3


def several(spec: ModelSpec) -> ModelSpec:
    return replace(spec, engine=replace(spec.engine, slots=SLOTS))


async def test_each_caller_gets_its_own_answer_whoever_goes_away(tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.001)
    process = await EngineProcess.start(several(spec_of(tmp_path, "fake")))
    chance = random.Random(2)

    async def client(number: int) -> bool:
        rows = np.full((1 + number % 4, 4), number, np.float32)
        task = asyncio.ensure_future(process.run([{"x": rows}, {"x": rows[:1] + 1}]))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        if number % 3 == 0:
            task.cancel()
        try:
            first, second = (await task).answers
        except asyncio.CancelledError:
            return False
        assert first["y"].ravel().tolist() == [4.0 * number] * len(rows)
        assert second["y"].ravel().tolist() == [4.0 * number + 4]
        return True

    answered = await asyncio.gather(*(client(number) for number in range(120)))
    assert answered.count(False) > 10
    assert answered.count(True) >= 80
    assert len(process._free) == SLOTS
    await process.close()


async def test_its_death_fails_all_that_runs(tmp_path: Path) -> None:
    fake_model(tmp_path)
    process = await EngineProcess.start(several(spec_of(tmp_path, "fake")))
    os.kill(process.pid, signal.SIGSTOP)  # or it might be done before it is killed
    batches = [asyncio.ensure_future(process.run([{"x": np.ones((1, 4), np.float32)}])) for _ in range(SLOTS + 1)]
    while not all(place.answer for place in process._places):
        await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    for batch in batches:
        with pytest.raises(EngineLost):
            await batch
    assert await process.lost == "killed by SIGKILL"
    await process.close()


async def test_a_server_loses_only_the_batches_that_ran(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(App, "_make", lambda self, spec: Model(several(spec), self._shared))
    fake_model(tmp_path, config="max_batch_size: 2\n", seconds=0.05)
    async with serving() as running:
        (instance,) = running.app.core.model("sum")._instances
        calls = [asyncio.ensure_future(code_of(running.stub.ModelInfer(infer_request(i)))) for i in range(20)]
        while len(instance._running) < SLOTS or not all(place.answer for place in instance.engine._places):
            await asyncio.sleep(0.001)
        assert running.app.core.model("sum")._scheduler.running.instances == SLOTS
        os.kill(instance.engine.pid, signal.SIGKILL)
        codes = [code for code, _ in await asyncio.gather(*calls)]
        assert codes.count(grpc.StatusCode.UNAVAILABLE) in range(1, 2 * SLOTS + 1)
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert running.metric("convoy_engine_restarts_total", model="sum", version="1") == 1
        many = await asyncio.gather(*(running.stub.ModelInfer(infer_request(i, i + 1)) for i in range(12)))
        assert [sums(one) for one in many] == [[i, i + 1] for i in range(12)]
        assert not instance._running
