"""Where Q/DQ pairs go: what both targets have in common. `qdq_cpu` and `qdq_gpu` choose the places."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx

from convoynet.exporter.graph.onnx_graph import Edge, Graph, attribute

# Operators that multiply an activation with weights.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What ranks values, or picks some by an index: in integers many values are equal, and the order between them is lost.
_PICKS = frozenset(
    {"ArgMax", "ArgMin", "Gather", "GatherElements", "GatherND", "NonMaxSuppression", "ScatterElements", "TopK"}
)
# What samples its first input at the places that the others say.
_SAMPLES = frozenset({"GridSample", "RoiAlign"})


@dataclass(frozen=True)
class Placement:
    """What is quantized in a graph.

    Attributes:
        edges: the readings that get the dequantized value; tensors with no such edge stay float.
        weighted: first outputs of the nodes whose weights become INT8; their operators are of WEIGHTED.
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
    if node.op_type not in WEIGHTED or not graph.is_constant(node.input[1]):
        return False
    if graph.is_constant(node.input[0]) or graph.initializers[node.input[1]].data_type != onnx.TensorProto.FLOAT:
        return False
    if node.op_type == "MatMul":
        return len(graph.initializers[node.input[1]].dims) == 2
    bias_is_stored = len(node.input) < 3 or not node.input[2] or graph.is_constant(node.input[2])
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
    return bias_is_stored and plain


def prediction_heads(graph: Graph) -> set[str]:
    """The first outputs of the layers with weights that say where something is and how likely: they stay float.

    Every path from such a layer runs into an operator that ranks or picks, or samples at the places that it gives,
    before it meets another layer with weights or an output of the graph. A classifier has none.
    """
    picked = only_picked(graph, samples=False)
    return {node.output[0] for node in graph if node.output[0] in picked and has_weights(graph, node)}


def only_picked(graph: Graph, *, samples: bool) -> set[str]:
    """The tensors whose every path ends in an operator that picks before a layer with weights or an output.

    Args:
        graph: in topological order.
        samples: whether being sampled, as the features of a RoIAlign are, ends a path as well.
    """
    picked: set[str] = set()
    for node in reversed(list(graph)):
        for name in node.output:
            readings = graph.readings.get(name, []) if name not in graph.outputs else []
            if readings and all(_ends(graph, edge, picked, samples) for edge in readings):
                picked.add(name)
    return picked


def _ends(graph: Graph, edge: Edge, picked: set[str], samples: bool) -> bool:
    node = graph.producers[edge.reader]
    if node.op_type in _PICKS or (node.op_type in _SAMPLES and (samples or edge.index > 0)):
        return True
    read = [name for name in node.output if name in graph.readings or name in graph.outputs]
    return not has_weights(graph, node) and picked.issuperset(read)


def output_axis(node: onnx.NodeProto, dims: Sequence[int] = ()) -> int:
    """The axis of the weights that runs over the output channels.

    Of a ConvTranspose it runs over those of each group; a depthwise one, with weights of shape `dims`, has its outputs
    along its inputs.
    """
    if node.op_type == "ConvTranspose":
        return 0 if dims and attribute(node, "group", 1) == dims[0] and dims[1] == 1 else 1
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
