"""Threads and instances by measurement."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from convoynet.server.engines.patience import Patience
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import InvalidModel
from convoynet.server.host import available_cpus
from convoynet.server.models import tuning
from convoynet.server.models.service_load import Beside, BesideFailed
from convoynet.server.models.tuning import Measured, Tuned, tune
from convoynet.server.repository import repository
from convoynet.server.spec import EngineOptions, ModelSpec
from tests.server.conftest import Serving, fake_model
from tests.server.onnx_models import write_linear


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A model of an engine that sleeps."""
    monkeypatch.setattr(tuning, "available_cpus", lambda: 2)
    monkeypatch.setattr(tuning, "_SECONDS", 0.3)
    monkeypatch.setattr(tuning, "_BUDGET_SECONDS", 1000.0)
    fake_model(tmp_path / "models", seconds=0.05)
    (found,) = repository.scan(tmp_path / "models", repository.Defaults(4, 1))
    assert found.spec is not None
    # The tests write to the file.
    return replace(found.spec, engine=replace(found.spec.engine, files=()))


@pytest.fixture
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further instance adds as much as the first, which busy cores would not show."""

    async def measure(spec: ModelSpec, instances: int, threads: int, *_: object) -> tuple[Measured, float]:
        return Measured(instances, threads, 100.0 * instances, "fake"), 0.05

    monkeypatch.setattr(tuning, "_measure", measure)


async def test_what_is_measured_is_what_engines_do(spec: ModelSpec) -> None:
    measured, seconds = await tuning._measure(spec, 2, 1)
    assert measured[:2] == (2, 1)
    assert 0 < measured.images_per_s <= 2 * spec.batch.max_rows / 0.05, "neither engine answers sooner than it sleeps"
    assert seconds >= 0.05


@pytest.mark.usefixtures("twice_as_fast")
async def test_more_instances_where_they_are_faster_and_remembered(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "convoynet.server.models.tuning")
    tuned = await tune(spec, tmp_path / "cache")
    (line,) = (record.getMessage() for record in caplog.records if record.name == "convoynet.server.models.tuning")
    assert re.fullmatch(r"model sum version 1: 2 engines of 1 thread; images/s of engines x threads: 1 x 2 .*", line)
    assert "{" not in line
    assert (tuned.instances, tuned.threads) == (2, 1)
    assert [measured[:2] for measured in tuned.measured] == [(1, 2), (2, 1)]
    assert json.loads(tuned.to_json())["measured"][1]["images_per_s"] > 0

    async def measured_again(*_: object) -> None:
        raise AssertionError("it is known")

    measure = tuning._measure
    monkeypatch.setattr(tuning, "_measure", measured_again)
    assert await tune(spec, tmp_path / "cache") == tuned
    for other in (replace(spec, batch=replace(spec.batch, max_rows=2)), replace(spec, engine=_touched(spec))):
        with pytest.raises(AssertionError, match="it is known"):
            await tune(other, tmp_path / "cache")
    monkeypatch.setattr(tuning, "_measure", measure)
    (tmp_path / "cache" / "tuning.json").write_text('{"a": 1}')  # a file of another make is measured over
    assert (await tune(spec, tmp_path / "cache")).instances == 2


def _touched(spec: ModelSpec) -> object:
    spec.engine.file.write_text(spec.engine.file.read_text() + "\n")
    return spec.engine


async def test_a_slow_network_is_not_measured_further(tmp_path: Path, spec: ModelSpec) -> None:
    spec.engine.file.write_text('{"seconds": 0.6}')
    tuned = await tune(spec, tmp_path)
    assert (tuned.instances, tuned.threads, len(tuned.measured)) == (1, 2, 1)


async def test_nothing_to_choose_on_one_core(tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "available_cpus", lambda: 1)
    assert await tune(spec, tmp_path) == Tuned(1, 1)


async def test_a_model_that_no_engine_takes(tmp_path: Path, spec: ModelSpec) -> None:
    spec.engine.file.write_text("not JSON")
    with pytest.raises(InvalidModel, match="is not JSON"):
        await tune(spec, tmp_path)
    assert not (tmp_path / "tuning.json").exists()


@pytest.mark.usefixtures("twice_as_fast")
async def test_a_folder_that_cannot_be_written(
    tmp_path: Path, spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert (await tune(spec, tmp_path / "file")).instances == 2
    assert "is not kept" in caplog.text


async def test_models_are_measured_one_after_another_and_none_waits_for_ever(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[str] = []
    busy, go = asyncio.Event(), asyncio.Event()

    async def measure(spec: ModelSpec, instances: int, threads: int, *_: object) -> tuple[Measured, float]:
        assert not measured or spec.name == measured[-1] or go.is_set(), "two at once"
        measured.append(spec.name)
        busy.set()
        await go.wait()
        return Measured(instances, threads, 100.0 * instances, "fake"), 0.1

    monkeypatch.setattr(tuning, "_measure", measure)
    turn = asyncio.Lock()
    first = asyncio.ensure_future(tune(spec, tmp_path / "cache", turn=turn))
    await busy.wait()
    other = replace(spec, name="other", batch=replace(spec.batch, max_rows=2))
    second = asyncio.ensure_future(tune(other, tmp_path / "cache", turn=turn))
    await asyncio.sleep(0.05)
    monkeypatch.setattr(tuning, "_TURN_SECONDS", 0.05)
    third = replace(spec, name="third", batch=replace(spec.batch, max_rows=3))
    assert await tune(third, tmp_path / "cache", turn=turn) == Tuned(1, 2)
    assert "the engines of model third are not measured" in caplog.text
    go.set()
    assert [(await one).instances for one in (first, second)] == [2, 2]
    assert measured == [spec.name, spec.name, "other", "other"]
    assert (await tune(third, tmp_path / "cache", turn=turn)).instances == 2, "it was kept although it is not known"
    assert not turn.locked()


async def test_work_that_takes_too_much_memory_is_not_begun(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Beside, "start", None)
    for free, available in ((100 * 2**20, 2**40), (2**40, 100 * 2**20)):
        monkeypatch.setattr(tuning, "memory_bytes", lambda free=free: (2**41, free))
        monkeypatch.setattr(tuning, "available_memory", lambda available=available: available)
        assert await tuning._beside(spec, 1) is None
        assert "there is no memory for the work beside them" in caplog.text
        caplog.clear()


def test_candidates() -> None:
    assert tuning._candidates(1, 1000) == [1]
    assert tuning._candidates(2, 1000) == [1, 2]
    assert tuning._candidates(12, 1000) == [1, 2, 4, 8, 12]
    assert tuning._candidates(16, 1 << 50) == [1]


def test_weights_in_files_of_their_own_count_for_the_number_of_engines(tmp_path: Path) -> None:
    for name, size in (("model.xml", 1000), ("model.bin", 1 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    options = EngineOptions("openvino", tmp_path / "model.xml", "cpu", 1)
    assert tuning._file_bytes(options) == 1000
    marked = tuple((str(tmp_path / name), "", "") for name in ("model.xml", "model.bin"))
    assert tuning._file_bytes(replace(options, files=marked)) == 1000 + (1 << 20)


async def test_a_machine_without_room_for_more_engines_serves_with_one(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No descriptor, say, or a file that was taken away: that is no reason not to load the model."""
    start, started = EngineProcess.start, 0

    async def none_after(spec: ModelSpec, patience: Patience) -> EngineProcess:
        nonlocal started
        started += 1
        if started > most:
            raise OSError(24, "Too many open files")
        return await start(spec, patience)

    monkeypatch.setattr(EngineProcess, "start", none_after)
    most = 2
    tuned = await tune(spec, tmp_path / "cache")
    assert (tuned.instances, len(tuned.measured)) == (1, 1)
    most, other = 0, replace(spec, batch=replace(spec.batch, max_rows=2))
    assert await tune(other, tmp_path / "cache") == Tuned(1, 2)
    assert "the engines of model sum are not measured: Too many open files" in caplog.text


