"""The operators of an ONNX graph, with what its stored weights say about precision and sparsity."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.graph.onnx_graph import Graph, all_nodes, attribute, bodies_of
from convoynet.exporter.graph.onnx_graph import reads as all_reads
from convoynet.exporter.inspecting.inspection import Operation, Trace, WeightFacts
from convoynet.exporter.inspecting.receptive_field import Shape
from convoynet.exporter.inspecting.rule_from_onnx import Reading, rule_from_onnx

_PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.FLOAT8E5M2: "fp8", TensorProto.INT32: "int32",
    TensorProto.INT64: "int64", TensorProto.BOOL: "bool",
}  # fmt: skip
# The inputs that are weight and bias.
_OPERANDS = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (1, None),
    "QLinearConv": (3, 8), "ConvInteger": (1, None), "QLinearMatMul": (3, None), "MatMulInteger": (1, None),
}  # fmt: skip
_INTEGER = {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"}
# The inputs of other operators that are trained; of arithmetic, any constant that is not a single number.
_TRAINED = {
    "BatchNormalization": (1, 2), "InstanceNormalization": (1, 2), "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2), "PRelu": (1,),
}  # fmt: skip
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
_SAME_NUMBERS = {"Identity", "Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"}
_SHAPE_OF = {"Shape", "Size"}
# What exporters compute shapes with.
_ARITHMETIC_OF_SHAPES = {
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Floor", "Gather", "Identity", "Max", "Min",
    "Mod", "Mul", "Neg", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
# Shape inference needs the values of shapes, axes and the like, never those of weights.
_MAX_INFERRED = 256


def trace_from_onnx(
    name: str, model: onnx.ModelProto, input_size: tuple[int, int] | None = None, *, keep_size: bool = False
) -> Trace:
    """Read the operators of a graph.

    QuantizeLinear and DequantizeLinear are no operations: they say which precision the others have.

    Args:
        name: for messages.
        model: takes one image, [batch, C, H, W] or [batch, H, W, C]; it is not changed.
        input_size: (height, width) in the place of the graph's own.
        keep_size: use `input_size` only where the graph leaves its own open.

    Raises:
        BadInput: the graph takes something else, or its shapes cannot be worked out.
    """
    graph = Graph(model)
    image, dims, shape = _image(name, model, graph)
    if input_size and not (keep_size and all(shape)):
        shape[dims[0]], shape[dims[1]] = input_size
    if not all(shape):
        raise BadInput(f"{name} takes images of any size: choose one with --input-size, such as 224")
    known, types, folded = _inferred(name, model, graph, image, shape)
    return _Reader(Trace(name, [], known, image, dims), graph, types, folded).trace()


def _image(name: str, model: onnx.ModelProto, graph: Graph) -> tuple[str, tuple[int, int], list[int]]:
    """The input that is the image, its dimensions that are height and width, and its shape, 0 where that is open."""
    if len(graph.inputs) != 1:
        raise BadInput(f"{name} takes {len(graph.inputs)} inputs; a network for images takes one")
    (value,) = (value for value in model.graph.input if value.name == graph.inputs[0])
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if len(shape) != 4:
        raise BadInput(f"{name} takes an input of {len(shape)} dimensions; an image has four, with the batch")
    last = shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)
    dims = (1, 2) if last else (2, 3)
    shape[0] = shape[0] or 1
    return value.name, dims, shape


def _inferred(
    name: str, model: onnx.ModelProto, graph: Graph, image: str, shape: list[int]
) -> tuple[dict[str, Shape], dict[str, int], dict[str, np.ndarray]]:
    """The shapes and element types of all tensors, and the values of those that are computed of shapes.

    From a copy of the graph without the weights' numbers.
    """
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = "shapes"
    light.graph.node.extend(model.graph.node)
    element = next(value.type.tensor_type.elem_type for value in model.graph.input if value.name == image)
    light.graph.input.append(helper.make_tensor_value_info(image, element, shape))
    for tensor in graph.initializers.values():
        if prod(tensor.dims) <= _MAX_INFERRED:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for output in model.graph.output:
        light.graph.output.append(helper.make_tensor_value_info(output.name, output.type.tensor_type.elem_type, None))
    folded: dict[str, np.ndarray] = {}
    while True:
        try:  # what cannot be inferred is left out, and missed where it is needed
            result = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise BadInput(f"{name} is no valid ONNX graph: {reason(error)}") from error
        shapes: dict[str, Shape] = {}
        types: dict[str, int] = {}
        for value in (*result.input, *result.value_info, *result.output):
            tensor_type = value.type.tensor_type
            types[value.name] = tensor_type.elem_type
            if tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor_type.shape.dim):
                shapes[value.name] = tuple(dim.dim_value for dim in tensor_type.shape.dim)
        # With these behind them further shapes are known, of which others may be computed.
        made = _folded(light, shapes)
        if not made:
            return shapes, types, folded
        folded |= made


def _folded(light: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """What can be computed of shapes that are known, and of stored numbers; its nodes are replaced by the numbers."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in light.graph.initializer}
    made: dict[str, np.ndarray] = {}
    left = []
    for node in light.graph.node:
        values = [known.get(each) for each in node.input if each]
        found = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            found = np.array(shapes[node.input[0]], np.int64)
            found = found[attribute(node, "start", 0) : attribute(node, "end", None)]
        elif node.op_type in _ARITHMETIC_OF_SHAPES and all(value is not None for value in values):
            found = _computed(light, node, known)
        if found is None or found.size > _MAX_INFERRED:
            left.append(node)
        else:
            known[node.output[0]] = made[node.output[0]] = found
    del light.graph.node[:]
    light.graph.node.extend(left)
    light.graph.initializer.extend(numpy_helper.from_array(values, each) for each, values in made.items())
    return made


