"""Half precision as types of a graph: IEEE FP16 or bfloat16, for runtimes that compute as the graph says (TensorRT).

A node computes in half precision if its operator has the type, its constants fit, and nothing says that its values
might not. Inputs and outputs of the graph keep their types, and names: a tensor `t` stays float32 wherever anything
reads it as such, and `t.fp16` or `t.bf16` is its value in half precision. A Cast makes the one from the other where
both are needed. What stays float32, and why, is said at the constants below.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph, attribute, element_types, reads, replace, shapes
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.qdq_placement import prediction_heads

# Of scales in half precision, and of a bfloat16 Conv.
_MIN_OPSETS = {"fp16": 19, "bf16": 22}
# The smallest number of FP16, and so the smallest scale.
_SMALLEST = 2.0**-24
_LARGEST = 65504.0
# An activation may be this many times larger on other images than on those of the calibration.
_HEADROOM = 4.0
# A scale that half precision moves by more than this would move every value with it.
_SCALE_ERROR = 0.01
# Where nobody calibrated: what the elements of a mean are taken for.
_USUAL = 64.0

# Squares, powers and sums, which leave FP16's range long before their operands do.
_OVERFLOWS = frozenset(
    {"CumSum", "Exp", "LRN", "LpNormalization", "MeanVarianceNormalization", "Pow", "ReduceL1", "ReduceL2",
     "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum", "ReduceSumSquare"}
)  # fmt: skip
# What ranks or picks, or samples at coordinates: of 1,333 pixels FP16 knows every second, bfloat16 every eighth.
_EXACT = frozenset({"ArgMax", "ArgMin", "GridSample", "NonMaxSuppression", "RoiAlign", "TopK"})
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
# If the result is out of range so is the operand, or may be.
_PASSES_ON = frozenset({"Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_WEIGHT_TYPES = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN})
_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_SCHEMA_TYPES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


def to_fp16(model: onnx.ModelProto, ranges: Mapping[str, Range] | None = None) -> onnx.ModelProto:
    """Make a graph compute in IEEE half precision (11 bits, up to 65,504) wherever that is safe.

    Args:
        model: a float graph of opset 19 or later, or one with Q/DQ pairs; it is not changed.
        ranges: from `calibrate`: what reads or makes a tensor with values that FP16 may not have stays float32.
            Without them only constants are looked at, and means over large areas.

    Returns:
        A checked graph with inputs and outputs of the same names and types.

    Raises:
        BadInput: an older opset, or a graph that is in half precision already.
    """
    return _Converter(model, "fp16", ranges or {}).convert()


def to_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a graph of opset 22 or later compute in bfloat16 (8 bits, the range of float32); otherwise as `to_fp16`."""
    return _Converter(model, "bf16", {}).convert()


def float32_nodes(model: onnx.ModelProto) -> list[str]:
    """The nodes of a typed graph that compute in float32, "operator name", Casts left out."""
    types = element_types(model)
    return [
        f"{node.op_type} {node.name or node.output[0]}"
        for node in model.graph.node
        if node.op_type != "Cast" and any(types.get(name) == TensorProto.FLOAT for name in node.output)
    ]


