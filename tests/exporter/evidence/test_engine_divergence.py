"""The search and the engines are real: TensorRT builds every marked graph. What runs them is ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.evidence.divergence import THRESHOLD_DB, computed, read_as
from convoynet.exporter.evidence.engine_divergence import Run, cut_points, engine_divergence, marked, waists
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_bf16, to_fp16
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running.runtime import Array, inner_session
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.library import find
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

IMAGES = pixels(3)

Change = Callable[[onnx.ModelProto], onnx.ModelProto]


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def int8(exact: onnx.ModelProto) -> onnx.ModelProto:
    return quantize(exact, calibrate(exact, [pixels(16)], "minmax"), "gpu")


class Engines:
    """Builds each graph with TensorRT where it is installed, and runs what `change` makes of it in ONNX Runtime."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.built: list[onnx.ModelProto] = []

    def __call__(self, model: onnx.ModelProto) -> Run:
        self.built.append(model)
        if find() is not None:
            options = BuildOptions(profiles=(Profile(1, 2, 4),))
            assert len(build(model.SerializeToString(), options, Quiet()).content) > 10_000
        changed = self.change(model)
        offered = [value.name for value in model.graph.output]

        def run(images: Array, tensors: Sequence[str]) -> Mapping[str, Array]:
            assert set(tensors) <= set(offered)
            session = inner_session(changed, tensors)
            return dict(zip(tensors, session.run(list(tensors), {"input": images}), strict=True))

        return run


def broken_at(tensor: str) -> Change:
    """The weights of one layer in reverse order."""

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        graph = Graph(broken)
        stored = graph.producers[tensor].input[1]
        while stored not in graph.initializers:  # in a quantized graph behind its DequantizeLinear
            stored = graph.producers[stored].input[0]
        swapped = numpy_helper.from_array(graph.constant(stored)[::-1].copy(), stored)
        graph.initializers[stored].CopyFrom(swapped)
        return broken

    return change


def layers(model: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in Graph(model) if node.op_type in {"Conv", "Gemm"}]


def test_an_engine_that_is_its_graph_takes_two_builds(exact: onnx.ModelProto) -> None:
    engines = Engines(lambda model: model)
    found = engine_divergence(exact, exact, IMAGES, engines)
    assert found.first is None
    assert found.engines == len(engines.built) == 2  # as it is, and one with marks, of which none has parted
    assert [error.tensor for error in found.outputs] == ["logits"]
    assert "is its graph" in found.line
    assert found.to_json()["images"] == 3


@pytest.mark.parametrize("number", [0, 3, 5, -1])
def test_the_layer_that_was_broken_is_found(exact: onnx.ModelProto, number: int) -> None:
    victim = layers(exact)[number]
    engines = Engines(broken_at(victim))
    found = engine_divergence(exact, exact, IMAGES, engines)
    graph = Graph(exact)
    if victim in graph.outputs:  # it is compared as it is; nothing inside has parted
        assert found.first is None
        assert found.outputs[0].sqnr_db < THRESHOLD_DB
        return
    assert found.first is not None
    allowed = {victim} | {reader.output[0] for reader in graph.readers(victim)}
    assert found.first.tensor in allowed
    assert found.first.tensor in found.line
    # A few engines, and none with everything marked.
    assert found.engines <= 5
    assert max(len(model.graph.output) for model in engines.built) <= 9


def test_an_error_that_marks_take_away_is_told_as_one_of_fusion(exact: onnx.ModelProto) -> None:
    last = broken_at(layers(exact)[2])
    engines = Engines(lambda model: last(model) if len(model.graph.output) == 1 else model)
    found = engine_divergence(exact, exact, IMAGES, engines)
    assert found.first is None
    assert "fuses" in found.line


def test_int8_engines_are_compared_with_their_own_graph_and_with_the_float_one(
    exact: onnx.ModelProto, int8: onnx.ModelProto
) -> None:
    same = engine_divergence(int8, int8, IMAGES, Engines(lambda model: model))
    assert same.first is None
    assert {error.sqnr_db for error in same.outputs} == {200.0}
    rounded = engine_divergence(int8, exact, IMAGES, Engines(lambda model: model))
    assert rounded.first is None
    assert THRESHOLD_DB < rounded.outputs[0].sqnr_db < 60
    victim = layers(exact)[4]
    broken = engine_divergence(int8, exact, IMAGES, Engines(broken_at(victim)))
    assert broken.first is not None
    assert broken.first.tensor in {victim} | {reader.output[0] for reader in Graph(exact).readers(victim)}


def test_half_precision_is_compared_too(exact: onnx.ModelProto) -> None:
    half = to_fp16(exact)
    engines = Engines(lambda model: model)
    found = engine_divergence(half, exact, IMAGES, engines)
    assert found.first is None
    types = {value.type.tensor_type.elem_type for value in engines.built[-1].graph.output}
    assert TensorProto.FLOAT16 in types
    assert len(found.tensors) > 3


@pytest.mark.skipif(find() is None, reason="needs tensorrt or tensorrt_rtx: pip install tensorrt-rtx")
def test_bfloat16_graphs_build_with_marks(exact: onnx.ModelProto) -> None:
    graph = Graph(to_bf16(onnx.version_converter.convert_version(exact, 22)))
    names = [read_as(graph, name) for name in cut_points(Graph(exact), computed(Graph(exact)))]
    options = BuildOptions(profiles=(Profile(1, 2, 4),))
    assert build(marked(graph.model, names).SerializeToString(), options, Quiet()).content


def chain() -> onnx.ModelProto:
    """x -> a -> (b, c) -> d -> e, with a skip from d to f past e."""

    def relu(source: str, made: str) -> onnx.NodeProto:
        return helper.make_node("Relu", [source], [made])

    def add(left: str, right: str, made: str) -> onnx.NodeProto:
        return helper.make_node("Add", [left, right], [made])

    nodes = [relu("x", "a"), relu("a", "b"), relu("a", "c"), add("b", "c", "d"), relu("d", "e"), add("e", "d", "f")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "f")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_waists_are_where_no_branch_runs_past() -> None:
    assert waists(Graph(chain())) == {"a", "d", "f"}


def test_cut_points_prefer_waists_and_hold_the_last() -> None:
    graph = Graph(chain())
    assert cut_points(graph, ["a", "b", "c", "d", "e"], 5) == ["a", "b", "c", "d", "e"]
    assert cut_points(graph, ["a", "b", "c", "d", "e"], 2) == ["a", "e"]
    assert cut_points(graph, ["b", "c"], 1) == ["c"]


def test_values_that_are_no_numbers_have_parted(exact: onnx.ModelProto) -> None:
    def run(images: Array, tensors: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        right = inner_session(exact, tensors).run(list(tensors), {"input": images})
        return {name: value * np.float32("nan") for name, value in zip(tensors, right, strict=True)}

    found = engine_divergence(exact, exact, IMAGES, lambda _: run)
    assert found.first is not None
    assert found.first.tensor == computed(Graph(exact))[0]
