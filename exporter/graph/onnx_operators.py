"""ONNX operators in PyTorch, differentiable: those that `onnx_from_torch` writes, and pairs that quantize to 8 bits.

Each entry of `OPERATORS` takes a node and returns what computes it: from the node's inputs, None for one that is left
out, to its output or outputs. Shapes and axes are int64 tensors of any device; images are float32 NCHW.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from convoynet.exporter.errors import NoGradient
from convoynet.exporter.graph.onnx_graph import attribute, untrainable
from convoynet.exporter.graph.onnx_rounding import Operation, dequantize, quantize
from convoynet.exporter.graph.onnx_windows import average_pool, convolution, max_pool

Inputs = Sequence[Tensor | None]
_WHOLE_SOFTMAX_UNTIL = 13
"""Before it Softmax is taken over its axis and all behind it, and over axis 1 by default."""
_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


def operation(node: onnx.NodeProto, opset: int = _WHOLE_SOFTMAX_UNTIL) -> Operation:
    """What computes a node of a graph of that opset. What older ones have as attributes is read where it is given.

    Raises:
        BadInput: the operator, or a way of using it, is not among those of the networks here.
    """
    make = OPERATORS.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if make is None:
        raise NoGradient(
            f"operator {node.op_type} of node {node.name or node.output[0]!r}",
            f", or use a network of {', '.join(sorted(OPERATORS))}",
        )
    if node.op_type == "Softmax" and opset < _WHOLE_SOFTMAX_UNTIL:
        return _whole_softmax(node)
    return make(node)


def _gemm(node: onnx.NodeProto) -> Operation:
    alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    left, right = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        product = (a.T if left else a) @ (b.T if right else b)
        product = product if alpha == 1 else alpha * product
        return product if c is None else product + (c if beta == 1 else beta * c)

    return run


def _batch_norm(node: onnx.NodeProto) -> Operation:
    epsilon = float(attribute(node, "epsilon", 1e-5))
    if attribute(node, "training_mode", 0):
        raise untrainable(node, "training_mode")

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)

    return run


def _response_norm(node: onnx.NodeProto) -> Operation:
    size = int(attribute(node, "size", 0))
    alpha, beta = float(attribute(node, "alpha", 1e-4)), float(attribute(node, "beta", 0.75))
    bias = float(attribute(node, "bias", 1.0))
    if size % 2 == 0:
        raise untrainable(node, "an even size")
    return lambda x: F.local_response_norm(x, size, alpha, beta, bias)


def _clip(node: onnx.NodeProto) -> Operation:
    least, most = attribute(node, "min", None), attribute(node, "max", None)

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        bottom, top = least if low is None else low, most if high is None else high
        return x if bottom is None and top is None else torch.clamp(x, bottom, top)

    return run


def _reduction(reduce: Callable[..., Tensor]) -> Callable[[onnx.NodeProto], Operation]:
    def make(node: onnx.NodeProto) -> Operation:
        stated = attribute(node, "axes", None)
        keep, nothing = bool(attribute(node, "keepdims", 1)), bool(attribute(node, "noop_with_empty_axes", 0))

        def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
            over = _whole(axes) if axes is not None else list(stated or [])
            if not over and nothing:
                return x
            return reduce(x, dim=over or list(range(x.ndim)), keepdim=keep)

        return run

    return make


def _reshape(node: onnx.NodeProto) -> Operation:
    zero_is_zero = bool(attribute(node, "allowzero", 0))

    def run(x: Tensor, shape: Tensor) -> Tensor:
        wanted = _whole(shape)
        if not zero_is_zero:
            wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def _flatten(node: onnx.NodeProto) -> Operation:
    axis = int(attribute(node, "axis", 1))
    return lambda x: x.reshape(int(torch.tensor(x.shape[:axis]).prod()) if axis else 1, -1)


def _unsqueeze(node: onnx.NodeProto) -> Operation:
    stated = list(attribute(node, "axes", []))

    def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
        over = stated if axes is None else _whole(axes)
        rank = x.ndim + len(over)
        for axis in sorted(item % rank for item in over):
            x = x.unsqueeze(axis)
        return x

    return run


def _squeeze(node: onnx.NodeProto) -> Operation:
    stated = attribute(node, "axes", None)

    def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
        over = stated if axes is None else _whole(axes)
        return x.squeeze() if over is None else x.squeeze(tuple(over))

    return run


def _slice(node: onnx.NodeProto) -> Operation:
    stated = {name: list(attribute(node, name, [])) for name in ("starts", "ends", "axes")}

    def run(
        x: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        begins, stops = (
            stated[name] if given is None else _whole(given) for name, given in (("starts", starts), ("ends", ends))
        )
        over = _whole(axes) if axes is not None else stated["axes"] or list(range(len(begins)))
        strides = _whole(steps) if steps is not None else [1] * len(begins)
        index = [slice(None)] * x.ndim
        for axis, begin, stop, stride in zip(over, begins, stops, strides, strict=True):
            if stride < 1:
                raise untrainable(node, f"the step {stride}")
            index[axis] = slice(begin, stop, stride)
        return x[tuple(index)]

    return run


def _split(node: onnx.NodeProto) -> Operation:
    axis, parts = int(attribute(node, "axis", 0)), len(node.output)
    stated = attribute(node, "split", None)

    def run(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        if sizes is not None or stated is not None:
            return torch.split(x, list(stated) if sizes is None else _whole(sizes), dim=axis)
        return torch.split(x, -(-x.shape[axis] // parts), dim=axis)

    return run


def _pad(node: onnx.NodeProto) -> Operation:
    mode = attribute(node, "mode", b"constant").decode()
    if mode not in {"constant", "reflect", "edge"}:
        raise untrainable(node, f"the mode {mode}")

    own, filling = list(attribute(node, "pads", [])), float(attribute(node, "value", 0.0))

    def run(x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        stated = own if pads is None else _whole(pads)
        half = len(stated) // 2
        over = [axis % x.ndim for axis in _whole(axes)] if axes is not None else list(range(half))
        around = {axis: (stated[index], stated[half + index]) for index, axis in enumerate(over)}
        pairs = [pad for axis in reversed(range(x.ndim)) for pad in around.get(axis, (0, 0))]
        if mode == "constant":
            return F.pad(x, pairs, value=float(value) if value is not None else filling)
        while pairs and pairs[-2:] == [0, 0]:
            pairs = pairs[:-2]
        return F.pad(x, pairs, mode="reflect" if mode == "reflect" else "replicate")

    return run


def _resize(node: onnx.NodeProto) -> Operation:
    mode = attribute(node, "mode", b"nearest").decode()
    places = attribute(node, "coordinate_transformation_mode", b"half_pixel").decode()
    rounding = attribute(node, "nearest_mode", b"round_prefer_floor").decode()
    linear = mode == "linear" and places in {"half_pixel", "pytorch_half_pixel", "align_corners"}
    nearest = mode == "nearest" and places == "asymmetric" and rounding == "floor"
    if not (linear or nearest) or attribute(node, "antialias", 0) or attribute(node, "axes", None) is not None:
        raise untrainable(node, f"mode {mode}, {places}")

    def run(x: Tensor, _: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        if sizes is not None and sizes.numel():
            size = _whole(sizes)[2:]
        elif scales is not None:
            size = [int(old * factor) for old, factor in zip(x.shape[2:], scales.tolist()[2:], strict=True)]
        else:
            raise untrainable(node, "neither scales nor sizes")
        if nearest:
            return F.interpolate(x, size, mode="nearest")
        return F.interpolate(x, size, mode="bilinear", align_corners=places == "align_corners")

    return run


def _shape(node: onnx.NodeProto) -> Operation:
    start, end = int(attribute(node, "start", 0)), attribute(node, "end", None)
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _cast(node: onnx.NodeProto) -> Operation:
    dtype = _DTYPES.get(attribute(node, "to", 0))
    if dtype is None:
        raise untrainable(node, f"the type {attribute(node, 'to', 0)}")
    return lambda x: x.to(dtype)


def _gather(node: onnx.NodeProto) -> Operation:
    axis = int(attribute(node, "axis", 0))

    def run(x: Tensor, indices: Tensor) -> Tensor:
        place = axis % x.ndim
        chosen = torch.where(indices < 0, indices + x.shape[place], indices).to(x.device)
        taken = x.index_select(place, chosen.reshape(-1))
        return taken.reshape((*x.shape[:place], *chosen.shape, *x.shape[place + 1 :]))

    return run


def _gather_nd(node: onnx.NodeProto) -> Operation:
    if attribute(node, "batch_dims", 0):
        raise untrainable(node, "batch_dims")
    return lambda x, indices: x[tuple(indices.to(x.device).unbind(-1))]


def _hard_sigmoid(node: onnx.NodeProto) -> Operation:
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


def _transpose(node: onnx.NodeProto) -> Operation:
    order = attribute(node, "perm", None)
    return lambda x: x.permute(list(order) if order is not None else list(reversed(range(x.ndim))))


def _concat(node: onnx.NodeProto) -> Operation:
    axis = int(attribute(node, "axis", 0))
    return lambda *inputs: torch.cat(inputs, dim=axis)


def _softmax(node: onnx.NodeProto) -> Operation:
    axis = int(attribute(node, "axis", -1))
    return lambda x: F.softmax(x, dim=axis)


def _whole_softmax(node: onnx.NodeProto) -> Operation:
    axis = int(attribute(node, "axis", 1))
    # An axis of 0 takes all of it: there is nothing before it to keep apart.
    return lambda x: F.softmax(x.flatten(axis) if axis else x.reshape(-1), dim=-1).reshape(x.shape)


def _leaky_relu(node: onnx.NodeProto) -> Operation:
    slope = float(attribute(node, "alpha", 0.01))
    return lambda x: F.leaky_relu(x, slope)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _same(function: Operation) -> Callable[[onnx.NodeProto], Operation]:
    """For an operator without attributes."""
    return lambda node: function


def _whole(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1).tolist()]


OPERATORS: Mapping[str, Callable[[onnx.NodeProto], Operation]] = MappingProxyType(
    {
        "Add": _same(torch.add),
        "AveragePool": average_pool,
        "BatchNormalization": _batch_norm,
        "Cast": _cast,
        "Clip": _clip,
        "Concat": _concat,
        "Conv": convolution,
        "DequantizeLinear": dequantize,
        "Div": _same(_quotient),
        "Dropout": _same(lambda x, *_: x),
        "Exp": _same(torch.exp),
        "Expand": _same(lambda x, shape: x * x.new_ones(_whole(shape))),
        "Flatten": _flatten,
        "Gather": _gather,
        "GatherND": _gather_nd,
        "Gemm": _gemm,
        "GlobalAveragePool": _same(lambda x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)),
        "HardSigmoid": _hard_sigmoid,
        "HardSwish": _same(F.hardswish),
        "Identity": _same(lambda x: x),
        "LRN": _response_norm,
        "LeakyRelu": _leaky_relu,
        "MatMul": _same(torch.matmul),
        "MaxPool": max_pool,
        "Mul": _same(torch.mul),
        "Neg": _same(torch.neg),
        "Pad": _pad,
        "Pow": _same(torch.pow),
        "QuantizeLinear": quantize,
        "ReduceMean": _reduction(torch.mean),
        "ReduceSum": _reduction(torch.sum),
        "Relu": _same(F.relu),
        "Reshape": _reshape,
        "Resize": _resize,
        "Shape": _shape,
        "Sigmoid": _same(torch.sigmoid),
        "Slice": _slice,
        "Softmax": _softmax,
        "Split": _split,
        "Sqrt": _same(torch.sqrt),
        "Squeeze": _squeeze,
        "Sub": _same(torch.sub),
        "Tanh": _same(torch.tanh),
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)
