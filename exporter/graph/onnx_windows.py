"""ONNX operators that slide a window over an image, in PyTorch: convolutions and pools, with pads of every kind."""

import onnx
import torch.nn.functional as F
from torch import Tensor

from convoynet.exporter.graph.onnx_graph import attribute, untrainable
from convoynet.exporter.graph.onnx_rounding import Operation


def convolution(node: onnx.NodeProto) -> Operation:
    """Conv, of one or two axes."""
    groups = int(attribute(node, "group", 1))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = list(weight.shape[2:])  # which the node need not state
        _, strides, dilations = _window(node, len(kernel))
        convolve = F.conv2d if len(kernel) == 2 else F.conv1d
        padded, inner = _padded(x, _pads(node, x, kernel), 0.0)
        return convolve(padded, weight, bias, strides, inner, dilations, groups)

    return run


def max_pool(node: onnx.NodeProto) -> Operation:
    """MaxPool, of two axes; raises BadInput for others, and for its indices."""
    kernel = list(attribute(node, "kernel_shape", []))
    _, strides, dilations = _window(node, len(kernel))
    ceil = bool(attribute(node, "ceil_mode", 0))
    if len(node.output) > 1 or len(kernel) != 2:
        raise untrainable(node, "indices or other than two axes")

    def run(x: Tensor) -> Tensor:
        padded, inner = _padded(x, _pads(node, x, kernel), float("-inf"))
        return F.max_pool2d(padded, kernel, strides, inner, dilations, ceil)

    return run


def average_pool(node: onnx.NodeProto) -> Operation:
    """AveragePool, of two axes; raises BadInput for others, and for what PyTorch has none of."""
    kernel = list(attribute(node, "kernel_shape", []))
    stated, strides, dilations = _window(node, len(kernel))
    ceil = bool(attribute(node, "ceil_mode", 0))
    counts_pads = bool(attribute(node, "count_include_pad", 0))
    if len(kernel) != 2 or any(step != 1 for step in dilations):
        raise untrainable(node, "dilations or other than two axes")
    if _begins_differ(stated) and not counts_pads:
        raise untrainable(node, f"the pads {stated}")

    def run(x: Tensor) -> Tensor:
        pads = _pads(node, x, kernel)
        if _begins_differ(pads) and not counts_pads:
            raise untrainable(node, f"the pads {pads} of auto_pad")
        padded, inner = _padded(x, pads, 0.0)
        return F.avg_pool2d(padded, kernel, strides, inner, ceil, counts_pads)

    return run


def _pads(node: onnx.NodeProto, x: Tensor, kernel: list[int]) -> list[int]:
    """The pads of a convolution or a pool, the begins of all axes and then the ends, as they are stated or follow."""
    automatic = attribute(node, "auto_pad", b"NOTSET")
    stated, strides, dilations = _window(node, len(kernel))
    if automatic in {b"NOTSET", b""}:
        return stated
    if automatic == b"VALID":
        return [0] * len(stated)
    begins, ends = [], []
    for size, cells, step, spread in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        missing = max((-(-size // step) - 1) * step + spread * (cells - 1) + 1 - size, 0)
        less, more = missing // 2, missing - missing // 2
        begins.append(more if automatic == b"SAME_LOWER" else less)
        ends.append(less if automatic == b"SAME_LOWER" else more)
    return begins + ends


def _window(node: onnx.NodeProto, dimensions: int) -> tuple[list[int], list[int], list[int]]:
    """(pads, strides, dilations) of a convolution or a pool."""
    return (
        list(attribute(node, "pads", [0] * 2 * dimensions)),
        list(attribute(node, "strides", [1] * dimensions)),
        list(attribute(node, "dilations", [1] * dimensions)),
    )


def _begins_differ(pads: list[int]) -> bool:
    return pads[: len(pads) // 2] != pads[len(pads) // 2 :]


def _padded(x: Tensor, pads: list[int], value: float) -> tuple[Tensor, list[int]]:
    """The input, and the padding that the operation itself has to add: PyTorch's adds the same on both sides."""
    half = len(pads) // 2
    if not _begins_differ(pads):
        return x, pads[:half]
    pairs = [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[half + axis])]
    return F.pad(x, pairs, value=value), [0] * half
