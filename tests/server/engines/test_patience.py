"""How long an engine may take: for a batch, as measured, for loading, and when it says nothing at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoynet.server.engines import process as process_module
from convoynet.server.engines.patience import Patience
from convoynet.server.engines.place import Place
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import EngineLost, InvalidModel
from convoynet.server.repository import repository
from convoynet.server.spec import Limits, ModelSpec
from convoynet.server.supervision import processes
from tests.server.conftest import fake_model


def test_a_size_that_was_never_measured_has_all_of_the_time() -> None:
    patience = Patience(Limits(run_s=60))
    assert patience.of(1000) == 60
    patience.took(1000, 0.001)
    assert patience.of(1000) == 5
    assert patience.of(10) == 5  # a smaller batch takes no longer
    assert patience.of(100_000) == 60


def test_far_longer_than_measured_is_twenty_times_and_never_beyond_the_limit() -> None:
    patience = Patience(Limits(run_s=60))
    patience.took(1000, 0.5)
    assert patience.of(1000) == 10
    patience.took(1000, 30)
    assert patience.of(1000) == 60
    for _ in range(2000):
        patience.took(1000, 0.5)
    assert patience.of(1000) == pytest.approx(10)


def test_a_machine_that_stood_still_makes_nobody_patient() -> None:
    patience = Patience(Limits(run_s=60))
    for seconds in (*[0.05] * 20, 2.0, 2.0, 0.05):
        patience.took(1000, seconds)
    assert patience.of(1000) == 5
    for _ in range(5):  # slow ones that keep coming are what it takes
        patience.took(1000, 2.0)
    assert patience.of(1000) == 40


def test_a_limit_that_the_config_states_is_the_only_one() -> None:
    patience = Patience(Limits(run_s=300, measured=False))
    patience.took(1000, 0.001)
    assert patience.of(1000) == 300


def test_a_second_load_may_not_take_for_ever_where_the_first_was_short() -> None:
    patience = Patience(Limits(load_s=1800))
    patience.loaded(1)
    assert patience.load_s == 30
    patience = Patience(Limits(load_s=1800))
    patience.loaded(60)
    assert patience.load_s == 1200


def spec_of(root: Path, limits: Limits, **engine: float) -> ModelSpec:
    fake_model(root, **engine)
    (found,) = repository.scan(root, repository.Defaults(4, 1, limits=limits))
    assert found.spec is not None, found.reason
    return found.spec


ROW = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def _quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "TICK_SECONDS", 0.05)


@pytest.mark.usefixtures("_quick_ticks")
async def test_an_engine_that_hangs_in_a_batch_is_ended(tmp_path: Path) -> None:
    engine = await EngineProcess.start(spec_of(tmp_path, Limits(run_s=0.3)))
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost):
        await engine.run([ROW])
    assert "a batch took longer than 0.3 s" in await engine.lost
    assert engine.hung
    await engine.close()


@pytest.mark.usefixtures("_quick_ticks")
async def test_an_engine_that_says_nothing_while_it_has_no_work_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, pinged = asyncio.Semaphore(0), EngineProcess._pinged

    def counted(self: EngineProcess, place: Place) -> None:
        pinged(self, place)
        answers.release()

    monkeypatch.setattr(EngineProcess, "_pinged", counted)
    monkeypatch.setattr(process_module, "_PING_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(process_module, "PING_SECONDS", 3600.0)  # busy machines let it answer late
    engine = await EngineProcess.start(spec_of(tmp_path, Limits()))
    for _ in range(3):  # it is asked, and answers
        await answers.acquire()
    assert not engine.lost.done()
    os.kill(engine.pid, signal.SIGSTOP)
    monkeypatch.setattr(process_module, "PING_SECONDS", 0.3)
    for place in engine._places:
        place.limit = 0.3  # where it is being asked
    assert "a word took longer" in await engine.lost
    await engine.close()


@pytest.mark.usefixtures("_quick_ticks")
async def test_a_warm_up_that_never_ends_fails_the_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"loading and warming up took longer than 0\.5 s"):
        await EngineProcess.start(spec_of(tmp_path, Limits(load_s=0.5), seconds=1000))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Has the next engine processes stopped before they load; gives the list of all that are started then."""
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.5)
    spawn, pids = processes.spawn, []

    def stop(count: int) -> list[int]:
        def stopped(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
            process = spawn(*arguments, **options)
            pids.append(process.pid)
            if len(pids) <= count:
                process.send_signal(signal.SIGSTOP)
            return process

        monkeypatch.setattr(processes, "spawn", stopped)
        return pids

    return stop


@pytest.mark.usefixtures("_quick_ticks")
async def test_an_engine_that_is_stopped_while_it_loads_is_replaced(
    tmp_path: Path, stopping: Callable[[int], list[int]]
) -> None:
    pids = stopping(1)
    engine = await EngineProcess.start(spec_of(tmp_path, Limits()))
    assert engine.pid == pids[1]
    assert len((await engine.run([ROW])).answers) == 1
    await engine.close()
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.usefixtures("_quick_ticks")
async def test_one_that_is_stopped_again_and_again_fails_the_load(
    tmp_path: Path, stopping: Callable[[int], list[int]]
) -> None:
    pids = stopping(1000)
    with pytest.raises(InvalidModel, match=r"it was ended, since a signal has stopped it for 0\.5 s$"):
        await EngineProcess.start(spec_of(tmp_path, Limits()))
    assert len(pids) == 2


@pytest.mark.usefixtures("_quick_ticks")
async def test_one_that_waits_without_a_word_or_any_work_is_not_taken_for_stopped(
    tmp_path: Path, stopping: Callable[[int], list[int]]
) -> None:
    """As for a GPU, or a slow disk: the engine sleeps in its warm-up."""
    pids = stopping(0)
    engine = await EngineProcess.start(spec_of(tmp_path, Limits(), seconds=1.5))
    assert pids == [engine.pid]
    await engine.close()


@pytest.mark.usefixtures("_quick_ticks")
async def test_an_engine_that_goes_on_in_time_is_kept(tmp_path: Path, stopping: Callable[[int], list[int]]) -> None:
    pids = stopping(1)
    starting = asyncio.ensure_future(EngineProcess.start(spec_of(tmp_path, Limits())))
    for _ in range(3):  # stopped for longer in all than it may be at a time
        await asyncio.sleep(0.25)
        os.kill(pids[0], signal.SIGCONT)
        await asyncio.sleep(0.1)
        if not starting.done():
            os.kill(pids[0], signal.SIGSTOP)
    os.kill(pids[0], signal.SIGCONT)
    engine = await starting
    assert pids == [engine.pid]
    await engine.close()


@pytest.mark.usefixtures("_quick_ticks")
async def test_an_engine_that_is_stopped_in_a_batch_of_unknown_length_is_ended_sooner_than_that_may_be(
    tmp_path: Path, stopping: Callable[[int], list[int]]
) -> None:
    stopping(0)
    engine = await EngineProcess.start(spec_of(tmp_path, Limits(run_s=3600)))
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost):
        await engine.run([ROW])
    assert engine.hung
    assert "a signal has stopped it" in await engine.lost
    await engine.close()


