"""Where a network looks last: the map of features that its classes are made from, and what is between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_given import opset_of
from convoynet.exporter.graph.onnx_graph import Graph, attribute, before, element_types, reads, shapes

Shape = tuple[int | None, ...]

# What makes probabilities of scores: a class is explained by its score, which the other classes have no part in.
_PROBABILITIES = ("Softmax", "LogSoftmax", "Sigmoid")
_COPIES = ("Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_MAP_RANK, _ROW_RANK = 4, 2
_SHAPE = onnx.TensorProto.INT64
WHOLE = (_SHAPE, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
"""Types of shapes, indices and conditions, which have no gradient."""
# Of maps with the channels behind the batch; others may have moved them.
_OF_MAPS = (
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Resize", "LRN",
    "InstanceNormalization", "GroupNormalization", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
_MOVING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Head:
    """What makes scores of the last map.

    Attributes:
        graph: the whole graph.
        output: the graph's output of scores, or of the probabilities made of them.
        score: the tensor of scores, [batch, classes] but for axes of one.
        features: the map in float, [batch, channels, height, width].
        source: the tensor that the gradient is taken at: the map, or the integers that it is read from.
        nodes: the nodes between the two, in the order of the graph.
        shapes: of every tensor, as far as they are known.
        types: element types of the tensors, likewise.
    """

    graph: Graph
    output: str
    score: str
    features: str
    source: str
    nodes: tuple[onnx.NodeProto, ...]
    shapes: Mapping[str, Shape]
    types: Mapping[str, int]

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.shapes[self.output][1] or 0

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return opset_of(self.graph.model)

    @property
    def channels(self) -> int:
        """Those of the map."""
        return self.shapes[self.features][1] or 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the map."""
        _, _, height, width = self.shapes[self.features]
        return height or 0, width or 0


def head_of(model: onnx.ModelProto, output: str) -> Head:
    """Find the last map of features that all of the scores are made from.

    The last is the one behind which there is no place any more: what the pool or the first fully connected layer reads.

    Args:
        model: a graph, quantized or not.
        output: its output of scores.

    Raises:
        BadInput: there is none: no convolution, or the scores are made from several maps, or of unknown size.
    """
    graph = Graph(model)
    known, types = facts_of(graph)
    if output not in graph.producers:
        raise BadInput(f"the graph has no output {output!r}: its outputs are {', '.join(graph.outputs)}")
    row = known.get(output, ())
    if len(row) != _ROW_RANK or not row[1]:
        raise BadInput(f"output {output!r} has no row of classes for each image: an explanation is of one class")
    score = score_of(graph, output)
    # Walked from the scores to the image: where one tensor alone is open, all that the scores are made from is in it.
    opened = {score}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(list(graph)):
        if opened.isdisjoint(node.output):
            continue
        if len(opened) == 1 and _is_map(graph, node, known) and (features := _in_float(graph, node.output[0], types)):
            if not _convolved(graph, features):
                break
            return Head(graph, output, score, features, node.output[0], tuple(reversed(nodes)), known, types)
        opened.difference_update(node.output)
        # Shapes and indices, which a graph may compute of a map, are no features.
        opened.update(name for name in reads(node) if graph.is_computed(name) and types.get(name) != _SHAPE)
        nodes.append(node)
    raise BadInput(
        f"{_name(model)} has no feature map: its {output} are not made from one map of features behind convolutions, "
        f"and an explanation says where in that map the evidence lies{_why_not(nodes, known, types)}"
    )


def _why_not(nodes: Sequence[onnx.NodeProto], known: Mapping[str, Shape], types: Mapping[str, int]) -> str:
    """What keeps the last map from being one, where it is its size or its type."""
    for node in nodes:
        name, kind = node.output[0], types.get(node.output[0])
        shape = known.get(name, ())
        if node.op_type not in _OF_MAPS or len(shape) != _MAP_RANK or shape[2:] == (1, 1):
            continue
        if not all(shape[1:]):
            return f"; {name!r} has no fixed size: fix the height and width of the image in the file's input"
        if kind not in (*_FLOATS, onnx.TensorProto.UINT8, onnx.TensorProto.INT8, None):
            told = onnx.TensorProto.DataType.Name(kind)
            return (
                f"; {name!r} is {told}, and features are FLOAT, FLOAT16 or BFLOAT16: export the network in one of these"
            )
    return ""


def facts_of(graph: Graph) -> tuple[Mapping[str, Shape], Mapping[str, int]]:
    """The shapes and the element types of tensors, as far as they are known."""
    return _completed(graph, shapes(graph.model)), element_types(graph.model)


def _completed(graph: Graph, known: dict[str, Shape]) -> dict[str, Shape]:
    """Shapes, with those of rows that a graph makes by a computed shape: the weights of the layer behind tell them."""
    for node in reversed(list(graph)):
        if not node.input or node.input[0] in known:
            continue
        name, made = node.input[0], known.get(node.output[0])
        stored = graph.initializers.get(node.input[1]) if len(node.input) > 1 else None
        layer = node.op_type == "Gemm" or (node.op_type == "MatMul" and made is not None and len(made) == _ROW_RANK)
        if layer and stored is not None and len(stored.dims) == _ROW_RANK and not attribute(node, "transA", 0):
            known[name] = (None, stored.dims[attribute(node, "transB", 0)])
        elif node.op_type in (*_COPIES, "Relu") and made is not None:
            known[name] = made
    return known


def _in_float(graph: Graph, tensor: str, types: Mapping[str, int]) -> str:
    """The tensor, or where it has integers what makes numbers of them for whoever reads them; else empty."""
    if types.get(tensor) in _FLOATS:
        return tensor
    return next((node.output[0] for node in graph.readers(tensor) if node.op_type == "DequantizeLinear"), "")


def _name(model: onnx.ModelProto) -> str:
    return f"the network {model.graph.name!r}" if model.graph.name not in ("", "main_graph") else "the network"


def score_of(graph: Graph, output: str) -> str:
    """The tensor of scores, behind which there are copies and probabilities alone."""
    name = behind = output
    while (node := graph.producers.get(name)) is not None and node.op_type in (*_COPIES, *_PROBABILITIES, *_MOVING):
        name = node.input[0]
        if node.op_type in _PROBABILITIES:
            behind = name
    return behind


def _is_map(graph: Graph, node: onnx.NodeProto, known: Mapping[str, Shape]) -> bool:
    """Whether a node makes a map with places in it, the channels in front of them."""
    shape = known.get(node.output[0], ())
    if len(shape) != _MAP_RANK or not all(shape[1:]):
        return False
    height, width = shape[2:]
    if (height or 0) * (width or 0) == 1:
        return False
    # What is element by element keeps the order of the axes that it reads.
    seen, left = set(), [node]
    while left:
        each = left.pop()
        if each.op_type in _OF_MAPS:
            return True
        if each.op_type in _MOVING or id(each) in seen:
            continue
        seen.add(id(each))
        left += [graph.producers[name] for name in each.input if name in graph.producers]
    return False


def _convolved(graph: Graph, features: str) -> bool:
    return any(node.op_type == "Conv" for node in before(graph, [features]))
