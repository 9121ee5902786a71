"""What single layers of a graph compute on images: the cut graph runs, and no more of it than the layer needs."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import helper

from convoynet.exporter.graph.onnx_graph import Graph, reads, replace
from convoynet.exporter.running.runtime import inner_session

BATCH = 8
_PROBE = "probe"


def run(model: onnx.ModelProto, outputs: Sequence[str], images: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Compute tensors of a graph, BATCH images at a time; what they do not depend on is not run.

    Args:
        model: a graph with one input.
        outputs: names of float tensors.
        images: what the graph's input takes, [n, ...].

    Yields:
        The tensors for the next images.
    """
    session = inner_session(cut(model, outputs), outputs)
    name = session.get_inputs()[0].name
    for at in range(0, len(images), BATCH):
        yield session.run(list(outputs), {name: images[at : at + BATCH]})


def cut(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that `outputs` depend on, with these as its outputs."""
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(reads(node))
            kept.append(node)
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(reversed(kept))
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.input.extend(model.graph.input)
    part.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs)
    return part


def probed(quantized: onnx.ModelProto, layer: str) -> tuple[onnx.ModelProto, str, str]:
    """See what a layer reads and computes in a quantized graph, before any activation that `quantize` absorbed.

    Args:
        quantized: from `quantize`.
        layer: first output of a Conv, Gemm or MatMul of the float graph.

    Returns:
        The graph with one more node, and the names of the layer's input and output in it; the graph itself and two
        empty names where the layer is not quantized.
    """
    stored = f"{layer}.weight.dq"
    node = next((node for node in quantized.graph.node if stored in node.input), None)
    if node is None:
        return quantized, "", ""
    made = onnx.ModelProto()
    made.CopyFrom(quantized)
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = _PROBE
    replace(copy.output, [_PROBE])
    made.graph.node.append(copy)
    return made, node.input[0], _PROBE


def quantized_layers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> list[str]:
    """The Conv and Gemm nodes with a stored bias whose weights `quantize` made INT8, in the order of the graph.

    Weights or biases that another node reads as well are left alone.
    """
    graph = Graph(model)
    stored = {name for node in quantized.graph.node for name in node.input}
    return [
        node.output[0]
        for node in graph
        if node.op_type in {"Conv", "Gemm"}
        and f"{node.output[0]}.weight.dq" in stored
        and len(node.input) > 2
        and all(graph.is_constant(name) and len(graph.readings[name]) == 1 for name in node.input[1:])
    ]
