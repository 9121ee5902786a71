"""Where Q/DQ pairs go: what both targets have in common. `qdq_cpu` and `qdq_gpu` choose the places."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx

from exporter.onnx_graph import Edge, Graph, attribute


@dataclass(frozen=True)
class Placement:
    """What is quantized in a graph.

    Attributes:
        edges: the readings that get the dequantized value; tensors with no such edge stay float.
        weighted: first outputs of the Conv, Gemm and MatMul nodes whose weights become INT8.
        groups: sets of tensors that share one scale.
    """

    edges: tuple[Edge, ...]
    weighted: tuple[str, ...]
    groups: tuple[frozenset[str], ...] = ()

    @property
    def tensors(self) -> list[str]:
        """The quantized activations, in the order of their first reading."""
        return list(dict.fromkeys(edge.tensor for edge in self.edges))


@dataclass
class Groups:
    """Disjoint sets of tensors, merged as they are found to belong together."""

    _sets: dict[str, set[str]] = field(default_factory=dict)

    def join(self, tensors: Iterable[str]) -> None:
        """Put tensors, and whatever each already belongs with, into one set."""
        merged: set[str] = set()
        for tensor in tensors:
            merged |= self._sets.get(tensor, {tensor})
        self._sets.update(dict.fromkeys(merged, merged))

    def sets(self) -> tuple[frozenset[str], ...]:
        """The sets, in the order in which their first members were given."""
        return tuple(dict.fromkeys(frozenset(members) for members in self._sets.values() if len(members) > 1))


def has_weights(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node multiplies an activation with stored float weights, so that integers can do it."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"} or not graph.is_constant(node.input[1]):
        return False
    if graph.is_constant(node.input[0]) or graph.initializers[node.input[1]].data_type != onnx.TensorProto.FLOAT:
        return False
    if node.op_type == "MatMul":
        return len(graph.initializers[node.input[1]].dims) == 2
    bias_is_stored = len(node.input) < 3 or not node.input[2] or graph.is_constant(node.input[2])
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
    return bias_is_stored and plain


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of the weights that runs over the output channels."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
