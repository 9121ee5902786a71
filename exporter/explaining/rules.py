"""The gradient of each operator that heads are made of, as ONNX nodes.

Each entry of `RULES` takes the writer, a node, which of its inputs is asked for, and the gradient at its output; it
returns the gradient at that input. All gradients are float32 and have the shape of the tensor that they belong to.
"""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.feature_map import WHOLE
from convoynet.exporter.explaining.writer import Writer
from convoynet.exporter.graph.onnx_graph import CUTS_ABOVE, CUTS_BELOW, attribute

Rule = Callable[[Writer, onnx.NodeProto, int, str], str]

# The axes of a map that are places.
PLACES = (2, 3)
ROW_RANK = 2
# What keeps, moves, selects or averages numbers.
_KEEPING = (
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Concat", "Reshape",
    "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DequantizeLinear", "Identity", "Dropout", "Cast",
)  # fmt: skip
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus")
_INTEGERS = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16)


def no_rule(node: onnx.NodeProto, how: str = "") -> BadInput:
    """What to say of a node whose gradient is not known here; `how`, in which of its uses."""
    return BadInput(
        f"the explanation needs the gradient of {node.op_type} ({node.name or node.output[0]!r}){how}, between the map "
        f"of features and the classes, and knows that of {', '.join(sorted(RULES))} alone"
    )


def shape_of(writer: Writer, tensor: str) -> tuple[int | None, ...]:
    """The shape of a tensor.

    Raises:
        BadInput: it is not known, not even which axes it has.
    """
    known = writer.head.shapes.get(tensor)
    if known is None:
        raise BadInput(f"the explanation needs the shape of {tensor!r}, which the graph does not say")
    return known


def axes_of(writer: Writer, node: onnx.NodeProto) -> tuple[int, ...]:
    """The axes that a reduction is over, ascending and from the front; those of one that names none are all.

    Raises:
        BadInput: they are computed.
    """
    rank = len(shape_of(writer, node.input[0]))
    stated = attribute(node, "axes", None)
    if len(node.input) > 1 and node.input[1]:
        values = writer.known(node.input[1])
        if values is None:
            raise no_rule(node, " over axes that are computed")
        stated = values.astype(int).tolist()
    if not stated:
        stated = [] if attribute(node, "noop_with_empty_axes", 0) else range(rank)
    return tuple(sorted(int(axis) % rank for axis in stated))


