"""How models come and go: nothing is lost on the way, nothing is seen half, and failures change nothing."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.server.errors import Draining, LoadFailed, LoadNotAllowed, ModelNotReady, UnknownModel
from tests.server.conftest import Serving, fake_model, infer_request, sums
from tests.server.repositories import Stage, until, write_ensemble, write_plain


async def test_a_start_loads_everything_or_what_is_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_plain(tmp_path, name)
    for control, names, loaded in (("none", (), 2), ("poll", (), 2), ("explicit", ("b",), 1), ("explicit", ("*",), 2)):
        stage = Stage(tmp_path, control)  # type: ignore[arg-type]
        assert not stage.core.ready
        await stage.core.start(names)
        assert stage.core.ready
        assert len(stage.made) == loaded


async def test_the_index_has_every_state(tmp_path: Path) -> None:
    for name in ("absent", "broken", "gone", "leaving", "served", "waiting"):
        write_plain(tmp_path, name)
    stage = Stage(tmp_path)
    stage.broken["broken"] = "it is broken"
    for name in ("served", "gone", "leaving"):
        await stage.core.load(name)
    await stage.core.unload("gone")
    with pytest.raises(LoadFailed, match="load failed for model 'broken': version 1 is at UNAVAILABLE state: it is"):
        await stage.core.load("broken")
    stage.made[2].answering.clear()
    answer = asyncio.ensure_future(stage.ask("leaving"))
    await until(lambda: stage.made[2].inflight == 1)
    stage.held = True
    changes = [asyncio.ensure_future(stage.core.load("waiting")), asyncio.ensure_future(stage.core.unload("leaving"))]
    await until(lambda: len(stage.made) == 5 and stage.made[2].state == "draining")
    assert await stage.core.index() == [
        ("absent", "", "", ""),
        ("broken", "1", "UNAVAILABLE", "it is broken"),
        ("gone", "1", "UNAVAILABLE", "unloaded"),
        ("leaving", "1", "UNLOADING", ""),
        ("served", "1", "READY", ""),
        ("waiting", "1", "LOADING", ""),
    ]
    assert await stage.core.index(ready_only=True) == [("served", "1", "READY", "")]
    with pytest.raises(ModelNotReady, match="'waiting' is loading"):
        stage.core.model("waiting")
    with pytest.raises(ModelNotReady, match="'leaving' is being unloaded"):
        stage.core.model("leaving")
    with pytest.raises(ModelNotReady, match="'broken' failed to load"):
        stage.core.model("broken")
    with pytest.raises(UnknownModel, match="unknown model: 'gone' is not found"):
        stage.core.model("gone")
    stage.made[2].answering.set()
    stage.made[-1].loading.set()
    await asyncio.gather(*changes)
    assert await answer == 1


async def test_a_reload_switches_when_the_new_is_ready_and_lets_the_old_answer(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    (old,) = stage.made
    old.answering.clear()
    early = asyncio.ensure_future(stage.ask("m", 5))
    stage.held = True
    write_plain(tmp_path, "m", versions=(2,))
    change = asyncio.ensure_future(stage.core.load("m"))
    await until(lambda: len(stage.made) == 2)
    # The new version loads; the old one is the one that requests see.
    assert await stage.states("m") == [("1", "READY"), ("2", "LOADING")]
    between = asyncio.ensure_future(stage.ask("m", 6))
    await until(lambda: old.inflight == 2)
    stage.made[1].loading.set()
    await until(lambda: old.state == "draining")
    assert await stage.ask("m", 7) == 9
    assert await stage.states("m") == [("1", "UNLOADING"), ("2", "READY")]
    assert not old.closed
    assert not change.done()
    assert stage.changes == ["m"] * 4
    old.answering.set()
    assert await asyncio.gather(early, between) == [6, 7]
    await change
    assert old.closed
    assert await stage.states("m") == [("2", "READY")]


async def test_a_failed_reload_leaves_the_old_one_serving(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    stage.broken["m"] = "out of memory"
    write_plain(tmp_path, "m", versions=(2,), config="version_policy { all { } }")
    with pytest.raises(LoadFailed, match="out of memory"):
        await stage.core.load("m")
    assert await stage.ask("m") == 1
    index = {line.version: line for line in await stage.core.index()}
    assert index["1"] == ("m", "1", "READY", "the reload failed: out of memory")
    assert index["2"] == ("m", "2", "UNAVAILABLE", "out of memory")
    (folder / "config.pbtxt").write_text("nonsense")
    with pytest.raises(LoadFailed, match=r"failed to load 'm', failed to poll from model repository: its config.pbtxt"):
        await stage.core.load("m")
    assert await stage.ask("m") == 1
    assert [m.closed for m in stage.made] == [False, True, True]
    (line,) = await stage.core.index()
    assert line[:3] == ("m", "1", "READY")
    assert line.reason.startswith("the reload failed: its config.pbtxt does not parse")
    stage.broken.clear()
    write_plain(tmp_path, "m")
    await stage.core.load("m")
    assert stage.core.failed == {}
    assert await stage.ask("m") == 2


async def test_what_is_unchanged_stays_as_it_is_unless_a_reload_is_forced(tmp_path: Path) -> None:
    write_plain(tmp_path, "m", versions=(1, 2), config="version_policy { all { } }")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    await stage.core.load("m")
    assert len(stage.made) == 2
    (tmp_path / "m" / "2" / "model.json").write_text("{ }")
    await stage.core.load("m")
    assert [(m.spec.version, m.closed) for m in stage.made] == [("1", False), ("2", True), ("2", False)]
    await stage.core.reload("m")
    assert [m.closed for m in stage.made] == [True, True, True, False, False]


async def test_changes_of_one_model_wait_for_each_other_and_those_of_two_do_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_plain(tmp_path, name)
    stage = Stage(tmp_path)
    stage.held = True
    first = asyncio.ensure_future(stage.core.load("a"))
    await until(lambda: len(stage.made) == 1)
    others = [asyncio.ensure_future(stage.core.unload("a")), asyncio.ensure_future(stage.core.load("b"))]
    await until(lambda: len(stage.made) == 2)
    assert [m.spec.name for m in stage.made] == ["a", "b"]
    assert not any(change.done() for change in (first, *others))
    for model in stage.made:
        model.loading.set()
    await asyncio.gather(first, *others)
    assert await stage.states("a") == [("1", "UNAVAILABLE")]
    assert await stage.states("b") == [("1", "READY")]


async def test_a_change_is_finished_where_its_caller_goes_away(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    stage.held = True
    change = asyncio.ensure_future(stage.core.load("m"))
    await until(lambda: len(stage.made) == 1)
    change.cancel()
    await asyncio.gather(change, return_exceptions=True)
    stage.made[0].loading.set()
    await until(lambda: len(list(stage.core)) == 1)
    assert await stage.ask("m") == 1


@pytest.mark.parametrize("name", ["absent", "../up", "a/b", "", "x" * 200, "a\0b", "."])
async def test_a_model_that_is_not_there_has_tritons_text(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(LoadFailed, match=r"failed to load '.*', failed to poll from model repository$"):
        await stage.core.load(name)
    with pytest.raises(UnknownModel):
        await stage.core.unload(name)
    assert await stage.core.index() == []


@pytest.mark.parametrize(("control", "why"), [("poll", "polling is enabled"), ("none", "model control is disabled")])
async def test_clients_load_and_unload_with_explicit_control_alone(tmp_path: Path, control: Any, why: str) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path, control)
    await stage.core.start()
    for change in (stage.core.load("m"), stage.core.unload("m")):
        with pytest.raises(LoadNotAllowed, match=f"explicit model load / unload is not allowed if {why}"):
            await change
    assert await stage.ask("m") == 1


async def test_an_error_in_the_making_of_a_model_is_a_failure_of_its_load(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)

    def fail(spec: object) -> Any:
        raise MemoryError

    stage.core._make = fail
    with pytest.raises(LoadFailed, match="MemoryError"):
        await stage.core.load("m")
    assert stage.core.failed == {("m", "1"): "loading failed: MemoryError (see the log)"}


async def test_an_error_in_the_freeing_of_a_model_is_logged_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")

    async def fail() -> None:
        raise OSError("stuck")

    stage.made[0].drain = fail  # type: ignore[method-assign]
    await stage.core.reload("m")
    assert "could not be freed" in caplog.text
    assert await stage.core.index() == [("m", "1", "READY", "")]


async def test_a_drain_answers_everything_and_waits_for_loads(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    write_plain(tmp_path, "n")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    stage.made[0].answering.clear()
    answer = asyncio.ensure_future(stage.ask("m"))
    stage.held = True
    load = asyncio.ensure_future(stage.core.load("n"))
    await until(lambda: len(stage.made) == 2)
    drain = asyncio.ensure_future(stage.core.drain())
    stage.made[1].loading.set()
    await until(lambda: stage.made[0].state == "draining")
    assert not drain.done()
    stage.made[0].answering.set()
    await asyncio.gather(load, drain)
    assert await answer == 1
    assert all(m.closed for m in stage.made)
    assert not stage.core.ready
    with pytest.raises(Draining):
        await stage.core.load("m")


async def test_unloading_with_dependents_frees_what_no_other_ensemble_needs(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_plain(tmp_path, name)
    write_ensemble(tmp_path, "first", [("a", "x", "t"), ("b", "t", "y")])
    write_ensemble(tmp_path, "second", [("b", "x", "t"), ("c", "t", "y")])
    stage = Stage(tmp_path)
    await stage.core.load("first")
    await stage.core.load("second")
    await stage.core.unload("first", unload_dependents=True)
    ready = {line.name for line in await stage.core.index(ready_only=True)}
    assert ready == {"b", "c", "second"}


async def test_reloads_under_traffic_lose_no_request(tmp_path: Path, serving: Serving) -> None:
    fake_model(tmp_path, seconds=0.001)
    async with serving(model_control_mode="explicit", load_model=("*",)) as running:
        answered, stop = 0, False

        async def ask() -> None:
            nonlocal answered
            while not stop:
                assert sums(await running.stub.ModelInfer(infer_request(3, 4))) == [3, 4]
                answered += 1

        clients = [asyncio.ensure_future(ask()) for _ in range(8)]
        for _ in range(3):
            await running.app.core.reload("sum")
        stop = True
        await asyncio.gather(*clients)
        assert answered > 10


async def test_random_changes_never_hide_a_model_and_lose_no_answer(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    answers: list[float] = []
    versions, stop, choose = {1.0}, False, random.Random(7)

    async def ask() -> None:
        while not stop:
            answers.append(await stage.ask("m"))
            assert answers[-1] in versions
            await asyncio.sleep(0)

    async def change(newest: int) -> None:
        kind = choose.choice(("new", "broken", "same"))
        stage.broken = {"m": "no"} if kind == "broken" else {}
        if kind == "new":
            write_plain(tmp_path, "m", versions=(newest,))
            versions.add(float(newest))
        await asyncio.gather(stage.core.reload("m"), stage.core.load("m"), return_exceptions=True)

    clients = [asyncio.ensure_future(ask()) for _ in range(8)]
    for newest in range(2, 32):
        await change(newest)
    stop = True
    await asyncio.gather(*clients)
    assert len(set(answers)) > 3
    (served,) = stage.core
    assert [m for m in stage.made if not m.closed] == [served]


async def test_gauges_are_of_the_model_that_serves(tmp_path: Path, serving: Serving) -> None:
    fake_model(tmp_path)
    async with serving(model_control_mode="explicit", load_model=("sum",)) as running:
        labels = {"model": "sum", "version": "1"}

        def states() -> set[str]:
            names = ("loading", "ready", "failed", "draining")
            return {name for name in names if running.metric("convoy_model_state", **labels, state=name)}

        assert states() == {"ready"}
        await running.app.core.reload("sum")
        assert states() == {"ready"}
        (tmp_path / "sum" / "1" / "model.json").write_text("nonsense")
        with pytest.raises(LoadFailed, match=r"model.json is not JSON"):
            await running.app.core.load("sum")
        assert states() == {"ready"}
        await running.app.core.unload("sum")
        assert states() == set()


async def test_health_follows_loads_and_unloads(tmp_path: Path, serving: Serving) -> None:
    async with serving(model_control_mode="poll", repository_poll_secs=0.1) as running:
        stub = health_pb2_grpc.HealthStub(running.channel)
        serves = health_pb2.HealthCheckResponse.SERVING

        async def status(service: str) -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

        assert await status("") != serves
        fake_model(tmp_path)
        while await status("") != serves:
            await asyncio.sleep(0.01)
        assert await status("sum") == serves
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]
        shutil.rmtree(tmp_path / "sum")
        while await status("") == serves:
            await asyncio.sleep(0.01)
        assert await status("sum") != serves
