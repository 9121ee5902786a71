"""TensorRT builds every network of the zoo in float32, FP16 and INT8, and reads the precisions that the graph says.

Some networks run by default, and small ones of the blocks of some others; all of them with `-m slow`. Weights are
random and ranges are made up: neither matters to the parser and to the builder. Engines are built and not run, which
needs a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace

import onnx
import pytest
import torch

from convoynet.exporter import archs
from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.float16 import float32_nodes, to_fp16
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import layers as weighted_layers
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.tensorrt.build import BuiltEngine, build
from convoynet.exporter.tensorrt.layers import Layer
from tests.exporter.engines import needs_tensorrt
from tests.exporter.studies.small_families import small

pytestmark = needs_tensorrt
# Residual, dense, Inception-like, and the smallest; the small networks of other tests have the rest.
REPRESENTATIVES = {"lenet5", "resnet20", "squeezenet1_1"}
# Square inputs of so many pixels.
SMALL = {"fcn8s": 40, "googlenet-2014": 64, "pspnet": 48, "unet": 108}
OPTIONS = BuildOptions((Profile(1, 2, 4),))
SIDES = {"segmentation": 192, "detection": 320}
FP32, FP16, INT8 = "fp32", "fp16", "int8"
WEIGHTED = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"}
# These make or move numbers, and an ArgMax reads the logits, which go out in float32.
HOLDING = {"CONSTANT", "CAST", "SHUFFLE", "QUANTIZE", "DEQUANTIZE", "TOPK"}


def graph_of(name: str) -> onnx.ModelProto:
    """The float32 graph of a network of the zoo, with random weights, as `convoy export` writes it for a GPU."""
    arch = archs.get(name)
    return traced(arch, SIDES.get(arch.task))


def traced(arch: archs.Arch, side: int | None) -> onnx.ModelProto:
    if side is not None:
        arch = replace(arch, preprocess=replace(arch.preprocess, size=(side, side), resize=side))
    torch.manual_seed(0)
    return onnx_from_torch(arch.build(arch.num_classes).eval(), arch.preprocess, task=arch.task, uint8_input=True)


def ranges_of(graph: onnx.ModelProto) -> dict[str, Range]:
    tensors = [value.name for value in graph.graph.input] + [name for node in graph.graph.node for name in node.output]
    return {name: Range(-4.0, 4.0) for name in tensors}


def engine_of(graph: onnx.ModelProto) -> BuiltEngine:
    engine = build(graph.SerializeToString(), OPTIONS, Quiet())
    assert len(engine.content) > 10_000
    return engine


def computing(engine: BuiltEngine) -> Iterator[Layer]:
    """The layers of floating-point or quantized numbers that compute."""
    kinds = {FP32, FP16, INT8}
    yield from (layer for layer in engine.layers if layer.type not in HOLDING and layer.precision in kinds)


def weighted(engine: BuiltEngine) -> dict[str, Layer]:
    return {layer.name: layer for layer in engine.layers if layer.type in WEIGHTED}


def node_names(graph: onnx.ModelProto) -> dict[str, str]:
    """First output of a node -> its name, which is that of TensorRT's layer."""
    return {node.output[0]: node.name for node in graph.graph.node}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in archs.names()],
)
def test_every_precision_of_every_network(name: str) -> None:
    exact = graph_of(name)

    whole = engine_of(exact)
    assert {layer.precision for layer in computing(whole)} == {FP32}

    half = to_fp16(exact)
    kept = {entry.split(" ", 1)[1] for entry in float32_nodes(half)}
    wide = {layer.name for layer in computing(engine_of(half)) if layer.precision == FP32}
    assert {name for name in wide if base_name(name, kept) not in kept} == set()

    eight = quantize(exact, ranges_of(exact), "gpu")
    found = weighted(engine_of(eight))
    asked = {node_names(exact)[output] for output in weighted_layers(exact, "gpu")}
    assert asked
    graph = Graph(eight)
    pairs = {
        node.name
        for node in graph
        if node.name in asked and [graph.producer_type(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
    }
    assert pairs == asked
    for layer_name, layer in found.items():
        if layer_name in asked:
            assert layer.inputs[:2] == (INT8, INT8), layer
        elif layer.type == "CONVOLUTION":
            assert layer.inputs[:1] == (FP32,), layer
    assert asked <= found.keys()


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in ("googlenet-2014", "unet") else pytest.mark.slow) for family in SMALL],
)
def test_the_blocks_of_large_networks_in_int8(family: str) -> None:
    exact = traced(small(family), SMALL[family])
    found = weighted(engine_of(quantize(exact, ranges_of(exact), "gpu")))
    asked = {node_names(exact)[output] for output in weighted_layers(exact, "gpu")}
    assert asked
    assert {name for name in asked if found[name].inputs[:2] != (INT8, INT8)} == set()


def base_name(name: str, kept: set[str]) -> str:
    """The node of a layer: TensorRT numbers the further layers of a node."""
    return name if name in kept else name.rpartition("_")[0]
