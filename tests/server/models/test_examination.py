"""What an export found out about the engines decides which one serves, and the log says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.trials import Trials, Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.models import examination
from convoynet.server.models.examination import Examined, examine
from tests.server.engine_setup import spec_of
from tests.server.onnx_models import write_linear

ALIKE = Verdict(engine="openvino", probes=9, shown=True)
BOTH = {"openvino": "OpenVINO 3.1: 40 dB", "onnxruntime": "ONNX Runtime 2.1: 41 dB"}
FAR = {"openvino": "OpenVINO 3.1: 3 dB"}
FAR_RUNTIME = {"onnxruntime": "ONNX Runtime 2.1: 3 dB"}


class Known(Trials):
    """Trials that are over."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self._verdict = verdict

    async def verdict(self, spec: EngineSpec) -> Verdict:
        return self._verdict


@pytest.fixture(autouse=True)
def _both_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    versions = {"openvino": "openvino 3.1", "onnxruntime": "onnxruntime 2.1", "onnxruntime-gpu": "onnxruntime-gpu"}
    monkeypatch.setattr(examination, "release", versions.__getitem__)


async def examined(root: Path, verdict: Verdict = ALIKE, engine: str = "", **found: dict[str, str]) -> Examined:
    if not list(root.iterdir()):
        write_linear(root)
    spec = spec_of(root, engine)
    return await examine(replace(spec, engine=replace(spec.engine, **found)), Known(verdict))  # type: ignore[arg-type]


async def test_what_was_verified_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = await examined(tmp_path, verified=BOTH)
    assert engines.choose(found.spec.engine)[0] == "openvino"
    assert found.told["verified"] == "by the export, OpenVINO 3.1: 40 dB"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_another_version_than_was_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = await examined(tmp_path, verified=BOTH | {"openvino": "OpenVINO 3.0: 40 dB"})
    assert engines.choose(found.spec.engine)[0] == "openvino"
    assert "in another version than is here: OpenVINO 3.0" in caplog.text


async def test_an_engine_that_was_excluded_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    verdict = Verdict(engine="onnxruntime", probes=9, shown=True)
    found = await examined(tmp_path, verdict, verified=FAR_RUNTIME, excluded=FAR)
    assert engines.choose(found.spec.engine) == ("onnxruntime",)
    assert "excluded: openvino: OpenVINO 3.1: 3 dB" in caplog.text


async def test_who_asks_for_an_engine_gets_it_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = await examined(tmp_path, engine="openvino", verified=FAR_RUNTIME, excluded=FAR)
    assert engines.choose(found.spec.engine) == ("openvino",)
    assert "not openvino, but the config asks for it: OpenVINO 3.1: 3 dB" in caplog.text


async def test_onnx_runtime_is_no_way_out_where_it_was_excluded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    differs = replace(ALIKE, differs="OpenVINO's output is 3, and not 4")
    found = await examined(tmp_path, differs, verified={"openvino": BOTH["openvino"]}, excluded=FAR_RUNTIME)
    assert engines.choose(found.spec.engine) == ("openvino",)
    assert "otherwise than ONNX Runtime, which the export did not verify" in caplog.text
    found = await examined(tmp_path, differs, verified=BOTH)
    assert engines.choose(found.spec.engine) == ("onnxruntime",)
    not_finite = replace(ALIKE, finite_only=True)
    assert (await examined(tmp_path, not_finite)).spec.engine.finite_only
    assert not (await examined(tmp_path, not_finite, excluded=FAR_RUNTIME)).spec.engine.finite_only


async def test_where_every_engine_was_excluded(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="the export excluded openvino and onnxruntime"):
        await examined(tmp_path, excluded=FAR | FAR_RUNTIME)