async def test_engines_that_hang_are_given_up_by_what_the_first_took(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient: list[float] = []
    start = EngineProcess.start

    async def told(spec: ModelSpec, patience: Patience) -> EngineProcess:
        patient.append(patience.load_s)
        return await start(spec, patience)

    monkeypatch.setattr(EngineProcess, "start", told)
    await tune(spec, tmp_path / "cache")
    assert patient[0] == spec.limits.load_s
    assert all(seconds < spec.limits.load_s for seconds in patient[1:])


@pytest.mark.parametrize(
    ("rates", "instances", "engine", "measurements"),
    [
        ({("", 1): 100, ("onnxruntime", 1): 105, ("", 2): 109, ("", 4): 112}, 4, "", 4),
        ({("", 1): 100, ("onnxruntime", 1): 105, ("", 2): 109, ("", 4): 90}, 1, "", 4),
        ({("", 1): 100, ("onnxruntime", 1): 111, ("onnxruntime", 2): 130, ("onnxruntime", 4): 0}, 2, "onnxruntime", 3),
        ({("", 1): 100, ("onnxruntime", 1): 0, ("", 2): 120, ("", 4): 130}, 2, "", 3),
    ],
    ids=["more engines", "one engine", "another engine, and no memory for four", "one that does not take it"],
)
async def test_the_choice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[tuple[str, int], float],
    instances: int,
    engine: str,
    measurements: int,
) -> None:
    """Rates stand for measurements; 0 for engines that do not load."""

    async def measure(spec: ModelSpec, instances: int, threads: int, *_: object) -> tuple[Measured, float]:
        rate = rates[spec.engine.engine, instances]
        if not rate:
            raise InvalidModel("no")
        return Measured(instances, threads, rate, "ONNX Runtime 1" if spec.engine.engine else "OpenVINO 1"), 0.1

    write_linear(tmp_path)
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.spec is not None
    monkeypatch.setattr(tuning, "available_cpus", lambda: 4)
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr("convoynet.server.engines.choose", lambda _: ("openvino", "onnxruntime"))
    tuned = await tune(found.spec, tmp_path / "cache")
    assert (tuned.instances, tuned.threads, tuned.engine) == (instances, 4 // instances, engine)
    assert len(tuned.measured) == measurements
    assert await tune(found.spec, tmp_path / "cache") == tuned


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({(1, 4): 100, (1, 3): 111, (2, 2): 90, (4, 1): 90}, (1, 3)),
        ({(1, 4): 100, (1, 3): 109, (2, 2): 90, (4, 1): 90}, (1, 4)),
        ({(1, 4): 100, (1, 3): 111, (2, 2): 120, (4, 1): 130}, (4, 1)),
        ({(1, 4): 100, (1, 3): 111, (2, 2): 120, (4, 1): 121}, (1, 3)),
    ],
)
async def test_the_choice_beside_front_ends(
    tmp_path: Path,
    spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[tuple[int, int], float],
    chosen: tuple[int, int],
) -> None:
    """One engine that leaves a front end its core is measured as well."""
    busy: set[object] = set()

    async def measure(spec: ModelSpec, instances: int, threads: int, *beside: object) -> tuple[Measured, float]:
        busy.add(type(beside[0]))
        return Measured(instances, threads, rates[instances, threads], "fake"), 0.1

    monkeypatch.setattr(tuning, "available_cpus", lambda: 4)
    monkeypatch.setattr(tuning, "_measure", measure)
    tuned = await tune(spec, tmp_path / "cache", frontends=1)
    assert (tuned.instances, tuned.threads) == chosen
    assert tuned.beside == 1
    assert busy == {Beside}
    assert {measured[:2] for measured in tuned.measured} == set(rates)
    assert await tune(spec, tmp_path / "cache", frontends=1) == tuned
    monkeypatch.setattr(tuning, "_measure", None)  # alone is another measurement
    with pytest.raises(TypeError):
        await tune(spec, tmp_path / "cache")


