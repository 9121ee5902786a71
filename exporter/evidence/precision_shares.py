"""Which share of a graph's multiply-adds is in which precision, and which layers are not in the one asked for."""

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import onnx

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.inspecting.inspection import Operation, Trace
from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx

# Below this share of the multiply-adds a model is not what its precision says.
LEAST = 0.9
_NAMED = 4
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
# What the clean-up and `quantize` add to the name of a layer's weights.
_ADDED = (".dq", ".weight", ".folded", ".fp16", ".bf16")


@dataclass(frozen=True)
class Part:
    """One operator that multiplies and adds."""

    name: str
    operator: str
    macs: int
    precision: str
    why: str


@dataclass(frozen=True)
class Shares:
    """The multiply-adds of one image by what computes them.

    Attributes:
        parts: the operators, in the order of the graph; a product of two activations is one.
    """

    parts: tuple[Part, ...]

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-adds by precision, the largest first."""
        counted: Counter[str] = Counter()
        for part in self.parts:
            counted[part.precision] += part.macs
        return dict(counted.most_common())

    @property
    def line(self) -> str:
        """The shares for people."""
        total = max(sum(self.macs.values()), 1)
        return ", ".join(f"{_percent(macs / total)} {kind.upper()}" for kind, macs in self.macs.items())

    def others(self, precision: str) -> list[Part]:
        """The operators in another precision, those with the most multiply-adds first."""
        return sorted((part for part in self.parts if part.precision != precision), key=lambda part: -part.macs)

    def warning(self, precision: str) -> str:
        """What to mind where less than LEAST is in the precision that was asked for; else empty."""
        total = sum(self.macs.values())
        share = self.macs.get(precision, 0) / max(total, 1)
        if not total or share >= LEAST:
            return ""
        left = self.others(precision)
        named = ", ".join(
            f"{part.name} ({part.operator}, {_percent(part.macs / total)}, {part.why})" for part in left[:_NAMED]
        )
        more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        return f"only {_percent(share)} of the multiply-adds are in {precision.upper()}; not {named}{more}"

    def to_json(self, precision: str) -> dict[str, Any]:
        """For report.json: multiply-adds by precision, and the operators that are not in the one asked for."""
        return {"macs": self.macs, "line": self.line, "others": [asdict(part) for part in self.others(precision)]}


def precision_shares(model: onnx.ModelProto, precision: str) -> Shares | None:
    """Count; None where the shapes of the graph, a detector's for instance, cannot be worked out.

    Args:
        model: takes one image.
        precision: what was asked for, which is what `why` is about.
    """
    try:
        trace = trace_from_onnx("the graph", model)
    except BadInput:
        return None
    graph = Graph(model)
    parts = []
    for operation in trace.operations:
        node = graph.producers[operation.writes[0]]
        macs = operation.macs or _of_activations(trace, node)
        if not macs:
            continue
        kind = operation.precision.partition(",")[0]
        why = "" if kind == precision else _why(graph, node, operation)
        parts.append(Part(_name(graph, node, operation), operation.type, macs, kind, why))
    return Shares(tuple(parts))


def _of_activations(trace: Trace, node: onnx.NodeProto) -> int:
    """Multiply-adds of a product whose operands both depend on the image."""
    if node.op_type not in _PRODUCTS or len(node.input) < 2:
        return 0
    left, right, made = (trace.shapes.get(name) for name in (*node.input[:2], node.output[0]))
    if not left or not right or not made:
        return 0
    if node.op_type == "ConvTranspose":
        return prod(left[1:]) * prod(right[1:])
    if node.op_type == "Conv":
        return prod(made[1:]) * prod(right[1:])
    if node.op_type == "Einsum":
        return _einsum(node, left, right)
    inner = left[0] if node.op_type == "Gemm" and _transposed(node) else left[-1]
    return prod(made[1:]) * inner


def _transposed(node: onnx.NodeProto) -> bool:
    return any(item.name == "transA" and item.i for item in node.attribute)


def _einsum(node: onnx.NodeProto, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    equation = next((item.s.decode() for item in node.attribute if item.name == "equation"), "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if len(terms) != 2 or [len(term) for term in terms] != [len(left), len(right)]:
        return 0
    sizes = dict(zip(terms[0], left, strict=True)) | dict(zip(terms[1], right, strict=True))
    sizes.pop(terms[0][0], None)  # the batch
    return prod(sizes.values())


def _name(graph: Graph, node: onnx.NodeProto, operation: Operation) -> str:
    """The name of the weights, which is the module's; else that of the operator."""
    weights = node.input[1] if len(node.input) > 1 else ""
    while graph.producer_type(weights) in {"Cast", "Transpose", "DequantizeLinear"}:
        weights = graph.producers[weights].input[0]
    if not graph.is_constant(weights) or weights.endswith(".integers"):
        return operation.name
    for ending in _ADDED:
        weights = weights.removesuffix(ending)
    return weights


def _why(graph: Graph, node: onnx.NodeProto, operation: Operation) -> str:
    """Why an operator is not in the precision that was asked for, as far as the graph shows it."""
    if operation.precision.endswith("weights"):
        return "reads activations in float"
    weights = node.input[1] if len(node.input) > 1 else ""
    while graph.producer_type(weights) in {"Cast", "Transpose", "DequantizeLinear"}:
        weights = graph.producers[weights].input[0]
    if graph.is_constant(weights):
        return "kept in float"
    return "a product of two activations" if node.op_type in {"MatMul", "Einsum"} else "weights depend on the image"


def _percent(share: float) -> str:
    """Never 100 % of less than all."""
    return f"{share:.1%}" if share in (0, 1) or 0.001 <= share < 0.9995 else ("< 0.1%" if share < 0.5 else "99.9%")
