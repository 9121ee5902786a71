"""Threads and instances by measurement."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from convoynet.server.errors import InvalidModel
from convoynet.server.models import tuning
from convoynet.server.models.tuning import Measured, Tuned, tune
from convoynet.server.repository import repository
from convoynet.server.spec import ModelSpec
from tests.server.conftest import fake_model
from tests.server.onnx_models import write_linear


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A model of an engine that sleeps, so that each further instance adds as much as the first."""
    monkeypatch.setattr(tuning, "available_cpus", lambda: 2)
    monkeypatch.setattr(tuning, "_SECONDS", 0.3)
    fake_model(tmp_path / "models", seconds=0.05)
    (found,) = repository.scan(tmp_path / "models", repository.Defaults(4, 1))
    assert found.spec is not None
    # The tests write to the file.
    return replace(found.spec, engine=replace(found.spec.engine, files=()))


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


async def test_a_folder_that_cannot_be_written(
    tmp_path: Path, spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert (await tune(spec, tmp_path / "file")).instances == 2
    assert "is not kept" in caplog.text


def test_candidates() -> None:
    assert tuning._candidates(1, 1000) == [1]
    assert tuning._candidates(2, 1000) == [1, 2]
    assert tuning._candidates(12, 1000) == [1, 2, 4, 8, 12]
    assert tuning._candidates(16, 1 << 50) == [1]


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

    async def measure(spec: ModelSpec, instances: int, threads: int) -> tuple[Measured, float]:
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
