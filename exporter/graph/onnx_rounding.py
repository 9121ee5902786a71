"""The pair of ONNX operators that quantizes to 8 bits, in PyTorch, with a gradient."""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor

from convoynet.exporter.graph.onnx_graph import attribute, untrainable

Operation = Callable[..., Any]

# What an integer of a quantized tensor may be.
_RANGES = {onnx.TensorProto.UINT8: torch.uint8, onnx.TensorProto.INT8: torch.int8}


def quantize(node: onnx.NodeProto) -> Operation:
    """Rounds; the gradient goes straight through (Y. Bengio et al. 2013) where nothing is clipped. It stays float."""
    along = _along(node)
    stated = _RANGES.get(attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        kind = zero.dtype if zero is not None else stated
        if kind is None or kind not in _RANGES.values():
            raise untrainable(node, f"the type {kind}")
        limits = torch.iinfo(kind)
        scaled = x / along(scale.to(x.device), x)
        offset = along(zero.to(x.device), x).to(x.dtype) if zero is not None else 0
        whole = (torch.round(scaled) + offset).detach()
        inside = (whole >= limits.min) & (whole <= limits.max)
        # What is added is zero, and has the gradient.
        return torch.clamp(whole, limits.min, limits.max) + (scaled - scaled.detach()) * inside

    return run


def dequantize(node: onnx.NodeProto) -> Operation:
    """What the integers stand for; they may be on another device than the scale."""
    along = _along(node)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = x.to(scale.device, scale.dtype)
        if zero is not None:
            values = values - along(zero.to(scale.device), x).to(scale.dtype)
        return values * along(scale, x)

    return run


def _along(node: onnx.NodeProto) -> Callable[[Tensor, Tensor], Tensor]:
    """Lets the numbers of each channel, or the one of all, meet the tensor that they are of."""
    axis = int(attribute(node, "axis", 1))
    if attribute(node, "block_size", 0):
        raise untrainable(node, "blocks")

    def run(values: Tensor, x: Tensor) -> Tensor:
        return values if values.ndim == 0 else values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])

    return run