async def test_a_load_that_is_given_up_ends_its_process_at_once(tmp_path: Path) -> None:
    starting = asyncio.ensure_future(EngineProcess.start(spec_of(tmp_path, Limits(), seconds=1000)))
    await asyncio.sleep(0.1)
    starting.cancel()
    async with asyncio.timeout(60):
        with pytest.raises(asyncio.CancelledError):
            await starting


def test_a_model_states_its_own_limit(tmp_path: Path) -> None:
    parameter = 'parameters {{ key: "engine_timeout_seconds" value {{ string_value: "{}" }} }}'
    config = "max_batch_size: 8\n"
    fake_model(tmp_path, "own", config=config + parameter.format("300"))
    fake_model(tmp_path, "plain")
    fake_model(tmp_path, "wrong", config=config + parameter.format("soon"))
    found = {f.name: f for f in repository.scan(tmp_path, repository.Defaults(4, 1, limits=Limits(run_s=7)))}
    own, plain = found["own"].spec, found["plain"].spec
    assert own is not None
    assert plain is not None
    assert own.limits == replace(Limits(run_s=300), measured=False)
    assert plain.limits == Limits(run_s=7)
    assert found["wrong"].reason == "parameter 'engine_timeout_seconds' must be seconds in 1 to 86400, got 'soon'"
