"""Whether the output of a graph is scores, or the probabilities that its last operator makes of them."""

from dataclasses import dataclass

import onnx

from convoynet.exporter.graph.onnx_graph import Graph

# What makes probabilities of scores; the logarithms of a LogSoftmax are scores themselves.
PROBABILITIES = ("Softmax", "Sigmoid", "HardSigmoid")
# What only moves, copies or rounds.
_MOVING = (
    "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout", "QuantizeLinear",
    "DequantizeLinear",
)  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How an output is made.

    Attributes:
        operator: that computes it, behind what only moves it; empty where a graph input or a constant is moved.
        read: the first tensor that this operator reads.
    """

    operator: str
    read: str


def ending(model: onnx.ModelProto, output: str) -> Ending:
    """How an output of a graph is made."""
    graph = Graph(model)
    node = graph.producers.get(output)
    while node is not None and node.op_type in _MOVING:
        node = graph.producers.get(node.input[0])
    return Ending("", "") if node is None else Ending(node.op_type, node.input[0] if node.input else "")
