"""Adds nodes to a graph, in float32 and under names of their own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.feature_map import Head
from convoynet.exporter.graph.onnx_given import opset_of
from convoynet.exporter.graph.onnx_graph import Graph, attribute, before, reads
from convoynet.exporter.graph.onnx_session import make_session, session_options

# The first with a Gemm without a bias, and an Equal of floats.
_LEAST_OPSET = 11

# Operators whose axes are an input, since which opset; before it they are an attribute.
_AXES_SINCE = {
    "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13, "ReduceMax": 18, "ReduceMean": 18, "ReduceMin": 18,
}  # fmt: skip


class Writer:
    """Writes the nodes of one output behind those of a graph; nothing that is there changes.

    Args:
        head: of the graph.
        prefix: how the names of all that is added begin; no tensor of the graph may begin so.
    """

    def __init__(self, head: Head, prefix: str) -> None:
        self.head = head
        self._prefix = prefix
        self._count = 0
        self._graph = head.graph.model.graph
        self._floats: dict[str, str] = {}
        self._quantized = any(node.op_type == "DequantizeLinear" for node in head.graph)
        # As quantized graphs for CPUs have it: TensorRT knows no other zero point than 0, and takes no integers but
        # those that are dequantized.
        integers = [head.types.get(node.output[0]) for node in head.graph if node.op_type == "QuantizeLinear"]
        self._for_cpus = TensorProto.UINT8 in integers
        self._stored: dict[tuple[Any, ...], str] = {}
        self._wholes: dict[str, tuple[int, ...]] = {}

    def add(self, operator: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node; returns its output, which has a new name unless one is given."""
        name = output or self._name(operator)
        if self.head.opset < _AXES_SINCE.get(operator, 0):
            inputs, axes = inputs[:1], self._wholes[inputs[1]]
            attributes |= {"axes": axes}
        self._graph.node.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Store an array."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = self._name("constant")
            self._graph.initializer.append(numpy_helper.from_array(array, self._stored[key]))
        return self._stored[key]

    def whole(self, *values: int) -> str:
        """Store axes, or a shape."""
        name = self.constant(values, np.int64)
        self._wholes[name] = values
        return name

    def value(self, tensor: str, *, exact: bool = False) -> str:
        """A tensor of the graph in float32, as the network itself goes on with it, or exact: before it is rounded.

        Bounds want the exact numbers: what is cut off at 0.2 may be rounded to 0.199.

        OpenVINO and ONNX Runtime would compute in integers what reads dequantized numbers, and OpenVINO takes others
        for the network then: its answers change. A Max with the smallest number changes nothing, and ends that.
        """
        read = tensor if exact else self._read_on(tensor)
        if read not in self._floats:
            name = self._own_copy(read)
            if self.head.types.get(read) != TensorProto.FLOAT:
                name = self.add("Cast", [name], to=TensorProto.FLOAT)
            if self._quantized and not self.is_stored(read):
                name = self.add("Max", [name, self.constant(np.finfo(np.float32).min)])
            self._floats[read] = name
        return self._floats[read]

    def _own_copy(self, tensor: str, *, turned: bool = False) -> str:
        """Numbers of stored integers are made of a copy of these: ONNX Runtime writes a layer's own anew, as others.

        It does so for processors without VNNI (Avx2WeightS8ToU8), and fails where it has to do it twice. The copy of a
        matrix may be turned.
        """
        graph = self.head.graph
        node = graph.producers.get(tensor)
        if node is None or node.op_type != "DequantizeLinear" or not all(map(graph.is_constant, node.input)):
            return tensor
        settings = {item.name: attribute(node, item.name, None) for item in node.attribute}
        arrays = [graph.constant(name) for name in node.input]
        if turned:
            arrays = [array.T for array in arrays]  # scales of blocks too
            if arrays[1].ndim:  # one scale has no axis, nor have operators before opset 13
                settings["axis"] = 1 - int(settings.get("axis", 1)) % 2
        stored = []
        for array in arrays:
            stored.append(self._name("stored"))
            self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), stored[-1]))
        return self.add("DequantizeLinear", stored, **settings)

    def row(self, matrix: str, axis: int, index: str) -> str:
        """Rows of a stored matrix in float32, [indices, others].

        Args:
            matrix: of the graph.
            axis: along which it has what the index says.
            index: [indices].
        """
        if axis == 0:
            return self.add("Gather", [self.value(matrix), index], axis=0)
        if (own := self._own_copy(matrix, turned=True)) != matrix:  # OpenVINO's compiler crashes on columns of it
            rows = self.add("Gather", [own, index], axis=0)
            exact = self.head.types.get(matrix) == TensorProto.FLOAT
            return rows if exact else self.add("Cast", [rows], to=TensorProto.FLOAT)
        return self.add("Transpose", [self.add("Gather", [self.value(matrix), index], axis=1)], perm=[1, 0])

    def _read_on(self, tensor: str) -> str:
        """The tensor, or its rounded numbers where all that is read is these: to have it in float too costs time."""
        readers = self.head.graph.readers(tensor)
        if [node.op_type for node in readers] != ["QuantizeLinear"]:
            return tensor
        numbers = self.head.graph.readers(readers[0].output[0])
        return next((node.output[0] for node in numbers if node.op_type == "DequantizeLinear"), tensor)

    def integers(self, tensor: str, axis: int) -> tuple[str, str] | None:
        """The stored INT8 numbers that a tensor is dequantized from, and their scales.

        Args:
            tensor: of the graph.
            axis: along which each index has a scale of its own.

        Returns:
            The names of both; None where it is stored in another way, or in a graph for GPUs.
        """
        graph = self.head.graph
        node = graph.producers.get(tensor)
        if not self._for_cpus or node is None or node.op_type != "DequantizeLinear":
            return None
        if not all(map(graph.is_constant, node.input)):
            return None
        numbers, scales, *zero = node.input
        stored = graph.initializers[numbers]
        each = graph.initializers[scales]
        plain = stored.data_type == TensorProto.INT8 and each.data_type == TensorProto.FLOAT
        own = list(each.dims) == [stored.dims[axis]] and int(attribute(node, "axis", 1)) % len(stored.dims) == axis
        if not (plain and own) or any(graph.constant(name).any() for name in zero if name):
            return None
        return numbers, scales

    def is_stored(self, tensor: str) -> bool:
        """Whether a tensor of the graph is stored, in whatever way, and not computed of images."""
        return not self.head.graph.is_computed(tensor)

    def known(self, tensor: str) -> np.ndarray | None:
        """The values of a stored tensor in float32; None where it is computed of images."""
        graph = self.head.graph
        if not self.is_stored(tensor):
            return None
        return (graph.constant(tensor) if graph.is_constant(tensor) else self._computed(tensor)).astype(np.float32)

    def _computed(self, tensor: str) -> np.ndarray:
        """What nodes make of stored tensors, as ONNX Runtime computes it."""
        graph = self.head.graph
        nodes = before(graph, [tensor])
        names = {name for node in nodes for name in reads(node) if graph.is_constant(name)}
        result = helper.make_tensor_value_info(tensor, self.head.types.get(tensor, TensorProto.FLOAT), None)
        stored = [graph.initializers[name] for name in sorted(names)]
        body = helper.make_graph(nodes, "stored", [], [result], stored)
        model = helper.make_model(body, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version)
        (values,) = make_session(model.SerializeToString(), session_options(1, optimized=None)).run(None, {})
        return np.asarray(values)

    def _name(self, operator: str) -> str:
        self._count += 1
        return f"{self._prefix}.{operator.lower()}_{self._count}"


def require_room(model: onnx.ModelProto, own: Sequence[str], prefix: str) -> None:
    """See that an output can be written, and that its name and those of what makes it are free.

    Args:
        model: the graph.
        own: the name of the output, and of the inputs that come with it.
        prefix: how the names of all else begin.

    Raises:
        BadInput: one is taken, or the graph's operators are too old.
    """
    graph, output = Graph(model), own[0]
    if output in graph.outputs:
        raise BadInput(f"the graph has an output {output!r} already")
    names = [*graph.inputs, *graph.initializers, *graph.producers]
    taken = next((name for name in names if name in own or name.startswith(f"{prefix}.")), None)
    if taken is not None:
        raise BadInput(
            f"the graph has a tensor {taken!r}, and what makes the output {output!r} is called so: rename it"
        )
    if (opset := opset_of(model)) < _LEAST_OPSET:
        raise BadInput(
            f"the graph is of opset {opset}, and the output {output!r} needs {_LEAST_OPSET} or more: convert it with "
            "onnx.version_converter"
        )