class _Converter:
    def __init__(self, model: onnx.ModelProto, kind: str, ranges: Mapping[str, Range]) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self._kind = kind
        self._dtype: np.dtype[np.generic] = helper.tensor_dtype_to_np_dtype(_TYPES[kind])
        self._opset = next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 0)
        if self._opset < _MIN_OPSETS[kind]:
            raise BadInput(
                f"opset {self._opset} lacks operators in {kind}: export with --opset {_MIN_OPSETS[kind]} or later"
            )
        self._types = element_types(model)
        if set(_TYPES.values()) & {*self._types.values(), *(tensor.data_type for tensor in model.graph.initializer)}:
            raise BadInput("the graph is in half precision already: convert the float32 one")
        self._graph = Graph(self._model)
        self._stored: set[str] = set()  # constants that there are in half precision
        self._ranges = ranges
        self._shapes = shapes(model) if kind == "fp16" else {}
        self._large = self._out_of_range() if kind == "fp16" else set()

    def convert(self) -> onnx.ModelProto:
        """Do it."""
        if self._kind == "fp16":
            self._raise_scales()
        exact = self._exact_nodes()
        nodes = [node for node in self._graph if node.output[0] not in exact and self._is_half(node)]
        halves = {node.output[0]: self._half_places(node) for node in nodes}
        made_half = {
            name for node in nodes for name in node.output if self._types.get(name) == TensorProto.FLOAT
        }  # by its maker
        wanted_float = self._read_as_float(halves) & made_half
        ordered: list[onnx.NodeProto] = []
        cast: set[str] = set()
        for node in list(self._graph):
            first = node.output[0]
            if first in halves:
                for index in halves[first]:
                    name = node.input[index]
                    if self._graph.is_constant(name):
                        node.input[index] = self._constant(name)
                        continue
                    node.input[index] = self._half(name)
                    if name not in made_half | cast:
                        cast.add(name)
                        ordered.append(self._cast(name, self._half(name), _TYPES[self._kind]))
                for index, name in enumerate(node.output):
                    if name in made_half:
                        node.output[index] = self._half(name)
                for item in node.attribute:
                    if node.op_type == "Cast" and item.name == "to":
                        item.i = _TYPES[self._kind]
            ordered.append(node)
            back = [name for name in made_half & wanted_float if self._half(name) in node.output]
            ordered += [self._cast(self._half(name), name, TensorProto.FLOAT) for name in sorted(back)]
        replace(self._model.graph.node, ordered)
        replace(self._model.graph.value_info, [])
        self._graph.refresh()
        self._graph.drop_unused_constants()
        onnx.checker.check_model(self._model, full_check=True)
        return self._model

    def _half(self, name: str) -> str:
        return f"{name}.{self._kind}"

    def _cast(self, source: str, target: str, data_type: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [target], name=f"{source}.cast", to=data_type)

    def _constant(self, name: str) -> str:
        if name not in self._stored:
            self._stored.add(name)
            values = self._graph.constant(name).astype(self._dtype)
            self._model.graph.initializer.append(numpy_helper.from_array(values, self._half(name)))
        return self._half(name)

    def _half_places(self, node: onnx.NodeProto) -> list[int]:
        """The inputs of a node that are float32 and may be in half precision; others, such as sizes, are not."""
        return [
            index
            for index, name in enumerate(node.input)
            if self._types.get(name) == TensorProto.FLOAT and self._allowed(_formal(self._schema(node).inputs, index))
        ]

    def _schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema:
        return onnx.defs.get_schema(node.op_type, self._opset, node.domain)

    def _allowed(self, formal: onnx.defs.OpSchema.FormalParameter) -> bool:
        return _SCHEMA_TYPES[self._kind] in formal.types

    def _is_half(self, node: onnx.NodeProto) -> bool:
        """Whether a node can compute in half precision and keeps its results, but for rounding."""
        bodies = any(item.type in {item.GRAPH, item.GRAPHS} for item in node.attribute)
        known = all(name in self._types for name in node.output if name)
        if bodies or not known or not onnx.defs.has(node.op_type, self._opset, node.domain):
            return False
        floats = [index for index, name in enumerate(node.output) if self._types.get(name) == TensorProto.FLOAT]
        places = self._half_places(node)
        if not (floats if node.op_type == "Cast" else places):
            return False
        if not all(self._allowed(_formal(self._schema(node).outputs, index)) for index in floats):
            return False
        if self._kind == "fp16" and (self._overflows(node) or self._large & {*node.input, *node.output}):
            return False
        scale = 1 if node.op_type in {"QuantizeLinear", "DequantizeLinear"} else None
        stored = [index for index in places if self._graph.is_constant(node.input[index])]
        return all(self._fits(node.input[index], index == scale) for index in stored)

    def _fits(self, name: str, is_scale: bool) -> bool:
        """Whether half precision has the values of a constant.

        Weights too small for it become 0 or denormal, which moves results by less than their own rounding; a scale
        that does moves all that it scales.
        """
        values = self._graph.constant(name).astype(np.float64)
        finite = values[np.isfinite(values)]
        if self._kind == "fp16" and np.abs(finite).max(initial=0) > _LARGEST:
            return False
        moved = np.abs(finite.astype(self._dtype).astype(np.float64) - finite)
        return not is_scale or bool((moved <= _SCALE_ERROR * np.abs(finite)).all())

    def _raise_scales(self) -> None:
        """Give the channels whose weights are so small that FP16 has no scale for them the next scale that it has.

        The error is then at most that of the same weights in FP16 without quantization. With a float32 scale instead a
        Cast would stand between the weights and their layer, and TensorRT would see no quantized layer there.
        """
        for node in self._graph:
            stored = self._graph.initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if stored is None or stored.data_type not in _WEIGHT_TYPES or self._fits(node.input[1], True):
                continue
            integers, scales = self._graph.constant(node.input[0]), self._graph.constant(node.input[1])
            if np.abs(scales).max() > _LARGEST:
                continue
            halves = np.maximum(scales.astype(np.float16).astype(np.float64), _SMALLEST)
            halves = np.where(np.abs(halves - scales) <= _SCALE_ERROR * scales, scales, halves)
            halves = np.where(halves < scales, halves + _SMALLEST, halves)
            shape = [-1 if axis == attribute(node, "axis", 1) else 1 for axis in range(integers.ndim)]
            ratio = (scales / halves).reshape(shape if scales.ndim else ())
            moved = integers.astype(np.float64) * ratio
            if stored.data_type == TensorProto.INT8:
                moved = np.rint(moved)
            for name, values in ((node.input[0], moved.astype(integers.dtype)), (node.input[1], halves)):
                kept = values if name == node.input[0] else values.astype(np.float32)
                self._graph.initializers[name].CopyFrom(numpy_helper.from_array(kept, name))

    def _overflows(self, node: onnx.NodeProto) -> bool:
        if node.op_type in _OVERFLOWS:
            return True
        if node.op_type not in _MEANS:
            return False
        before, after = self._shapes.get(node.input[0]), self._shapes.get(node.output[0])
        if node.op_type == "AveragePool":
            kernel = next(item.ints for item in node.attribute if item.name == "kernel_shape")
            area = math.prod(kernel)
        elif before is None or after is None or None in before[1:]:
            return True  # over an area of any size
        else:
            area = math.prod(size or 1 for size in before) // max(math.prod(size or 1 for size in after), 1)
        span = self._ranges.get(node.input[0])
        largest = _USUAL if span is None else _HEADROOM * max(abs(span.low), abs(span.high))
        return area * largest > _LARGEST

    def _out_of_range(self) -> set[str]:
        """Tensors that may hold what FP16 has not, and those that lead to them without making values smaller."""
        large = {
            name for name, span in self._ranges.items() if _HEADROOM * max(abs(span.low), abs(span.high)) > _LARGEST
        }
        for node in reversed(list(self._graph)):
            if node.op_type in _PASSES_ON and node.output[0] in large:
                large.add(node.input[0])
        return large

    def _exact_nodes(self) -> set[str]:
        """First outputs of nodes that stay float32 for what they are for.

        Normalisation of pixels and arithmetic of shapes: all before the first layers with weights but DequantizeLinear.
        Arithmetic of boxes: all behind the prediction heads of a detector, up to the next layer with weights.
        """
        heads = prediction_heads(self._graph)
        behind_weights: set[str] = set()
        behind_heads: set[str] = set()
        exact = set()
        for node in self._graph:
            read = set(reads(node))
            if node.op_type in _WEIGHTED:
                behind_weights |= set(node.output)
                behind_heads |= set(node.output) if node.output[0] in heads else set()
                continue
            if read & behind_weights:
                behind_weights |= set(node.output)
            elif node.op_type != "DequantizeLinear":
                exact.add(node.output[0])
            if node.op_type in _EXACT:
                exact.add(node.output[0])
            if read & behind_heads:
                behind_heads |= set(node.output)
                exact.add(node.output[0])
        return exact

    def _read_as_float(self, halves: Mapping[str, list[int]]) -> set[str]:
        """Tensors that the graph returns, or that a node or the body of one reads in float32."""
        names = set(self._graph.outputs)
        for node in self._graph:
            places = halves.get(node.output[0], [])
            names |= {name for index, name in enumerate(node.input) if index not in places}
            names |= {name for item in node.attribute for body in [item.g, *item.graphs] for name in _captured(body)}
        return names


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter:
    """The description of input or output number `index`; the last one may stand for any number."""
    return parameters[min(index, len(parameters) - 1)]


def _captured(body: onnx.GraphProto) -> Iterable[str]:
    """Every name that a body of control flow mentions: those of the graph around it among them."""
    for node in body.node:
        yield from node.input
        for item in node.attribute:
            for inner in [item.g, *item.graphs]:
                yield from _captured(inner)
    yield from (value.name for value in body.output)
