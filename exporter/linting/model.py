"""What the rules of the linter look at, and what they report: one ONNX model, and the runtimes it may be meant for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph, see_through

Severity = Literal["error", "warning"]
Family = Literal["onnxruntime", "openvino", "tensorrt"]


class Problem(NamedTuple):
    """What is wrong at one place: `node` says where, `message` goes on from it as a sentence, `fix` is the way out."""

    node: str
    message: str
    fix: str


@dataclass(frozen=True)
class Finding:
    """A problem as a rule reports it.

    Attributes:
        rule: the rule's name.
        severity: "error" where the runtime refuses the graph, misreads it or has not all of it; "warning" where it
            runs, but slower, less exactly or in fewer ways than it could.
        node: where: operator and name of a node, an input or output, or a file.
        message: what is wrong there, to be read after `node`.
        fix: what to do about it.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    fix: str

    @property
    def line(self) -> str:
        """The finding in one line."""
        return f"{self.node} {self.message}; {self.fix}"


@dataclass(frozen=True)
class Runtime:
    """What may run a model.

    Attributes:
        name: as `convoy lint --for` takes it.
        family: the runtimes that rules treat alike.
        title: its name for people.
        opsets: the operator sets that it reads; None where it takes any that it was tried with.
        ir: the newest version of the file format that it reads; None likewise.
    """

    name: str
    family: Family
    title: str
    opsets: range | None = None
    ir: int | None = None


# ONNX Runtime: measured on 1.31, which refuses opset 27 and IR 14; the oldest is from its documentation. TensorRT: from
# its documentation (10.15, 11.5). OpenVINO 2026.4 was given opsets 6 to 29 and IR 3 to 15, and took them all.
_ONNXRUNTIME = Runtime("onnxruntime", "onnxruntime", "ONNX Runtime", range(7, 27), 13)
_TENSORRT_11 = Runtime("tensorrt11", "tensorrt", "TensorRT 11", range(9, 26))
_TENSORRT_10 = Runtime("tensorrt10", "tensorrt", "TensorRT 10", range(9, 25))
_TENSORRT = Runtime("tensorrt", "tensorrt", "TensorRT", _TENSORRT_11.opsets)
_OPENVINO = Runtime("openvino", "openvino", "OpenVINO")
RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {item.name: item for item in (_ONNXRUNTIME, _TENSORRT, _TENSORRT_11, _TENSORRT_10, _OPENVINO)}
)


@dataclass(frozen=True)
class Scope:
    """One graph of a model: the main one, a body of control flow, or a function.

    Attributes:
        nodes: of this graph alone.
        constants: the stored tensors that its nodes can see, those of the graphs around it included.
        types: element types of the tensors that they can see, as far as they are known.
        shapes: likewise, with None for a dynamic axis.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    types: dict[str, int]
    shapes: dict[str, list[int | None]] = field(default_factory=dict)


class Subject:
    """A model under the linter, with what several rules need to know of it. The model is not changed.

    Args:
        model: weights in files of their own need not be loaded.
        folder: where such files are looked for; None where the model is not from a file.

    Raises:
        BadInput: a node without output, or with fewer inputs than its operator has: this is no valid graph.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder
        self.opset = next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 0)
        inferred = see_through(_inferred(model))
        self.scopes = [*_scopes(inferred.graph, Scope([], {}, {}))]
        self.scopes += [Scope(list(item.node), _constants(item.node), {}) for item in inferred.functions]
        self._require_ends()
        self.graph = Graph(inferred)
        self.inputs = [value for value in inferred.graph.input if value.name in self.graph.inputs]
        self.outputs = list(inferred.graph.output)

    def nodes(self, *operators: str) -> Iterator[tuple[Scope, onnx.NodeProto]]:
        """Every node of ONNX's own operators in any graph of the model, or those of some operators."""
        for scope in self.scopes:
            for node in scope.nodes:
                if node.domain in {"", "ai.onnx"} and (not operators or node.op_type in operators):
                    yield scope, node

    def _require_ends(self) -> None:
        newest = min(self.opset, onnx.defs.onnx_opset_version())
        for scope in self.scopes:
            for node in scope.nodes:
                if not node.output:
                    raise BadInput(f"{node.op_type} {node.name!r} has no output: this is no valid ONNX graph")
                least = _least_inputs(node.op_type, newest) if node.domain in {"", "ai.onnx"} else 0
                if len(node.input) < least:
                    raise BadInput(f"{label(node)} has fewer than {least} inputs: this is no valid ONNX graph")

    def value(self, tensor: onnx.TensorProto) -> np.ndarray | None:
        """The numbers of a stored tensor; None where they are in a file that is not there."""
        if not external_data_helper.uses_external_data(tensor):
            return numpy_helper.to_array(tensor)
        if self.folder is None:
            return None
        loaded = onnx.TensorProto()
        loaded.CopyFrom(tensor)
        try:
            external_data_helper.load_external_data_for_tensor(loaded, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError):
            return None
        return numpy_helper.to_array(loaded)


@cache
def _least_inputs(operator: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(operator, opset).min_input)
    except onnx.defs.SchemaError:
        return 0


def label(node: onnx.NodeProto) -> str:
    """How a finding names a node."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """The shape of an input or output, None for a dynamic axis; empty where it is not known."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the types and shapes that can be inferred: of an opset that is not known here, none."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy


def _scopes(graph: onnx.GraphProto, around: Scope) -> Iterator[Scope]:
    constants = around.constants | {tensor.name: tensor for tensor in graph.initializer} | _constants(graph.node)
    values = [*graph.input, *graph.value_info, *graph.output]
    types = around.types | {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    shapes = around.shapes | {value.name: dims(value) for value in values if value.type.tensor_type.HasField("shape")}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    scope = Scope(list(graph.node), constants, types, shapes)
    yield scope
    for node in graph.node:
        for item in node.attribute:
            for body in [item.g, *item.graphs] if item.type in {item.GRAPH, item.GRAPHS} else []:
                yield from _scopes(body, scope)


def _constants(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.TensorProto]:
    return {
        node.output[0]: item.t
        for node in nodes
        if node.op_type == "Constant" and node.output
        for item in node.attribute
        if item.name == "value"
    }
