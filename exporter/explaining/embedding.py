"""What a classifier makes its scores of, as an output of the graph: the embedding of each image."""

from collections.abc import Mapping
from math import prod

import onnx
from onnx import TensorProto, helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.feature_map import Head, Shape, facts_of, score_of
from convoynet.exporter.explaining.rules import PLACES, ROW_RANK
from convoynet.exporter.explaining.writer import Writer, require_room
from convoynet.exporter.graph.onnx_from_torch import BATCH_AXIS, OUTPUT_NAME
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.outputs_asked import FEATURES

# How the names of what is added begin: weights of many networks have names that begin with the output's own.
_PREFIX = "embedding_of_image"
_LAYERS = ("Gemm", "MatMul", "Conv")
_MOVING = (
    "Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Transpose",
)  # fmt: skip
# What may stand between the last layer and the scores beside it.
_SMALL = (
    "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Max", "Min", "Clip", "Relu", "BatchNormalization", "ReduceMean",
    "ReduceSum", "GlobalAveragePool", "AveragePool", "GlobalMaxPool", "MaxPool",
)  # fmt: skip
_MAP_RANK = 4


def with_features(model: onnx.ModelProto, output: str = OUTPUT_NAME) -> onnx.ModelProto:
    """A copy of a graph with the further output "features": what its last layer with weights reads.

    Where that layer is a convolution of a map, as in networks that end in maps of classes, these are the means over the
    places of the map. The nodes that are there stay as they are, quantized or not, and so do their results.

    Args:
        model: a graph of any precision; it is not changed.
        output: of scores or probabilities, [batch, classes].

    Returns:
        A checked graph. Its features are [batch, size], float32.

    Raises:
        BadInput: there is no one last layer, or it reads the image itself; or the graph has such an output already.
    """
    require_room(model, [FEATURES], _PREFIX)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    head = last_layer_of(made, output)
    writer = Writer(head, _PREFIX)
    value = writer.value(head.features)
    if _is_map(head):
        value = writer.add("ReduceMean", [value, writer.whole(*PLACES)], keepdims=0)
    size = features_size(head)
    writer.add("Reshape", [value, writer.whole(-1, size)], FEATURES)
    shape: list[str | int | None] = [head.shapes[output][0] or BATCH_AXIS, size]
    made.graph.output.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, shape))
    onnx.checker.check_model(made)
    return made


def features_size(head: Head) -> int:
    """How many features an image has."""
    sizes = head.shapes[head.features][1:]
    return prod(size or 0 for size in (sizes[:1] if _is_map(head) else sizes))


def _is_map(head: Head) -> bool:
    return len(head.shapes[head.features]) == _MAP_RANK


def last_layer_of(model: onnx.ModelProto, output: str) -> Head:
    """The last layer with weights, as what makes scores of what it reads.

    Raises:
        BadInput: there is none, or not one alone.
    """
    graph = Graph(model)
    known, types = facts_of(graph)
    row = known.get(output, ())
    if output not in graph.producers:
        raise BadInput(f"the graph has no output {output!r}: its outputs are {', '.join(graph.outputs)}")
    if len(row) != ROW_RANK or not row[1]:
        raise BadInput(f"output {output!r} has no row of classes for each image: features are those of a classifier")
    score = score_of(graph, output)
    layer, read = _last_layer(graph, score, known)
    shape = known.get(read, ())
    if len(shape) < ROW_RANK or not all(shape[1:] if len(shape) < _MAP_RANK else shape[1:2]):
        raise BadInput(
            f"{_what(layer)}, the last layer, reads a tensor of unknown size: there are no features of one size"
        )
    if _is_input(graph, read):
        raise BadInput(f"{_what(layer)}, the only layer, reads the image itself: the network has no features")
    return Head(graph, output, score, read, read, (layer,), known, types)


def _last_layer(graph: Graph, score: str, known: Mapping[str, Shape]) -> tuple[onnx.NodeProto, str]:
    """The node behind which there are no weights but a bias or a scale, and the tensor that it reads."""
    name = score
    while (node := graph.producers.get(name)) is not None:
        read = [each for each in node.input if each and graph.is_computed(each)]
        if node.op_type in _MOVING:
            name = node.input[0]
        elif len(read) != 1 or node.op_type not in (*_LAYERS, *_SMALL):
            raise BadInput(
                f"the scores are made by {_what(node)}, and features are what one last layer of weights reads: name a "
                "layer with --outputs NAME=LAYER"
            )
        elif node.op_type in _LAYERS or any(_is_matrix(graph, each, known) for each in node.input if each not in read):
            return node, read[0]
        else:
            name = read[0]
    raise BadInput("the scores are the image itself: the network has no features")


def _is_matrix(graph: Graph, stored: str, known: Mapping[str, Shape]) -> bool:
    """Whether stored numbers are more than a bias or a scale, as the codes are that LeNet-5 measures distances to."""
    shape = tuple(graph.initializers[stored].dims) if graph.is_constant(stored) else known.get(stored, ())
    return sum(size != 1 for size in shape) > 1


def _is_input(graph: Graph, tensor: str) -> bool:
    """Whether there are but copies between the image and a tensor."""
    while (node := graph.producers.get(tensor)) is not None and node.op_type in _MOVING:
        tensor = node.input[0]
    return tensor in graph.inputs


def _what(node: onnx.NodeProto) -> str:
    return f"{node.op_type} ({node.name or node.output[0]!r})"
