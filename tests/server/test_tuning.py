"""Threads and instances by measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from server import repository, tuning
from server.errors import InvalidModel
from server.spec import ModelSpec
from server.tuning import Tuned, tune
from tests.server.conftest import fake_model


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A model of an engine that sleeps, so that each further instance adds as much as the first."""
    monkeypatch.setattr(tuning, "available_cpus", lambda: 2)
    monkeypatch.setattr(tuning, "_SECONDS", 0.1)
    fake_model(tmp_path / "models", seconds=0.02)
    (found,) = repository.scan(tmp_path / "models", repository.Defaults(4, 1))
    assert found.spec is not None
    return found.spec


async def test_more_instances_where_they_are_faster_and_remembered(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = await tune(spec, tmp_path / "cache")
    assert (tuned.instances, tuned.threads) == (2, 1)
    assert [measured[:2] for measured in tuned.measured] == [(1, 2), (2, 1)]
    assert json.loads(tuned.to_json())["measured"][1][2] > 0

    async def measured_again(*_: object) -> tuple[float, float]:
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


def test_candidates_and_the_choice() -> None:
    assert tuning._candidates(2, 1000) == [1, 2]
    assert tuning._candidates(12, 1000) == [1, 2, 4, 8, 12]
    assert tuning._candidates(16, 1 << 50) == [1]
    assert tuning._choose([(1, 4, 100.0), (2, 2, 109.0), (4, 1, 112.0)]).instances == 4
    assert tuning._choose([(1, 4, 100.0), (2, 2, 109.0)]).instances == 1