async def test_each_batch_waits_for_its_rows_in_the_front_ends(tmp_path: Path, spec: ModelSpec) -> None:
    served: list[int] = []

    class Counted(Beside):
        async def serve(self, rows: int) -> None:
            served.append(rows)

    measured, _ = await tuning._measure(spec, 2, 1, Counted())
    assert set(served) == {min(spec.batch.max_rows, 8)}
    assert measured.images_per_s > 0
    assert len(served) >= 2


async def test_work_that_fails_leaves_the_engine_as_it_would_be_without(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def failed(*_: object) -> None:
        raise BesideFailed("it has died")

    monkeypatch.setattr(Beside, "serve", failed)
    assert await tune(spec, tmp_path / "cache", frontends=1) == Tuned(1, 2)
    assert "not measured: the work beside them fails: it has died" in caplog.text
    monkeypatch.setattr(Beside, "start", failed)
    tuned = await tune(spec, tmp_path / "cache", frontends=1)
    assert [measured[:2] for measured in tuned.measured] == [(1, 2), (2, 1)]
    assert tuned.beside == 0
    assert "measured alone: the work beside them fails" in caplog.text


@pytest.mark.parametrize("in_service", [True, False])
async def test_the_server_logs_what_it_chose_and_uses_it(
    serving: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_service: bool,
) -> None:
    """With a real engine, whatever is the faster on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "available_cpus", lambda: 2)
    monkeypatch.setattr(tuning, "_SECONDS", 0.05)
    monkeypatch.setattr(tuning, "_BUDGET_SECONDS", 1000.0)
    monkeypatch.setattr(tuning, "_SLOW_SECONDS", 1000.0)
    write_linear(tmp_path / "models")
    config = tmp_path / "models" / "linear" / "config.pbtxt"
    stated = config.read_text()
    assert "count: 1" in stated
    engine = 'parameters { key: "engine" value { string_value: "onnxruntime" } }'
    config.write_text(stated.replace("count: 1", "") + engine)
    caplog.set_level("INFO", tuning.__name__)
    settings = {"tune": True, "tune_in_service": in_service, "threads": available_cpus()}
    async with serving(root=tmp_path / "models", **settings) as running:
        model = running.app.core.model("linear")
        tuned = Tuned.from_json(model._told["tuning"])
        assert tuned.beside == in_service
        assert {(1, 2), (2, 1)} <= {measured[:2] for measured in tuned.measured}
        assert len(model._instances) == tuned.instances
        assert model.spec.engine.threads == tuned.threads
    assert str(tuned) in caplog.text
    assert ("threads beside 1 busy as front ends are: 1 x 2 ONNX Runtime" in caplog.text) == in_service
