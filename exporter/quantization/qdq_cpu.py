"""Q/DQ placement for CPUs: ONNX Runtime on x86, and OpenVINO.

ONNX Runtime turns a node between DequantizeLinear and QuantizeLinear into an integer kernel, so here every
activation between such nodes is quantized, both operands of a residual Add and its result included. Activations are
UINT8 with a zero point: after a ReLU all 8 bits count, and the ReLU itself disappears into the QuantizeLinear.

An integer kernel writes integers, and becomes a float kernel if anybody reads its result in float. So a layer that is
kept in float reads float only where no integer kernel makes what it reads.
"""

from collections.abc import Collection

import onnx

from convoynet.exporter.graph.onnx_graph import CAPTURED, Graph
from convoynet.exporter.quantization.qdq_placement import Groups, Placement, has_weights, only_picked, prediction_heads

# A QuantizeLinear that cuts off at the same bounds does the work of these.
ABSORBED = {"Relu", "Clip"}
# Integer kernels of one or more activations; those of _KEEP_SCALE move or select values and leave the scale alone.
_KEEP_SCALE = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
_JOINS = {"Add", "Concat", "AveragePool", "GlobalAveragePool", "Mul", *_KEEP_SCALE}


def place(graph: Graph, keep_float: Collection[str] = ()) -> Placement:
    """Choose what is quantized for a CPU.

    Args:
        graph: a float graph.
        keep_float: first outputs of layers with weights that stay float.
    """
    kept = {*prediction_heads(graph), *keep_float}
    weighted = [node for node in graph if has_weights(graph, node) and node.output[0] not in kept]
    answers = _answers(graph)  # as float as the outputs that they become
    results = {result(graph, node) for node in weighted} - answers
    marked = {node.input[0] for node in weighted} | results
    results |= _spread(graph, marked) - answers
    marked -= {*graph.outputs, *answers}
    groups = Groups()
    for node in graph:
        if node.op_type in _KEEP_SCALE and {node.input[0], node.output[0]} <= marked:
            groups.join((node.input[0], node.output[0]))
    edges = [
        edge
        for name in _in_order(graph, marked)
        for edge in graph.readings[name]
        if (edge.reader not in keep_float or name in results) and edge.index != CAPTURED
    ]
    return Placement(tuple(edges), tuple(node.output[0] for node in weighted), groups.sets())


def result(graph: Graph, node: onnx.NodeProto) -> str:
    """The tensor that holds what `node` computes, after an activation that quantization absorbs."""
    readers = graph.readers(node.output[0])
    if len(readers) == 1 and readers[0].op_type in ABSORBED and node.output[0] not in graph.outputs:
        return readers[0].output[0]
    return node.output[0]


def _answers(graph: Graph) -> set[str]:
    """What fully connected layers make of which nothing but outputs is made: `squeeze`, `sigmoid`, `* std + mean`.

    Eight bits of a range from 0 to 2,000 are steps of 8, and a large value beside small ones drowns them.
    """
    last: set[str] = set()
    for node in reversed(list(graph)):
        for name in node.output:
            readers = graph.readers(name)
            if all(not has_weights(graph, reader) and last.issuperset(reader.output) for reader in readers):
                last.add(name)
    answers: set[str] = set()
    for node in graph:
        begins = node.op_type in {"Gemm", "MatMul"} and has_weights(graph, node)
        if begins or not answers.isdisjoint(node.input):
            answers |= last.intersection(node.output)
    return answers


def _spread(graph: Graph, marked: set[str]) -> set[str]:
    """Mark the other operands and the results of integer kernels that already read marked tensors.

    What no integer kernel reads after all, in box arithmetic or in front of a RoIAlign, is left alone.

    Returns:
        The results.
    """
    results: set[str] = set()
    kept_float = only_picked(graph, samples=True)
    before = -1
    while before != len(marked):
        before = len(marked)
        for node in graph:
            if node.op_type in _JOINS and node.output[0] not in kept_float and _joins(graph, node, marked):
                results.add(result(graph, node))
                marked |= {*graph.activations(node), result(graph, node)}
    return results


def _joins(graph: Graph, node: onnx.NodeProto, marked: set[str]) -> bool:
    activations = graph.activations(node)
    if node.op_type in {"Add", "Mul"} and len(activations) != 2:
        return False  # with a constant operand: an affine step, exact in float
    return any(name in marked for name in activations)


def _in_order(graph: Graph, tensors: set[str]) -> list[str]:
    made = [*graph.inputs, *(name for node in graph for name in node.output)]
    return [name for name in made if name in tensors]