def _computed(light: onnx.ModelProto, node: onnx.NodeProto, known: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What one node makes of numbers that are known, as ONNX's reference has it; None where that is much."""
    if node.op_type == "Constant" and prod(getattr(attribute(node, "value", None), "dims", ())) > _MAX_INFERRED:
        return None
    if node.op_type == "ConstantOfShape" and prod(known[node.input[0]].tolist()) > _MAX_INFERRED:
        return None
    stored = [numpy_helper.from_array(known[each], each) for each in dict.fromkeys(node.input) if each]
    result = helper.make_tensor_value_info(node.output[0], TensorProto.UNDEFINED, None)
    body = helper.make_graph([node], "folded", [], [result], stored)
    try:
        (found,) = ReferenceEvaluator(helper.make_model(body, opset_imports=light.opset_import)).run(None, {})
    except Exception:  # the reference raises anything for what it does not know; the shape is missed then
        return None
    return np.asarray(found)


@dataclass(frozen=True)
class _Stored:
    """A weight as it is stored: the numbers, those that stand for zero, and the axis that was asked for."""

    values: np.ndarray
    zero: np.ndarray
    axis: int


class _Reader:
    def __init__(self, empty: Trace, graph: Graph, types: Mapping[str, int], folded: Mapping[str, np.ndarray]) -> None:
        self.empty = empty
        self.folded = folded
        self.graph = graph
        self.shapes = empty.shapes
        self.types = types
        self.constants = {tensor: frozenset({tensor}) for tensor in graph.initializers}
        self.sizes = {tensor.name: prod(tensor.dims) for tensor in graph.initializers.values()}
        self.same = {
            empty.image: empty.image
        }  # a tensor that depends on the image -> the one that it is up to rounding
        self.integer: set[str] = set()  # first outputs of the operations that run in integers
        self.used: set[str] = set()

    def trace(self) -> Trace:
        operations = []
        for node in self.graph:
            reads = [name for name in all_reads(node) if name in self.same]
            if reads and (inner := self._weighted_within(node)):
                where = f"{self.empty.name}: {node.op_type} {node.name or node.output[0]!r}"
                raise BadInput(
                    f"{where} has layers with weights in graphs of its own ({inner}), and which of them runs is "
                    "not in the file: inspect the network with one branch alone"
                )
            if not reads or node.op_type in _SHAPE_OF:
                self._note_constant(node)
            elif node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
                self.same[node.output[0]] = self.same[reads[0]]
            else:
                self.same.update({name: name for name in node.output if name})
                operations.append(self._operation(node, reads))
        return replace(self.empty, operations=operations)

    def _weighted_within(self, node: onnx.NodeProto) -> str:
        """The first operator with weights in the graphs within a node; empty where there is none."""
        inside = (inner for body in bodies_of(node) for inner in all_nodes(body))
        return next((inner.op_type for inner in inside if inner.op_type in (*_OPERANDS, *_TRAINED)), "")

    def _note_constant(self, node: onnx.NodeProto) -> None:
        sources: frozenset[str] = frozenset()
        if node.op_type == "Constant":
            sources = frozenset({node.output[0]})
            value = attribute(node, "value", None)
            self.sizes[node.output[0]] = 1 if value is None else prod(value.dims)
        elif node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            sources = self.constants.get(node.input[0], sources)
        elif node.op_type not in _SHAPE_OF:
            sources = sources.union(*(self.constants.get(name, sources) for name in all_reads(node)))
        self.constants.update(dict.fromkeys(node.output, sources))

    def _operation(self, node: onnx.NodeProto, reads: list[str]) -> Operation:
        before, after = self.shapes.get(self.same[reads[0]]), self.shapes.get(node.output[0])
        weight, bias = self._operands(node)
        kernel = self.shapes.get(weight, self._shape_of_constant(weight))
        name, (height, width) = self.empty.name, self.empty.image_size
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        if before is None or after is None or (weight and not kernel):
            raise BadInput(f"{name}: the shapes at {where} cannot be worked out for an image of {height}x{width}")
        if weight and before[_channels(node)] != _inputs(node, kernel):
            raise BadInput(f"{name} does not take an image of {height}x{width}: the weights of {where} do not fit")
        values = [self._value(name) for name in node.input]
        macs = _multiply_adds(node, before, after, kernel) if weight else 0
        precision = self._precision(node, reads, weight)
        if precision.startswith("int"):
            self.integer.add(node.output[0])
        return Operation(
            layer=node.output[0],
            name=node.name or node.output[0],
            type=node.op_type,
            rule=rule_from_onnx(Reading(node, before, after, kernel, values)),
            reads=tuple(self.same[name] for name in reads),
            writes=tuple(name for name in node.output if name),
            parameters=self._fresh_parameters(node, weight, bias),
            macs=macs,
            biases=(prod(after[1:]) if bias else 0) if weight else None,
            precision=precision,
            weights=self._facts(node, weight) if weight else None,
        )

    def _operands(self, node: onnx.NodeProto) -> tuple[str, str]:
        """The constant weight and bias of a node, empty where there is none."""
        found = []
        for index in _OPERANDS.get(node.op_type, (None, None)):
            name = node.input[index] if index is not None and index < len(node.input) else ""
            found.append(name if name in self.constants else "")
        return found[0], found[1]

    def _shape_of_constant(self, name: str) -> Shape:
        stored = self.graph.initializers.get(name)
        return () if stored is None else tuple(stored.dims)

    def _value(self, name: str) -> np.ndarray | None:
        """A small constant: shapes, axes, bounds."""
        if name in self.graph.initializers:
            return self.graph.constant(name) if self.sizes[name] <= _MAX_INFERRED else None
        if name in self.folded:
            return self.folded[name]
        node = self.graph.producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        for form in ("value", "value_int", "value_ints", "value_float", "value_floats"):
            given = attribute(node, form, None)
            if given is not None:
                return numpy_helper.to_array(given) if form == "value" else np.asarray(given)
        return None

    def _fresh_parameters(self, node: onnx.NodeProto, weight: str, bias: str) -> int:
        """Elements of the node's parameters that no node before it uses."""
        trained = [node.input[index] for index in _TRAINED.get(node.op_type, ()) if index < len(node.input)]
        if node.op_type in _ARITHMETIC:
            trained = list(node.input)
        sources = frozenset().union(*(self.constants.get(name, frozenset()) for name in (weight, bias, *trained)))
        fresh = {source for source in sources - self.used if node.op_type not in _ARITHMETIC or self.sizes[source] > 1}
        self.used |= fresh
        return sum(self.sizes[source] for source in fresh)

    def _precision(self, node: onnx.NodeProto, reads: list[str], weight: str) -> str:
        if node.op_type in _INTEGER:
            return "int8"
        own = _PRECISIONS.get(self.types.get(node.output[0], 0), "other")
        inputs = {self._quantized_type(name) for name in reads}
        if weight:
            stored = self._quantized_type(weight)
            if not stored:
                return own
            return stored if inputs == {stored} else f"{own}, {stored} weights"
        inside = all(self._quantized_type(name) or self._is_fused(name) for name in reads)
        readers = [reader.op_type for reader in self.graph.readers(node.output[0])]
        surrounded = inside and bool(readers) and set(readers) == {"QuantizeLinear"}
        return next((kind for kind in sorted(inputs) if kind), "int8") if surrounded else own

    def _quantized_type(self, name: str) -> str:
        """The precision that DequantizeLinear makes `name` from; empty where something else makes it."""
        if self.graph.producer_type(name) != "DequantizeLinear":
            return ""
        source = self.graph.producers[name].input[0]
        stored = self.graph.initializers.get(source)
        return _PRECISIONS.get(self.types.get(source, 0) if stored is None else stored.data_type, "other")

    def _is_fused(self, name: str) -> bool:
        """Whether `name` never leaves the integer operation that makes it: nothing else reads it."""
        return name in self.integer and len(self.graph.readers(name)) == 1 and name not in self.graph.outputs

    def _facts(self, node: onnx.NodeProto, weight: str) -> WeightFacts | None:
        """Zeros of a weight; None where its numbers are computed."""
        stored = self._stored(weight, _input_axis(node))
        if stored is None or not stored.values.size:
            return None
        nonzero = stored.values != stored.zero
        zeros = nonzero.size - np.count_nonzero(nonzero)
        return WeightFacts(nonzero.size, zeros, is_two_of_four(nonzero, stored.axis))

    def _stored(self, name: str, axis: int) -> _Stored | None:
        """Follow `axis` of a weight back to the tensor in the file."""
        zero = np.zeros(())
        while name not in self.graph.initializers:
            node = self.graph.producers.get(name)
            if node is None or node.op_type not in _SAME_NUMBERS:
                return None
            if node.op_type == "Transpose":
                rank = len(self.shapes[name])
                axis = attribute(node, "perm", list(range(rank)[::-1]))[axis % rank]
            if node.op_type == "DequantizeLinear" and len(node.input) > 2 and self.graph.is_constant(node.input[2]):
                zero = self.graph.constant(node.input[2])
                along = attribute(node, "axis", 1)
                if zero.ndim == 1:
                    rank = len(self.shapes[name])
                    zero = zero.reshape([-1 if dim == along % rank else 1 for dim in range(rank)])
            name = node.input[0]
        values = self.graph.constant(name)
        return _Stored(values, zero.astype(values.dtype), axis)


def _channels(node: onnx.NodeProto) -> int:
    """The dimension of the input that a weight sums over."""
    return 1 if "Conv" in node.op_type else -1


def _inputs(node: onnx.NodeProto, kernel: Shape) -> int:
    """How many channels or features a weight of shape `kernel` takes."""
    return kernel[_input_axis(node)] * (attribute(node, "group", 1) if node.op_type != "ConvTranspose" else 1)


def _multiply_adds(node: onnx.NodeProto, before: Shape, after: Shape, kernel: Shape) -> int:
    """Multiply-adds of one image."""
    if node.op_type == "ConvTranspose":
        return prod(before[1:]) * prod(kernel[1:])
    taken = prod(kernel[1:]) if "Conv" in node.op_type else kernel[_input_axis(node)]
    return prod(after[1:]) * taken


def _input_axis(node: onnx.NodeProto) -> int:
    """The axis of a weight that runs along the input channels."""
    if node.op_type == "Gemm":
        return 1 if attribute(node, "transB", 0) else 0
    if node.op_type == "ConvTranspose":
        return 0
    return 1 if "Conv" in node.op_type else -2


def is_two_of_four(nonzero: np.ndarray, axis: int) -> bool:
    """Whether every group of four along `axis` has at most two that are true; with less than four there is none."""
    size = nonzero.shape[axis]
    most = nonzero.size // size * (size // 4 * 2 + min(size % 4, 2)) if size else 0
    if size < 4 or np.count_nonzero(nonzero) > most:  # most weights are dense, and counting is cheap
        return False
    rows = np.moveaxis(nonzero, axis, -1).reshape(-1, size)
    groups = np.pad(rows, ((0, 0), (0, -size % 4))).reshape(len(rows), -1, 4)
    return bool((groups.sum(axis=2) <= 2).all())
