"""What ONNX's operators do to the axes of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_graph import attribute
from convoynet.exporter.inspecting.receptive_field import (
    Aligned,
    Moved,
    Multiplied,
    Reduced,
    Reshaped,
    Rule,
    Shape,
    Unknown,
    Window,
    Windowed,
    padded,
    resampled,
    sliced,
    sliding,
    transposed,
)

_POINTWISE = {
    "Abs", "Add", "BatchNormalization", "BitShift", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Div", "Dropout",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LRN", "LeakyRelu", "Log", "Max",
    "Mean", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where", "Expand",
}  # fmt: skip
_TAPS = {b"nearest": 1, b"linear": 2, b"cubic": 4}
_BORDERS = {b"constant": "zeros", b"edge": "edge", b"reflect": "reflect"}
_PLACES = {
    b"half_pixel": "half_pixel", b"pytorch_half_pixel": "half_pixel", b"asymmetric": "asymmetric",
    b"half_pixel_symmetric": "half_pixel", b"align_corners": "align_corners",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A node and what is known of it.

    Attributes:
        node: the operator.
        before: shape of its first input that depends on the image.
        after: shape of its first output.
        kernel: shape of its weight; empty where it has none.
        constants: value of each input, None where it is not stored or not there.
    """

    node: onnx.NodeProto
    before: Shape
    after: Shape
    kernel: Shape
    constants: Sequence[np.ndarray | None]

    def setting(self, name: str, index: int) -> list[int] | None:
        """A list of integers that older operator sets have as an attribute, newer ones as an input."""
        stored = self.constants[index] if index < len(self.constants) else None
        given = attribute(self.node, name, None) if stored is None else stored
        return None if given is None else [int(item) for item in np.atleast_1d(given)]

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.input) and bool(self.node.input[index])


def rule_from_onnx(reading: Reading) -> Rule:
    """Say what an operator does; `Unknown` for one that is not known, or whose settings are computed."""
    kind = reading.node.op_type
    if reading.node.domain not in ("", "ai.onnx"):
        return Unknown()
    if kind in _POINTWISE:
        own = kind == "BatchNormalization" and attribute(reading.node, "training_mode", 0)
        return Unknown() if own else Aligned()
    return _RULES[kind](reading) if kind in _RULES else Unknown()


def _windows(reading: Reading) -> Rule:
    node, rank = reading.node, len(reading.before) - 2
    kernel = attribute(node, "kernel_shape", list(reading.kernel[2:]))
    strides, dilations = (attribute(node, name, [1] * rank) for name in ("strides", "dilations"))
    pads = attribute(node, "pads", [0] * (2 * rank))
    windows = {}
    for index, size in enumerate(kernel):
        stride, dilation = strides[index], dilations[index]
        padding = (pads[index], pads[index + rank])
        automatic = attribute(node, "auto_pad", b"NOTSET")
        if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
            cells = reading.before[2 + index]
            total = max((ceil(cells / stride) - 1) * stride + dilation * (size - 1) + 1 - cells, 0)
            small, large = total // 2, total - total // 2
            padding = (small, large) if automatic == b"SAME_UPPER" else (large, small)
        if node.op_type == "ConvTranspose":
            extra = attribute(node, "output_padding", [0] * rank)[index]
            windows[2 + index] = transposed(size, stride, padding, dilation, extra)
        else:
            up = bool(attribute(node, "ceil_mode", 0))
            windows[2 + index] = sliding(size, stride, padding, dilation, ceil_mode=up)
    return Windowed(windows)


def _global(reading: Reading) -> Rule:
    return Reduced(frozenset(range(2, len(reading.before))), keep=True)


def _reduction(reading: Reading) -> Rule:
    rank = len(reading.before)
    dims = reading.setting("axes", 1)
    if dims is None and (reading.has(1) or attribute(reading.node, "noop_with_empty_axes", 0)):
        return Unknown()
    keep = bool(attribute(reading.node, "keepdims", 1))
    return Reduced(frozenset(dim % rank for dim in (range(rank) if dims is None else dims)), keep=keep)


def _transposition(reading: Reading) -> Rule:
    rank = len(reading.before)
    order = list(attribute(reading.node, "perm", range(rank)[::-1]))
    return Moved(tuple(order.index(dim) for dim in range(rank)))


def _insertion(reading: Reading) -> Rule:
    dims = reading.setting("axes", 1)
    if dims is None:
        return Unknown()
    rank = len(reading.after)
    new = {dim % rank for dim in dims}
    return Moved(tuple(dim for dim in range(rank) if dim not in new))


