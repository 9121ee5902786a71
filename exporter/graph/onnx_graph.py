"""Look-ups over one ONNX graph: who makes a tensor, who reads it, which tensors are constants."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from convoynet.exporter.errors import BadInput, NoGradient

# What says an axis or a shape is no larger, in bytes.
_SMALL_CONSTANT = 1024
# ONNX's own operators that have graphs within them.
_BRANCHING = {"If", "Loop", "Scan", "SequenceMap"}
CAPTURED = -1
"""The `index` of an Edge whose tensor is no input of the reader: a graph within it, as an If has, reads it by name."""


@dataclass(frozen=True)
class Edge:
    """One reading of a tensor: input number `index` of the node that makes `reader`."""

    tensor: str
    reader: str
    index: int


CUTS_BELOW, CUTS_ABOVE = "cuts off below", "cuts off above"
"""In the doc string of a QuantizeLinear whose least or largest integer is where a Clip, which was removed, cut off."""
_BY_CHANCE = ("Random", "Bernoulli", "Multinomial")


class Graph:
    """An index of `model.graph`, valid until nodes or initializers are changed; call `refresh` after that.

    A node is named by its first output: outputs are unique in a graph, node names need not be.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Build the index anew."""
        graph = self.model.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.initializers]
        self.outputs = [value.name for value in graph.output]
        self.producers: dict[str, onnx.NodeProto] = {}
        self.readings: dict[str, list[Edge]] = {}
        for node in graph.node:
            self.producers.update(dict.fromkeys((name for name in node.output if name), node))
            edges = [*enumerate(node.input), *((CAPTURED, name) for name in captured(node))]
            for index, name in edges:
                self.readings.setdefault(name, []).append(Edge(name, node.output[0], index))
        self._computed: set[str] | None = None

    def __iter__(self) -> Iterator[onnx.NodeProto]:
        """The nodes in topological order, which ONNX guarantees."""
        return iter(self.model.graph.node)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read `tensor`, once for each reading."""
        return [self.producers[edge.reader] for edge in self.readings.get(tensor, ())]

    def producer_type(self, tensor: str) -> str:
        """The operator that makes `tensor`; empty for graph inputs and constants."""
        return self.producers[tensor].op_type if tensor in self.producers else ""

    def is_constant(self, tensor: str) -> bool:
        """Whether `tensor` is stored in the graph."""
        return tensor in self.initializers

    def is_computed(self, tensor: str) -> bool:
        """Whether `tensor` depends on the graph's input, or on chance, and not on stored tensors alone."""
        if self._computed is None:
            self._computed = set(self.inputs)
            for node in self:
                if node.op_type.startswith(_BY_CHANCE) or not self._computed.isdisjoint(reads(node)):
                    self._computed.update(name for name in node.output if name)
        return tensor in self._computed

    def constant(self, tensor: str) -> np.ndarray:
        """The value of a stored tensor."""
        return numpy_helper.to_array(self.initializers[tensor])

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """What `node` reads that depends on the graph's input."""
        return [name for name in reads(node) if not self.is_constant(name)]

    def remove(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Drop nodes, then every initializer that nothing reads any more."""
        dropped = {id(node) for node in nodes}
        kept = [node for node in self.model.graph.node if id(node) not in dropped]
        replace(self.model.graph.node, kept)
        self.drop_unused_constants()

    def drop_unused_constants(self) -> None:
        """Remove the initializers that no node reads and that are no output."""
        used = {name for node in self.model.graph.node for name in reads(node)} | set(self.outputs)
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        if len(kept) != len(self.model.graph.initializer):
            replace(self.model.graph.initializer, kept)
        self.refresh()

    def drop_unread(self) -> None:
        """Remove the nodes that no output needs."""
        while unread := [n for n in self if not any(o in self.readings or o in self.outputs for o in n.output)]:
            self.remove(unread)

    def rewire(self, old: str, new: str) -> None:
        """Make every reader of `old` read `new`."""
        for node in self.readers(old):
            _rename_read(node, {old: new})


def before(graph: Graph, tensors: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that tensors depend on, in the order of the graph."""
    needed = set(tensors)
    nodes = []
    for node in reversed(list(graph)):
        if needed.intersection(node.output):
            needed.update(reads(node))
            nodes.append(node)
    return nodes[::-1]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of those within it."""
    for node in graph.node:
        yield node
        for body in bodies_of(node):
            yield from all_nodes(body)


def bodies_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs within a node."""
    if node.op_type not in _BRANCHING and node.domain in {"", "ai.onnx"}:  # to look at all attributes takes its time
        return []
    return [body for item in node.attribute for body in ([item.g] if item.HasField("g") else []) + list(item.graphs)]


def captured(node: onnx.NodeProto) -> list[str]:
    """The tensors that the graphs within a node read from around it, each once: they are none of its inputs."""
    found: dict[str, None] = {}
    for body in bodies_of(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own |= {name for inner in body.node for name in inner.output}
        named = [name for inner in body.node for name in reads(inner)] + [value.name for value in body.output]
        found.update((name, None) for name in named if name not in own)
    return list(found)


def reads(node: onnx.NodeProto) -> list[str]:
    """The names of all tensors that a node reads: its inputs, and what the graphs within it capture."""
    return [*(name for name in node.input if name), *captured(node)]


def replace(field: Any, items: Sequence[Any]) -> None:
    """Set a repeated protobuf field to `items`, which may be members of it."""
    copies = list(items)
    del field[:]
    field.extend(copies)


def see_through(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make Constant nodes initializers, and let readers of an Identity read what it reads; changes and returns `model`.

    Other exporters write either where this one has an initializer.
    """
    _see_through(model.graph)
    return model


def _see_through(graph: onnx.GraphProto) -> None:
    results = {value.name for value in graph.output}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        tensor = constant_of(node)
        if tensor is not None:
            graph.initializer.append(tensor)
        elif node.op_type == "Identity" and node.domain in {"", "ai.onnx"} and _is_plain(node, results):
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        replace(graph.node, kept)
    for node in graph.node:
        for body in bodies_of(node):
            _see_through(body)
    for node in graph.node if same else ():
        _rename_read(node, same)


def _is_plain(identity: onnx.NodeProto, results: set[str]) -> bool:
    return len(identity.input) == len(identity.output) == 1 and identity.output[0] not in results


def _rename_read(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """What a node reads and the graphs within it do, whose own names may not be the same as any outside."""
    if any(name in names for name in node.input):
        node.input[:] = [names.get(name, name) for name in node.input]
    for body in bodies_of(node):
        for inner in body.node:
            _rename_read(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node makes, under the name of its output; None where it is another node or a text."""
    if node.op_type != "Constant" or node.domain not in {"", "ai.onnx"} or len(node.output) != 1:
        return None
    for item in node.attribute:
        tensor = onnx.TensorProto()
        if item.name == "value" and item.HasField("t"):
            tensor.CopyFrom(item.t)
        elif item.name in ("value_float", "value_floats"):
            values = [item.f] if item.name == "value_float" else list(item.floats)
            shape = () if item.name == "value_float" else (len(values),)
            tensor = numpy_helper.from_array(np.array(values, np.float32).reshape(shape))
        elif item.name in ("value_int", "value_ints"):
            integers = [item.i] if item.name == "value_int" else list(item.ints)
            shape = () if item.name == "value_int" else (len(integers),)
            tensor = numpy_helper.from_array(np.array(integers, np.int64).reshape(shape))
        else:
            continue
        tensor.name = node.output[0]
        return tensor
    return None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of `node`, or `default` where it is not given."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def untrainable(node: onnx.NodeProto, what: str) -> BadInput:
    """The error for a node that is used in a way which has no gradient here."""
    return NoGradient(f"operator {node.op_type} of node {node.name or node.output[0]!r} with {what}")


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The shape of every tensor that shape inference knows, with None for a dynamic axis."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    known: dict[str, tuple[int | None, ...]] = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            known[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
            )
    return known


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor of the main graph for which it is known, stored tensors among them."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    known = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: kind for name, kind in known.items() if kind}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large constants as inputs: inference looks at their shapes alone, and copying them is slow."""
    source = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    for field in ("node", "input", "output", "value_info"):
        getattr(light.graph, field).extend(getattr(source, field))
    light.graph.name = source.name
    for tensor in source.initializer:
        if tensor.ByteSize() > _SMALL_CONSTANT:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light
