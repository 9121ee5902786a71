"""Cross-layer equalization: the same network with channels of like size.

M. Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1: what lies
between two layers is linear in each channel as long as the factor is above zero, so a channel may be made smaller by
the first layer and larger again by the second. One scale for a whole activation then serves all of its channels. A
ReLU6 is not linear in this sense; the paper replaces it by a ReLU, and we leave such pairs alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from convoynet.exporter.graph.onnx_graph import Graph, attribute
from convoynet.exporter.quantization.qdq_placement import has_weights, output_axis

# f(s * x) = s * f(x) for every s > 0, in each channel by itself.
_HOMOGENEOUS = {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
# A pass over a chain of depthwise layers undoes some of the last one; the ranges settle geometrically.
_MAX_PASSES = 40
_SETTLED = 1e-4


@dataclass(frozen=True)
class Chain:
    """Layers one behind the other that can be equalized.

    Attributes:
        layers: first outputs of the Conv and Gemm nodes, in their order; each feeds the next one alone.
        between: the activations between them, which equalization changes.
    """

    layers: tuple[str, ...]
    between: tuple[str, ...]


def chains(model: onnx.ModelProto) -> list[Chain]:
    """The longest chains of two or more layers, in the order of the graph."""
    graph = Graph(model)
    following = {node.output[0]: pair for node in graph if (pair := _next_layer(graph, node)) is not None}
    continued = {layer for layer, _ in following.values()}
    found = []
    for first in following:
        if first in continued:
            continue
        layers, between = [first], []
        while layers[-1] in following:
            layer, tensors = following[layers[-1]]
            layers.append(layer)
            between += tensors
        found.append(Chain(tuple(layers), tuple(between)))
    return found


def equalize(model: onnx.ModelProto, over: Sequence[Chain] | None = None) -> onnx.ModelProto:
    """Give the two layers around each channel weights of equal range.

    With r1 the largest weight that makes a channel and r2 the largest that reads it, both become sqrt(r1 * r2). A
    channel that nothing makes or reads stays as it is. Chains of three and more layers are repeated until they settle.

    Args:
        model: a float graph; it is not changed.
        over: which of `chains(model)`; None means all.

    Returns:
        A graph that computes the same, up to the rounding of float32, with other weights and biases.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    for chain in chains(model) if over is None else over:
        nodes = [graph.producers[layer] for layer in chain.layers]
        weights = [graph.constant(node.input[1]).astype(np.float64) for node in nodes]
        total = _settle(nodes, weights)
        for index, node in enumerate(nodes):
            _store(graph, node.input[1], weights[index])
            if index < len(total) and len(node.input) > 2 and node.input[2]:
                _store(graph, node.input[2], graph.constant(node.input[2]) / total[index])
    return made


def _settle(nodes: list[onnx.NodeProto], weights: list[np.ndarray]) -> list[np.ndarray]:
    """Equalize the weights in place; the factors, float64 [channels], by which each but the last layer was divided."""
    total = [np.ones(_channels(node, array)) for node, array in zip(nodes[:-1], weights, strict=False)]
    for _ in range(_MAX_PASSES):
        largest = 0.0
        for index in range(len(total)):
            made, read = _by_output(nodes[index], weights[index]), _by_input(nodes[index + 1], weights[index + 1])
            leading = 2 if nodes[index + 1].op_type == "Conv" else 1
            first, second = _largest(made, 1), _largest(read, leading)
            usable = (first > 0) & (second > 0)
            step = np.sqrt(np.where(usable, first, 1.0) / np.where(usable, second, 1.0))
            made /= step.reshape(-1, *[1] * (made.ndim - 1))
            read *= step.reshape(*read.shape[:leading], *[1] * (read.ndim - leading))
            total[index] *= step
            largest = max(largest, float(np.abs(np.log(step)).max()))
        if largest < _SETTLED or len(total) == 1:
            break
    return total


def _next_layer(graph: Graph, node: onnx.NodeProto) -> tuple[str, list[str]] | None:
    """The layer that alone reads what `node` makes, and the tensors on the way; None where there is none."""
    if not _editable(graph, node):
        return None
    tensor, way = node.output[0], [node.output[0]]
    while tensor not in graph.outputs and len(graph.readings.get(tensor, ())) == 1:
        (reader,) = graph.readers(tensor)
        if reader.op_type in _HOMOGENEOUS and len(reader.output) == 1:
            tensor = reader.output[0]
            way.append(tensor)
            continue
        fits = _editable(graph, reader) and reader.input[0] == tensor
        if fits and _inputs(reader, graph.constant(reader.input[1])) == _channels(node, graph.constant(node.input[1])):
            return reader.output[0], way
        return None
    return None


def _editable(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether `node` is a Conv or Gemm whose stored weights and bias are its own."""
    if node.op_type not in {"Conv", "Gemm"} or not has_weights(graph, node):
        return False
    return all(len(graph.readings[name]) == 1 and name not in graph.outputs for name in node.input[1:] if name)


def _channels(node: onnx.NodeProto, weights: np.ndarray) -> int:
    return int(weights.shape[output_axis(node)])


def _inputs(node: onnx.NodeProto, weights: np.ndarray) -> int:
    if node.op_type == "Conv":
        return int(weights.shape[1]) * int(attribute(node, "group", 1))
    return int(weights.shape[1 - output_axis(node)])


def _by_output(node: onnx.NodeProto, weights: np.ndarray) -> np.ndarray:
    """A view of the weights with the output channels first."""
    return np.moveaxis(weights, output_axis(node), 0)


def _by_input(node: onnx.NodeProto, weights: np.ndarray) -> np.ndarray:
    """A view with the input channels first: [channels, outputs], of a Conv [groups, channels of it, outputs, ...]."""
    if node.op_type == "Gemm":
        return np.moveaxis(weights, 1 - output_axis(node), 0)
    groups = int(attribute(node, "group", 1))
    return np.moveaxis(weights.reshape(groups, -1, *weights.shape[1:]), 2, 1)


def _largest(weights: np.ndarray, leading: int) -> np.ndarray:
    """The largest magnitude of each channel, which the leading axes count: float64 [channels]."""
    values: np.ndarray = np.abs(weights).max(axis=tuple(range(leading, weights.ndim))).reshape(-1)
    return values


def _store(graph: Graph, name: str, value: np.ndarray) -> None:
    graph.initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
