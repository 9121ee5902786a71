"""Each engine that may serve goes through the gates by itself."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.engines import Engine
from convoynet.exporter.evidence.parity import Comparison, Parity
from convoynet.exporter.pipeline import measuring, pipeline, serving
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.exporter.running import openvino
from convoynet.exporter.running.runtime import Array, Outputs
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.repository import repository


class Otherwise:
    """An engine that computes something else."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __call__(self, inputs: Array) -> Outputs:
        return tuple(np.roll(output, 1, axis=1) for output in self._session(inputs))


def test_an_engine_that_computes_otherwise_is_named_and_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not openvino.may_serve():
        pytest.skip("needs OpenVINO on x86")
    real = serving.load

    def load(bench: Any, engine: Engine, graph: bytes | Path) -> Any:
        session = real(bench, engine, graph)
        content = graph if isinstance(graph, bytes) else graph.read_bytes()
        return Otherwise(session) if engine.name == "openvino" and b"QuantizeLinear" in content else session

    monkeypatch.setattr(serving, "load", load)
    monkeypatch.setattr(serving, "adds_in_16_bits", lambda: False)
    monkeypatch.setattr(measuring, "load", load)
    config = ExportConfig("lenet5", repository=tmp_path, steps=(Int8(),), target="cpu", batch=(1, 4))
    published = pipeline.run(config, Quiet())
    told = json.loads((published.folder / "report.json").read_text())
    wrong, right = told["engines"]
    assert (wrong["engine"], wrong["verified"], right["engine"], right["verified"]) == (
        "openvino", False, "onnxruntime", True,
    )  # fmt: skip
    assert "INT8 moved the outputs too far" in wrong["excluded"]
    assert wrong["fp32_parity"]["top1_agreement"] == 1  # which it passed
    assert wrong["speed"] is None
    assert told["parity"] == right["parity"]
    assert told["parity"]["runtime"].startswith("ONNX Runtime")
    stated = text_format.Parse((tmp_path / "lenet5" / "config.pbtxt").read_text(), pb.ModelConfig()).parameters
    assert json.loads(stated["verified_engines"].string_value).keys() == {"onnxruntime"}
    excluded = json.loads(stated["excluded_engines"].string_value)["openvino"]
    assert excluded.startswith("OpenVINO 20")
    assert "their error is" in excluded
    assert stated["verified_version"].string_value == "1"
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.spec is not None, found.reason
    assert engines.choose(found.spec.engine) == ("onnxruntime",)
    travelled = EngineSpec.from_json(EngineSpec.of(found.spec).to_json())
    assert engines.choose(travelled.options) == ("onnxruntime",)


GOOD = Parity(
    "classification", 10, 0.0, 0.0, "reference", "runtime", (1,), min_cosine=1.0, top1_agreement=1.0, top5_agreement=1.0
)
NO_POINTS = np.zeros(0, np.float32)


class Bench:
    """Compares everything as equal."""

    def compare(self, session: object, reference: object = None) -> Comparison:
        return Comparison(GOOD, NO_POINTS, NO_POINTS)


def judged(monkeypatch: pytest.MonkeyPatch, reasons: dict[str, str], *, broken: str = "") -> tuple[list[Engine], str]:
    """Engines after a gate that refuses with these reasons, and the one that speaks for them."""

    def load(bench: object, engine: Engine, graph: bytes) -> object:
        if engine.name == broken:
            raise RuntimeError("Check failed\nno kernel for Conv")
        engine.title = engine.name.upper()
        return object()

    def check(engine: Engine) -> None:
        if engine.name in reasons:
            raise Refused(f"{reasons[engine.name]}; nothing was published. Try another")

    monkeypatch.setattr(serving, "load", load)
    both = [Engine("openvino"), Engine("onnxruntime")]
    speaks = serving.judge(Bench(), both, "int8", onnx.ModelProto(), check, None)  # type: ignore[arg-type]
    return both, speaks.name


def test_one_engine_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both, speaks = judged(monkeypatch, {})
    assert speaks == "onnxruntime"  # which runs every stage
    assert all(engine.verified for engine in both)
    both, speaks = judged(monkeypatch, {"onnxruntime": "too far"})
    assert speaks == "openvino"
    assert [engine.excluded for engine in both] == ["", "too far"]
    both, speaks = judged(monkeypatch, {}, broken="openvino")
    assert both[0].excluded == "does not run the int8 graph: no kernel for Conv"


def test_a_model_that_no_engine_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused) as refused:
        judged(monkeypatch, {"openvino": "too far", "onnxruntime": "far too far"})
    assert str(refused.value) == (
        "too far (in OPENVINO; no other engine passes either: ONNXRUNTIME: far too far); "
        "nothing was published. Try another"
    )
    with pytest.raises(Refused, match=r"^far \(in ONNXRUNTIME.*openvino: does not run the int8 graph: no kernel"):
        judged(monkeypatch, {"onnxruntime": "far"}, broken="openvino")


@pytest.mark.parametrize("narrow", [True, False], ids=["without VNNI", "with it"])
def test_int8_is_first_measured_in_the_engine_that_a_server_takes_first(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not openvino.may_serve():
        pytest.skip("needs OpenVINO on x86")
    monkeypatch.setattr(serving, "adds_in_16_bits", lambda: narrow)
    for steps, exact_first in (((Int8(),), narrow), ((), False)):
        bench: Any = SimpleNamespace(task=SimpleNamespace(config=ExportConfig("lenet5", steps=steps, target="cpu")))
        names = [engine.name for engine in serving.engines_of(bench)]
        assert names == (["onnxruntime", "openvino"] if exact_first else ["openvino", "onnxruntime"])