def _removal(reading: Reading) -> Rule:
    rank = len(reading.before)
    dims = reading.setting("axes", 1)
    if dims is None and reading.has(1):
        return Unknown()
    gone = {dim % rank for dim in dims} if dims is not None else {d for d in range(rank) if reading.before[d] == 1}
    return Moved(tuple(None if dim in gone else dim - sum(other < dim for other in gone) for dim in range(rank)))


def _selection(reading: Reading) -> Rule:
    """Gather with one index, which takes a dimension away; a list of indices shuffles the positions along it."""
    rank = len(reading.before)
    dim = attribute(reading.node, "axis", 0) % rank
    indices = reading.constants[1]
    if indices is None or indices.ndim:
        return Aligned(mixed=dim) if indices is not None and indices.ndim == 1 else Unknown()
    return Moved(tuple(None if old == dim else old - (old > dim) for old in range(rank)))


def _slice(reading: Reading) -> Rule:
    starts, stops = reading.setting("starts", 1), reading.setting("ends", 2)
    if starts is None or stops is None:
        return Unknown()
    rank = len(reading.before)
    dims = reading.setting("axes", 3) or list(range(len(starts)))
    steps = reading.setting("steps", 4) or [1] * len(starts)
    if any(step < 1 for step in steps):
        return Unknown()
    windows = {}
    for dim, *bounds in zip(dims, starts, stops, steps, strict=True):
        size = reading.before[dim]
        start, stop, step = slice(*bounds).indices(size)
        windows[dim % rank] = sliced(start, stop, step, size)
    return Windowed(windows)


def _padding(reading: Reading) -> Rule:
    pads, dims = reading.setting("pads", 1), reading.setting("axes", 3)
    if pads is None:
        return Unknown()
    rank = len(reading.before)
    half = len(pads) // 2
    dims = list(range(half)) if dims is None else dims
    border = _BORDERS.get(attribute(reading.node, "mode", b"constant"))
    if border is None:
        return Unknown()
    return Windowed({dim % rank: padded((pads[i], pads[i + half]), border) for i, dim in enumerate(dims)})


def _resampling(reading: Reading) -> Rule:
    node = reading.node
    # Before opset 11 there are no such attributes, and scales are the second input, or an attribute.
    old = node.op_type == "Upsample" or len(node.input) == 2
    place = b"asymmetric" if old else attribute(node, "coordinate_transformation_mode", b"half_pixel")
    nearest = attribute(node, "nearest_mode", b"round_prefer_floor").decode()
    taps = _TAPS.get(attribute(node, "mode", b"nearest"))
    if taps is None or place not in _PLACES or attribute(node, "antialias", 0):
        return Unknown()
    stored = next((each for each in reading.constants[1 if old else 2 :][:1] if each is not None and each.size), None)
    scales = attribute(node, "scales", None) if stored is None else stored.tolist()
    axes = [axis % len(reading.before) for axis in attribute(node, "axes", range(len(reading.before)))]
    by_axis = {} if scales is None else dict(zip(axes, scales, strict=True))
    windows: dict[int, Window] = {}
    for dim, (before, after) in enumerate(zip(reading.before, reading.after, strict=True)):
        scale = by_axis.get(dim)
        if (scale or 1) == 1 and before == after:
            continue
        if place == b"half_pixel_symmetric" and scale is not None and scale * before != after:
            return Unknown()
        # Of one output alone it is the first cell.
        first = place == b"pytorch_half_pixel" and after == 1
        # ONNX Runtime rounds up where it makes less of it.
        rounding = ("ceil" if after < before else "floor") if old else nearest
        windows[dim] = resampled(before, after, taps, "asymmetric" if first else _PLACES[place], rounding, scale)
    return Windowed(windows)


def _along(default: int) -> Callable[[Reading], Rule]:
    return lambda reading: Aligned(mixed=attribute(reading.node, "axis", default))


def _always(rule: Rule) -> Callable[[Reading], Rule]:
    return lambda reading: rule


_RULES: dict[str, Callable[[Reading], Rule]] = {
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "MaxPool", "AveragePool", "LpPool"), _windows
    ),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _global),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"), _reduction),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"), _always(Multiplied())),
    **dict.fromkeys(("Flatten", "Reshape"), _always(Reshaped())),
    "Concat": _along(1),
    "Split": _along(0),
    "Softmax": _along(-1),
    "LogSoftmax": _along(-1),
    "Transpose": _transposition,
    "Unsqueeze": _insertion,
    "Squeeze": _removal,
    "Gather": _selection,
    "Slice": _slice,
    "Pad": _padding,
    "Resize": _resampling,
    "Upsample": _resampling,
}