def _same(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return at


def _masked(writer: Writer, at: str, *conditions: str) -> str:
    """The gradient where all conditions hold, else 0."""
    held = conditions[0]
    for more in conditions[1:]:
        held = writer.add("And", [held, more])
    return writer.add("Where", [held, at, writer.constant(0.0)])


def _relu(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return _masked(writer, at, writer.add("Greater", [writer.value(node.output[0]), writer.constant(0.0)]))


def _quantize(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    """Rounding hands the gradient on; but where it stands for a ReLU or a Clip, which are in no graph, it cuts off."""
    if index:
        raise no_rule(node, " with respect to its scale")
    below, above = cuts(writer, node)
    if not (below or above):
        return at
    scale, zero, low, high = _levels(writer, node)
    readers = writer.head.graph.readers(node.output[0])
    numbers = next((each.output[0] for each in readers if each.op_type == "DequantizeLinear"), None)
    if numbers is None:  # they are moved while they are integers
        numbers, scale, zero = node.output[0], 1.0, 0
    made = writer.value(numbers)
    # Half a level away, where no number is.
    conditions = []
    if below:
        conditions.append(writer.add("Greater", [made, writer.constant((low - zero + 0.5) * scale)]))
    if above:
        conditions.append(writer.add("Less", [made, writer.constant((high - zero - 0.5) * scale)]))
    return _masked(writer, at, *conditions)


def cuts(writer: Writer, node: onnx.NodeProto) -> tuple[bool, bool]:
    """Whether a QuantizeLinear stands for an activation that cuts off: at 0 and below, and above.

    That it stands for a ReLU shows in integers whose least is 0; for a Clip, the quantizer of this package says so.
    """
    below = CUTS_BELOW in node.doc_string or (
        _starts_at_zero(writer, node) and not _not_negative(writer, node.input[0])
    )
    return below, CUTS_ABOVE in node.doc_string


def _starts_at_zero(writer: Writer, node: onnx.NodeProto) -> bool:
    """Whether a QuantizeLinear makes 0 of all that is below."""
    kind = writer.head.types.get(node.output[0])
    if kind not in _INTEGERS:
        return False
    low = np.iinfo(helper.tensor_dtype_to_np_dtype(kind)).min
    zero = writer.known(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if zero is None:
        raise no_rule(node, " with a computed zero point")
    return bool((zero == low).any())


def _levels(writer: Writer, node: onnx.NodeProto) -> tuple[float, int, int, int]:
    """The scale of a QuantizeLinear, its zero point, and the least and the largest of its integers."""
    kind = np.iinfo(helper.tensor_dtype_to_np_dtype(writer.head.types[node.output[0]]))
    stored = [writer.known(name) for name in node.input[1:] if name]
    if any(each is None or each.size != 1 for each in stored):
        raise no_rule(node, " with a computed scale, or one for each channel, that stands for a ReLU")
    scale, zero, *_ = (*(float(each.reshape(())) for each in stored if each is not None), 0)
    return float(scale), int(zero), int(kind.min), int(kind.max)


def _not_negative(writer: Writer, tensor: str) -> bool:
    """Whether no number of a tensor is below 0."""
    known = writer.known(tensor)
    if known is not None:
        return bool((known >= 0).all())
    node = writer.head.graph.producers.get(tensor)
    if node is None:
        return False
    if node.op_type in _NOT_NEGATIVE:
        return True
    if node.op_type == "Clip":
        low = writer.known(node.input[1]) if len(node.input) > 1 and node.input[1] else attribute(node, "min", None)
        return low is not None and bool((np.asarray(low) >= 0).all())
    if node.op_type == "QuantizeLinear":
        return _starts_at_zero(writer, node)
    read = [name for name in node.input if name and writer.head.graph.is_computed(name)]
    read = [name for name in read if writer.head.types.get(name) not in WHOLE]
    return node.op_type in _KEEPING and all(_not_negative(writer, name) for name in read)


def _leaky_relu(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    slope = writer.add("Mul", [at, writer.constant(attribute(node, "alpha", 0.01))])
    above = writer.add("Greater", [writer.value(node.input[0]), writer.constant(0.0)])
    return writer.add("Where", [above, at, slope])


def _clip(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    made = writer.value(node.output[0], exact=True)
    bounds = [writer.known(name) if name else None for name in [*node.input[1:], "", ""][:2]]
    if any(name and bound is None for name, bound in zip(node.input[1:], bounds, strict=False)):
        raise no_rule(node, " with computed bounds")
    conditions = [
        writer.add(operator, [made, writer.constant(bound)])
        for operator, bound in zip(("Greater", "Less"), bounds, strict=True)
        if bound is not None
    ]
    return _masked(writer, at, *conditions) if conditions else at


def _extreme(operator: str) -> Rule:
    """Of Max and Min of a tensor and constants."""

    def rule(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
        if sum(writer.known(name) is None for name in node.input) > 1:
            raise no_rule(node, " of several computed tensors")
        read, made = (writer.value(name, exact=True) for name in (node.input[index], node.output[0]))
        return _fitted(writer, node, index, _masked(writer, at, writer.add(operator, [read, made])))

    return rule


def _sigmoid(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    made = writer.value(node.output[0])
    rest = writer.add("Sub", [writer.constant(1.0), made])
    return writer.add("Mul", [at, writer.add("Mul", [made, rest])])


def _tanh(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    made = writer.value(node.output[0])
    return writer.add("Mul", [at, writer.add("Sub", [writer.constant(1.0), writer.add("Mul", [made, made])])])


def _hard_sigmoid(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    made = writer.value(node.output[0], exact=True)
    conditions = [
        writer.add(operator, [made, writer.constant(bound)]) for operator, bound in (("Greater", 0.0), ("Less", 1.0))
    ]
    slope = writer.constant(attribute(node, "alpha", 0.2))
    return writer.add("Mul", [_masked(writer, at, *conditions), slope])


def _hard_swish(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    read = writer.value(node.input[0])
    # x (x + 3) / 6 between -3 and 3, of which this is the derivative; x above.
    slope = writer.add("Add", [writer.add("Mul", [read, writer.constant(1 / 3)]), writer.constant(0.5)])
    below = writer.add("Less", [read, writer.constant(-3.0)])
    above = writer.add("Greater", [read, writer.constant(3.0)])
    slope = writer.add("Where", [above, writer.constant(1.0), slope])
    return writer.add("Mul", [at, writer.add("Where", [below, writer.constant(0.0), slope])])


def _neg(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return writer.add("Neg", [at])


def _exp(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return writer.add("Mul", [at, writer.value(node.output[0])])


def _sqrt(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return writer.add("Div", [writer.add("Mul", [at, writer.constant(0.5)]), writer.value(node.output[0])])


def _pow(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    power = writer.known(node.input[1])
    if index or power is None or power.size != 1:
        raise no_rule(node, " with another exponent than one stored number")
    exponent = float(power.reshape(()))
    read = writer.value(node.input[0])
    below = read if exponent == 2 else writer.add("Pow", [read, writer.constant(exponent - 1)])
    return writer.add("Mul", [at, writer.add("Mul", [below, writer.constant(exponent)])])


def _fitted(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    """A gradient of the shape of a node's output as one of the shape of an input that was broadcast to it."""
    result, operand = shape_of(writer, node.output[0]), shape_of(writer, node.input[index])
    ahead = len(result) - len(operand)
    wide = [axis for axis, size in enumerate(result) if axis < ahead or (operand[axis - ahead] == 1 and size != 1)]
    if not wide:
        return at
    if all(axis < ahead for axis in wide):
        return writer.add("ReduceSum", [at, writer.whole(*wide)], keepdims=0)
    kept = writer.add("ReduceSum", [at, writer.whole(*wide)], keepdims=1)
    return kept if not ahead else writer.add("Squeeze", [kept, writer.whole(*range(ahead))])


def _add(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return _fitted(writer, node, index, at)


def _sub(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return _fitted(writer, node, index, writer.add("Neg", [at]) if index else at)


def _mul(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    return _fitted(writer, node, index, writer.add("Mul", [at, writer.value(node.input[1 - index])]))


def _div(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    below = writer.value(node.input[1])
    passed = writer.add("Div", [at, below])
    if index:
        share = writer.add("Div", [writer.value(node.output[0]), writer.constant(-1.0)])
        passed = writer.add("Mul", [passed, share])
    return _fitted(writer, node, index, passed)


def matrix(writer: Writer, node: onnx.NodeProto) -> np.ndarray | None:
    """The weights of a fully connected layer that reads rows, [outputs, inputs]; None where it is another node."""
    if node.op_type not in ("Gemm", "MatMul") or attribute(node, "transA", 0):
        return None
    weights = writer.known(node.input[1])
    if weights is None or weights.ndim != ROW_RANK or len(shape_of(writer, node.input[0])) != ROW_RANK:
        return None
    factor = np.float32(attribute(node, "alpha", 1.0))
    return factor * (weights if attribute(node, "transB", 0) else weights.T)


def _weighed(writer: Writer, weights: str, at: str, axis: int) -> tuple[str, str]:
    """The gradient and the weights to multiply it with; those that are stored as integers stay these.

    Their scales, one for each output of the layer, weigh the gradient: runtimes round it where they find a layer of
    integers, and no copy of the weights in float is stored.
    """
    stored = writer.integers(weights, axis)
    if stored is None:
        return at, writer.value(weights)
    integers, scales = stored
    shape = [1, -1, *[1] * (len(shape_of(writer, weights)) - ROW_RANK)]
    weighed = writer.add("Mul", [at, writer.constant(writer.head.graph.constant(scales).reshape(shape))])
    return weighed, writer.add("Cast", [integers], to=TensorProto.FLOAT)


def _fully_connected(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    if index == 2:
        factor = attribute(node, "beta", 1.0)
        added = at if factor == 1 else writer.add("Mul", [at, writer.constant(factor)])
        return _fitted(writer, node, index, added)
    if index or matrix(writer, node) is None:
        raise no_rule(node, " of two computed tensors, or of other than rows")
    across = int(attribute(node, "transB", 0))
    at, weights = _weighed(writer, node.input[1], at, 1 - across)
    passed = writer.add("Gemm", [at, weights], transB=1 - across)
    factor = attribute(node, "alpha", 1.0)
    return passed if factor == 1 else writer.add("Mul", [passed, writer.constant(factor)])


def _batch_norm(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    stored = [writer.known(name) for name in node.input[1:]]
    if index or any(each is None for each in stored):
        raise no_rule(node, " with computed statistics")
    scale, _, _, variance = (each.astype(np.float64) for each in stored if each is not None)
    slope = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    rank = len(shape_of(writer, node.input[0]))
    return writer.add("Mul", [at, writer.constant(slope.reshape(1, -1, *(1,) * (rank - 2)))])


def _spread(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    """Of a mean or a sum: each element gets the same."""
    shape = shape_of(writer, node.input[0])
    axes = tuple(range(2, len(shape))) if node.op_type == "GlobalAveragePool" else axes_of(writer, node)
    if index or 0 in axes or not all(shape[axis] for axis in axes):
        raise no_rule(node, " over the images, or over axes of unknown size")
    if not axes:
        return at
    keeps = node.op_type == "GlobalAveragePool" or attribute(node, "keepdims", 1)
    passed = at if keeps else writer.add("Unsqueeze", [at, writer.whole(*axes)])
    sizes = [(shape[axis] or 1) if axis in axes else 1 for axis in range(len(shape))]
    share = 1.0 if node.op_type == "ReduceSum" else 1 / prod(sizes)
    return writer.add("Mul", [passed, writer.constant(np.full(sizes, share))])


def _reshaped(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    shape = shape_of(writer, node.input[0])
    if index or not all(shape[1:]):
        raise no_rule(node, " to or from a shape that is computed")
    return writer.add("Reshape", [at, writer.whole(-1, *(size or 1 for size in shape[1:]))])


def _transpose(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    order = list(attribute(node, "perm", range(len(shape_of(writer, node.input[0])))[::-1]))
    return writer.add("Transpose", [at], perm=[order.index(axis) for axis in range(len(order))])


def _concat(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    shapes = [shape_of(writer, name) for name in node.input]
    axis = int(attribute(node, "axis", 0)) % len(shapes[0])
    sizes = [shape[axis] for shape in shapes]
    if axis == 0 or not all(sizes):
        raise no_rule(node, " over the images, or of unknown sizes")
    begin = sum(size or 0 for size in sizes[:index])
    bounds = [writer.whole(each) for each in (begin, begin + (sizes[index] or 0), axis)]
    return writer.add("Slice", [at, *bounds])


def _conv(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    """The transposed convolution with the same weights."""
    weights = writer.known(node.input[1])
    if index or weights is None or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        raise no_rule(node, " with computed weights, or padding that its input decides (auto_pad)")
    places = weights.ndim - 2
    read, made = shape_of(writer, node.input[0]), shape_of(writer, node.output[0])
    pads = list(attribute(node, "pads", [0] * 2 * places))
    strides = list(attribute(node, "strides", [1] * places))
    dilations = list(attribute(node, "dilations", [1] * places))
    # What a stride leaves over at the far end gets no gradient.
    over = [
        (read[axis + 2] or 0)
        + pads[axis]
        + pads[places + axis]
        - (((made[axis + 2] or 0) - 1) * strides[axis] + dilations[axis] * (weights.shape[axis + 2] - 1) + 1)
        for axis in range(places)
    ]
    return writer.add(
        "ConvTranspose",
        list(_weighed(writer, node.input[1], at, 0)),
        kernel_shape=list(weights.shape[2:]),
        pads=pads,
        strides=strides,
        dilations=dilations,
        group=int(attribute(node, "group", 1)),
        output_padding=over,
    )


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Add": _add,
        "BatchNormalization": _batch_norm,
        "Cast": _same,
        "Clip": _clip,
        "Concat": _concat,
        "Conv": _conv,
        "DequantizeLinear": _same,
        "Div": _div,
        "Dropout": _same,
        "Exp": _exp,
        "Flatten": _reshaped,
        "Gemm": _fully_connected,
        "GlobalAveragePool": _spread,
        "HardSigmoid": _hard_sigmoid,
        "HardSwish": _hard_swish,
        "Identity": _same,
        "LeakyRelu": _leaky_relu,
        "MatMul": _fully_connected,
        "Max": _extreme("Equal"),
        "Min": _extreme("Equal"),
        "Mul": _mul,
        "Neg": _neg,
        "Pow": _pow,
        "QuantizeLinear": _quantize,
        "ReduceMean": _spread,
        "ReduceSum": _spread,
        "Relu": _relu,
        "Reshape": _reshaped,
        "Sigmoid": _sigmoid,
        "Sqrt": _sqrt,
        "Squeeze": _reshaped,
        "Sub": _sub,
        "Tanh": _tanh,
        "Transpose": _transpose,
        "Unsqueeze": _reshaped,
    }
)
