"""Outputs that few requests ask for: computed only where one of a batch does, and the others the same either way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from convoynet.server import engines
from convoynet.server.engines.base import Engine, EngineSpec
from convoynet.server.engines.onnx_part import cut_out
from convoynet.server.engines.seldom import SeldomEngine
from convoynet.server.engines.trial import try_model
from convoynet.server.errors import InvalidModel
from convoynet.server.types import Tensor
from tests.server.engine_setup import installed, spec_of
from tests.server.onnx_models import write_colors

ENGINES = [pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason="is an extra"))
           for name in ("onnxruntime", "openvino")]  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    """Of a model that explains its answers, of which config.pbtxt says so."""
    write_colors(tmp_path, explains=True)
    found = EngineSpec.of(spec_of(tmp_path))
    assert (found.seldom, found.usual) == (("explanation",), ("logits",))
    assert EngineSpec.from_json(found.to_json()) == found
    return found


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


def answer(engine: Engine, inputs: dict[str, Tensor], *outputs: str) -> dict[str, Tensor]:
    return {name: values.copy() for name, values in engine.run(inputs, outputs).items()}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("stated", [("explanation",), ()], ids=["stated", "not stated"])
def test_what_is_wanted_has_the_same_bits_with_them_and_without(
    spec: EngineSpec, name: str, stated: tuple[str, ...]
) -> None:
    engine = engines.make(name, replace(spec, seldom=stated))
    for count in (1, 3, 8, 1, 8):
        given = images(count)
        whole = answer(engine, {"input": given})
        assert list(whole) == ["logits", "explanation"]
        for classes in ({}, {"explain_class": np.full((count, 1), 2)}):
            alone = answer(engine, {"input": given, **classes}, "logits")
            assert list(alone) == ["logits"]
            assert np.array_equal(alone["logits"], whole["logits"])
        asked = answer(engine, {"input": given, "explain_class": np.full((count, 1), 2)}, "explanation")
        np.testing.assert_allclose(asked["explanation"], given[..., 2], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(whole["explanation"], given.mean(3), rtol=1e-5, atol=1e-3)
    engine.close()


def write_refusing(file: Path) -> None:
    """Logits are the input; "explanation" is what a table has at a place far beyond its end, which is an error."""
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["input"], ["logits"]),
            helper.make_node("Cast", ["input"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "whole"], ["explanation"]),
        ],
        "refusing",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("logits", "explanation")],
        [numpy_helper.from_array(np.zeros(3, np.float32), "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)


def test_onnx_runtime_does_not_compute_what_nobody_wants(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "refusing" / "1").mkdir(parents=True)
    write_refusing(tmp_path / "refusing" / "1" / "model.onnx")
    (tmp_path / "refusing" / "config.pbtxt").write_text(
        """backend: "onnxruntime" max_batch_size: 4
        input { name: "input" data_type: TYPE_FP32 dims: [2] }
        output { name: "logits" data_type: TYPE_FP32 dims: [2] }
        output { name: "explanation" data_type: TYPE_FP32 dims: [2] }
        parameters { key: "seldom_outputs" value { string_value: "explanation" } }"""
    )
    found = EngineSpec.of(spec_of(tmp_path))
    given = {"input": np.array([[1e6, -1e6]], np.float32)}
    engine = engines.make("onnxruntime", found, quiet=True)
    for _ in range(3):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            engine.run(given)
        assert np.array_equal(engine.run(given, ["logits"])["logits"], given["input"])
    engine.close()


def test_the_part_has_what_its_outputs_need_and_nothing_else(spec: EngineSpec, tmp_path: Path) -> None:
    plain = write_colors(tmp_path / "plain") / "1" / "model.onnx"
    part, alone = onnx.load_from_string(cut_out(spec.options.file, ["logits"])), onnx.load(plain)
    onnx.checker.check_model(part, full_check=True)
    assert part.graph == alone.graph
    both = onnx.load(spec.options.file)
    assert onnx.load_from_string(cut_out(spec.options.file, ["logits", "explanation"])) == both
    both.graph.ClearField("node")
    assert part.ir_version == both.ir_version
    assert part.opset_import == both.opset_import


def test_what_a_graph_within_the_graph_reads_stays(tmp_path: Path) -> None:
    """Of a branch the one result is a tensor of the graph around it, and the other is made of one."""

    def value(name: str, kind: int = TensorProto.FLOAT, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    then = helper.make_graph([], "then", [], [value("twice", TensorProto.FLOAT, "batch", 2)])
    otherwise = helper.make_graph(
        [helper.make_node("Neg", ["same"], ["less"])], "else", [], [value("less", TensorProto.FLOAT, "batch", 2)]
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["sure"], ["logits"], then_branch=then, else_branch=otherwise),
            helper.make_node("Add", ["input", "input"], ["twice"]),
            helper.make_node("Identity", ["input"], ["same"]),
            helper.make_node("Exp", ["input"], ["other"]),
        ],
        "branches",
        [value("input", TensorProto.FLOAT, "batch", 2), value("sure", TensorProto.BOOL)],
        [value("logits", TensorProto.FLOAT, "batch", 2), value("other", TensorProto.FLOAT, "batch", 2)],
        [numpy_helper.from_array(np.array(True), "sure")],
    )
    file = tmp_path / "branches.onnx"
    file.write_bytes(helper.make_model(graph).SerializeToString())
    part = onnx.load_from_string(cut_out(file, ["logits"]))
    assert [node.op_type for node in part.graph.node] == ["If", "Add", "Identity"]
    assert [one.name for one in part.graph.input] == ["input", "sure"]
    assert [one.name for one in onnx.load_from_string(cut_out(file, ["other"])).graph.input] == ["input"]


@pytest.mark.parametrize("content", [b"\x0a", b"\x3a\x05ab", b"\x3b", b"\xff" * 12, b"\x3a\x04\x0a\x02\x0a\x09"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"model.onnx is no ONNX file: "):
        cut_out(file, ["logits"])


def test_a_file_with_weights_beside_it_is_computed_whole(spec: EngineSpec) -> None:
    pytest.importorskip("onnxruntime")
    model = onnx.load(spec.options.file)
    (unit,) = [tensor for tensor in model.graph.initializer if tensor.name == "unit"]
    external_data_helper.set_external_data(unit, "weights")
    onnx.save(model, spec.options.file)
    engine = engines.make("onnxruntime", replace(spec, options=replace(spec.options, files=())))
    assert "seldom_outputs" not in engine.info
    assert list(engine.run({"input": images(2)}, ["logits"])) == ["logits"]


def test_the_graph_without_them_is_tried_as_well(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    tried = replace(spec, options=replace(spec.options, engine="openvino"))

    def differs() -> str:
        (*_, found) = try_model(tried)
        return str(found["differs"])

    assert differs() == ""
    run = SeldomEngine.run

    def wrong(engine: SeldomEngine, inputs: dict[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        found = run(engine, inputs, outputs)
        return {name: values + 1 for name, values in found.items()} if outputs else found

    monkeypatch.setattr(SeldomEngine, "run", wrong)
    assert "OpenVINO's output 'logits' is " in differs()
