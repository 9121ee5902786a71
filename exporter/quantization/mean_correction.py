"""All biases moved at once, so that rounding a layer's input and weights leaves its mean output where it was.

The empirical bias correction of M. Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.2 and its appendix, for every layer by itself: its quantized twin reads what the float layer
reads. So one run of one graph tells all the shifts, and no layer waits for those before it, as in `bias_correction`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from convoynet.exporter.graph.onnx_graph import Graph, reads, replace, shapes
from convoynet.exporter.quantization.qdq_placement import has_weights, output_axis
from convoynet.exporter.running.runtime import inner_session

_BIAS = 2
# Images of a run: a graph with twins holds twice the weights and activations of its network.
_ROWS = 2


@dataclass(frozen=True)
class _Layer:
    """A quantized layer, and where what is added to its output stands.

    Attributes:
        name: its first output.
        adds: first output of the node that adds: the layer, or an Add behind a MatMul.
        index: of the bias among the inputs of that node, which may have fewer.
        channels: how many numbers that takes.
        axes: of the layer's output, what the mean of a row is taken over.
    """

    name: str
    adds: str
    index: int
    channels: int
    axes: tuple[int, ...]


def mean_shifts(model: onnx.ModelProto, quantized: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    """By how much the float layers' mean outputs lie above those of their quantized twins.

    Args:
        model: the float graph.
        quantized: what `quantize` made of it.
        images: what the graph's input takes, [n, ...].

    Returns:
        First output -> float64 [channels], for every quantized layer that has a bias of its own, or can get one.
    """
    layers = _layers(model, quantized)
    if not layers:
        return {}
    outputs = [f"{layer.name}.shift" for layer in layers]
    session = inner_session(_beside(model, quantized, layers), outputs)
    name = session.get_inputs()[0].name
    sums = [np.zeros(layer.channels) for layer in layers]
    rows = np.zeros(len(layers))
    for at in range(0, len(images), _ROWS):
        for index, shift in enumerate(session.run(outputs, {name: images[at : at + _ROWS]})):
            sums[index] += shift.sum(axis=0, dtype=np.float64)
            rows[index] += len(shift)
    return {layer.name: total / count for layer, total, count in zip(layers, sums, rows, strict=True)}


def shift_biases(model: onnx.ModelProto, shifts: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Add to the biases of layers.

    Args:
        model: the float graph that `mean_shifts` was given, or one that this function made of it; it is not changed.
        shifts: some of what that function returned.

    Returns:
        The graph of the same nodes with other biases. A layer without one gets one, and of a bias that others read as
        well a copy of its own.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    for name, shift in shifts.items():
        layer = _layer(graph, graph.producers[name])
        assert layer is not None
        node = graph.producers[layer.adds]
        stored = node.input[layer.index] if len(node.input) > layer.index else ""
        before = graph.constant(stored) if stored else np.zeros(layer.channels, np.float32)
        bias = (before.astype(np.float64) + shift.reshape(before.shape)).astype(np.float32)
        if stored and len(graph.readings[stored]) == 1:
            graph.initializers[stored].CopyFrom(numpy_helper.from_array(bias, stored))
            continue
        own = f"{name}.own_bias"
        made.graph.initializer.append(numpy_helper.from_array(bias, own))
        node.input.extend([""] * (layer.index + 1 - len(node.input)))
        node.input[layer.index] = own
    graph.drop_unused_constants()
    return made


def _layers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> list[_Layer]:
    """In the order of the graph."""
    graph, known = Graph(model), shapes(model)
    made = {name for node in quantized.graph.node for name in node.output}
    nodes = [node for node in graph if f"{node.output[0]}.weight.dq" in made]
    found = (_layer(graph, node, len(known.get(node.output[0], ()))) for node in nodes if has_weights(graph, node))
    return [layer for layer in found if layer is not None]


def _layer(graph: Graph, node: onnx.NodeProto, rank: int = 0) -> _Layer | None:
    """None where the bias is not one number for each channel, or there is no place for one; `rank` is the output's."""
    name, dims = node.output[0], list(graph.initializers[node.input[1]].dims)
    if node.op_type == "MatMul":
        channels, axes = dims[1], tuple(range(1, rank - 1))
        readers = graph.readers(name)
        if len(readers) != 1 or readers[0].op_type != "Add" or name in graph.outputs or rank == 1:
            return None
        adds, index = readers[0], 1 - list(readers[0].input).index(name)
        if not graph.is_constant(adds.input[index]):
            return None
    else:
        adds, index, axes = node, _BIAS, () if node.op_type == "Gemm" else tuple(range(2, len(dims)))
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        channels = dims[1] * groups if node.op_type == "ConvTranspose" else dims[output_axis(node)]
    stored = adds.input[index] if len(adds.input) > index else ""
    if stored:
        shape = list(graph.initializers[stored].dims)
        # Of all other shapes none runs over the channels, the last axis of a Gemm's or a MatMul's output.
        if shape[-1:] != [channels] or int(np.prod(shape)) != channels:
            return None
    return _Layer(name, adds.output[0], index, channels, axes)


def _beside(model: onnx.ModelProto, quantized: onnx.ModelProto, layers: list[_Layer]) -> onnx.ModelProto:
    """The float graph, and beside each layer its twin with rounded input and weights, and the shift of the means."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(quantized)
    known = {*Graph(model).inputs, *Graph(model).producers, *Graph(model).initializers}
    of_layer = {layer.name: layer for layer in layers}
    twins = {name: node for node in graph for name in node.input[1:2]}
    axes: dict[tuple[int, ...], str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        layer = of_layer.get(node.output[0])
        if layer is None:
            continue
        twin, rounded = onnx.NodeProto(), f"{layer.name}.rounded"
        twin.CopyFrom(twins[f"{layer.name}.weight.dq"])
        twin.name = rounded
        replace(twin.output, [rounded])
        for name in twin.input:
            nodes += _needed(graph, name, known, made)
        if layer.axes not in axes:
            axes[layer.axes] = f"axes.{len(axes)}.of_means"
            numbers = np.array(layer.axes, np.int64)
            made.graph.initializer.append(numpy_helper.from_array(numbers, axes[layer.axes]))
        nodes += [twin, *_difference(layer, rounded, axes[layer.axes])]
    replace(made.graph.node, nodes)
    return made


def _needed(graph: Graph, name: str, known: set[str], made: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the quantized graph that make `name` of tensors that are `known`, which then it is as well."""
    if not name or name in known:
        return []
    known.add(name)
    if graph.is_constant(name):
        made.graph.initializer.append(graph.initializers[name])
        return []
    node = graph.producers[name]
    return [*(part for read in reads(node) for part in _needed(graph, read, known, made)), node]


def _difference(layer: _Layer, rounded: str, axes: str) -> list[onnx.NodeProto]:
    """What makes the shift of each row: means where there are places to take them over, then one minus the other."""
    sides, nodes = [layer.name, rounded], []
    if layer.axes:
        means = [f"{side}.mean" for side in sides]
        pairs = zip(sides, means, strict=True)
        nodes = [helper.make_node("ReduceMean", [side, axes], [mean], name=mean, keepdims=0) for side, mean in pairs]
        sides = means
    shift = f"{layer.name}.shift"
    return [*nodes, helper.make_node("Sub", sides, [shift], name=shift)]
