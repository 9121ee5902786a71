"""Q/DQ placement for TensorRT 10 and 11.

TensorRT fuses Conv, ReLU and a residual Add into one INT8 kernel where Q/DQ pairs stand on the inputs of Conv, Gemm
and MatMul and on the skip operand of the Add, and nowhere else: a pair behind the Conv would end the fusion. Scales
are symmetric and the zero point is 0, since TensorRT knows no other.
"""

from collections import deque
from collections.abc import Collection
from math import prod

import onnx

from convoynet.exporter.graph.onnx_graph import Edge, Graph, attribute, shapes
from convoynet.exporter.quantization.qdq_placement import Groups, Placement, has_weights, prediction_heads

# Below this many channels an INT8 kernel pads more than it computes.
_MIN_CHANNELS = 16
# INT8 tensors are laid out in groups of channels.
_CHANNEL_MULTIPLE = 8
_MIN_DEPTHWISE_KERNEL = 3
# NVIDIA's own quantizer gives FP8 to convolutions of more channels than this, both in and out of a group ...
_FP8_CHANNELS = 16
# ... and of kernels with no more elements than this: ResNet's first, 7 x 7, is not one.
_FP8_KERNEL = 32


def place_fp8(graph: Graph, keep_float: Collection[str] = ()) -> Placement:
    """Choose what is quantized to FP8: inputs and weights of layers alone.

    TensorRT's pools, concatenations and additions have no FP8: a pair before one would be rounding for nothing.
    """
    weighted = [node for node in _layers(graph, keep_float) if _fits_fp8(graph, node)]
    edges = tuple(Edge(node.input[0], node.output[0], 0) for node in weighted)
    return Placement(edges, tuple(node.output[0] for node in weighted))


def place(graph: Graph, keep_float: Collection[str] = ()) -> Placement:
    """Choose what is quantized for TensorRT.

    Args:
        graph: a float graph.
        keep_float: first outputs of layers with weights that stay float and read float.
    """
    weighted = _layers(graph, keep_float)
    edges = {Edge(node.input[0], node.output[0], 0) for node in weighted}
    edges |= set(_skip_operands(graph, {node.output[0] for node in weighted}))
    groups = Groups()
    quantized = {edge.tensor for edge in edges}
    for node in reversed(list(graph)):  # backwards, since a Concat may feed a Concat or a pool
        if node.op_type == "Concat" and node.output[0] in quantized:
            shared = graph.activations(node)
            edges |= {edge for name in shared for edge in graph.readings[name] if edge.reader == node.output[0]}
            quantized |= set(shared)
            groups.join((*shared, node.output[0]))
    for node in graph:
        if node.op_type not in {"MaxPool", "AveragePool"} or node.input[0] not in quantized:
            continue
        readers = {edge.reader for edge in graph.readings.get(node.output[0], [])}
        if readers and readers <= set(keep_float):
            continue
        # The pool reads what its neighbours read, so that the tensor exists in INT8 alone.
        edges.add(Edge(node.input[0], node.output[0], 0))
        if node.op_type == "MaxPool" and node.output[0] in quantized:
            groups.join((node.input[0], node.output[0]))
    ordered = [edge for node in graph for name in node.input for edge in graph.readings[name] if edge in edges]
    return Placement(tuple(dict.fromkeys(ordered)), tuple(node.output[0] for node in weighted), groups.sets())


def _layers(graph: Graph, keep_float: Collection[str]) -> list[onnx.NodeProto]:
    kept = {*prediction_heads(graph), *keep_float}
    layers = [node for node in graph if has_weights(graph, node) and node.output[0] not in kept]
    return [node for node in layers if _worthwhile(graph, node)]


def _fits_fp8(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type != "Conv":
        return node.op_type != "ConvTranspose"  # TensorRT has no kernel
    outputs, inputs, *kernel = graph.initializers[node.input[1]].dims
    return min(outputs, inputs) > _FP8_CHANNELS and prod(kernel) <= _FP8_KERNEL


def _worthwhile(graph: Graph, node: onnx.NodeProto) -> bool:
    dims = list(graph.initializers[node.input[1]].dims)
    if node.op_type == "ConvTranspose":
        # TensorRT quantizes none with groups.
        return attribute(node, "group", 1) == 1 and min(dims[:2]) >= _MIN_CHANNELS
    if node.op_type != "Conv":
        return min(dims) >= _MIN_CHANNELS
    group = int(attribute(node, "group", 1))
    outputs, inputs, kernel = dims[0], dims[1] * group, dims[2:]
    aligned = [channels % _CHANNEL_MULTIPLE == 0 for channels in (inputs, outputs)]
    if group > 1 and group == inputs:
        return aligned[1] and min(kernel) >= _MIN_DEPTHWISE_KERNEL
    if min(inputs, outputs) >= _MIN_CHANNELS:
        return True
    first = node.input[0] in graph.inputs or not _behind_weights(graph, node.input[0])
    wide = first or max(inputs, outputs) >= _MIN_CHANNELS
    return group == 1 and any(aligned) and len(set(kernel)) == 1 and wide


def _behind_weights(graph: Graph, tensor: str) -> bool:
    """Whether a layer with weights comes before `tensor`."""
    return any(
        has_weights(graph, graph.producers[name]) for name in _distances(graph, tensor) if name in graph.producers
    )


def _skip_operands(graph: Graph, weighted: set[str]) -> list[Edge]:
    """One edge for each residual Add whose other operand is a quantized Conv that it can be fused with."""
    known = shapes(graph.model)
    edges = []
    for node in graph:
        activations = graph.activations(node)
        if node.op_type != "Add" or len(set(activations)) != 2:
            continue
        if known.get(activations[0]) != known.get(activations[1]):
            continue  # a broadcast, not a residual
        branches = [
            name
            for name in activations
            if name in weighted and graph.producer_type(name) == "Conv" and len(graph.readers(name)) == 1
        ]
        if branches:
            branch = branches[0] if len(branches) == 1 else _longer_path(graph, branches[0], branches[1])
            skip = next(name for name in activations if name != branch)
            edges.append(Edge(skip, node.output[0], list(node.input).index(skip)))
    return edges


def _longer_path(graph: Graph, left: str, right: str) -> str:
    """The operand that is farther from the nearest common ancestor: the branch with the convolutions."""
    from_left, from_right = _distances(graph, left), _distances(graph, right)
    common = [name for name in from_left if name in from_right]
    if not common:
        return left
    nearest = min(common, key=lambda name: from_left[name] + from_right[name])
    return right if from_right[nearest] > from_left[nearest] else left


def _distances(graph: Graph, tensor: str) -> dict[str, int]:
    """How many nodes lie between `tensor` and each tensor that it depends on; 0 for itself."""
    distances = {tensor: 0}
    queue = deque([tensor])
    while queue:
        name = queue.popleft()
        producer = graph.producers.get(name)
        for source in graph.activations(producer) if producer is not None else ():
            if source not in distances:
                distances[source] = distances[name] + 1
                queue.append(source)
    return distances
