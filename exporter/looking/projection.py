"""What in a picture excites a unit: the DeconvNet projection with switches.

M. Zeiler and R. Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 2.1. The activation at one
place goes back to the pixels: through a convolution by its transpose, through max pooling by the switches (where the
maximum was), and through a ReLU by a ReLU of what comes back. But for the last that is the network's backward pass, so
it is run as one. What has no such way back (a gate, a sigmoid, a normalisation by the responses around) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Images, Layer, Opened
from convoynet.exporter.looking.rectified import Rectified, Rectifying
from convoynet.exporter.looking.units import Excited

# Steps of autograd that are linear, or choose; those of arithmetic where one side alone depends on the image.
_LINEAR = (
    "Convolution", "ConvolutionOverrideable", "MkldnnConvolution", "ThnnConv2D", "MaxPool2DWithIndices",
    "AvgPool2D", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "Mean", "Sum", "NativeBatchNorm", "CudnnBatchNorm",
    "Add", "Sub", "Neg", "Cat", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Slice",
    "Select", "Index", "Split", "SplitWithSizes", "Clone", "Copy", "CopySlice", "ConstantPadNd", "ReflectionPad2D",
    "ReplicationPad2D", "Addmm", "Mm", "Squeeze", "Unsqueeze", "Expand", "ToCopy", "Alias", "Unbind",
    "AccumulateGrad", "UpsampleNearest2D", "UpsampleBilinear2D", "_BothWays",
)  # fmt: skip
_SCALED = ("Mul", "Div")


class _BothWays(Rectified):
    """A ReLU whose way back is a ReLU too."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """What comes back, where it is positive."""
        return gradient.clamp(min=0), None


def projections(opened: Opened, layer: Layer, images: Images, unit: int, top: Sequence[Excited]) -> NDArray[np.float32]:
    """What of each image excites a unit at a place: [n, h, w, channels] in RGB, signed.

    Args:
        opened: the network.
        layer: of it.
        images: [n, h, w, channels].
        unit: of the layer.
        top: the place in the map, of each image.

    Raises:
        BadInput: a layer on the way has no way back.
    """
    inputs = opened.inputs(images).requires_grad_()
    with Rectifying(_BothWays):
        maps = opened.maps(layer, inputs)
    rows, columns = (torch.tensor([one.place[axis] for one in top]) for axis in (0, 1))
    picked = maps[torch.arange(len(images)), unit, rows, columns]
    _require_way_back(layer, picked)
    # The signal is the activation itself.
    (signal,) = torch.autograd.grad(picked, inputs, picked.detach())
    found: NDArray[np.float32] = opened.in_places(signal).permute(0, 2, 3, 1).numpy()
    return found[..., ::-1] if opened.preprocess.order == "bgr" else found


def _require_way_back(layer: Layer, made: Tensor) -> None:
    """See that all between the image and a tensor is linear, or a ReLU or a max pooling."""
    waiting, seen = [made.grad_fn], set()
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        kind = type(step).__name__.rstrip("0123456789").removesuffix("s").removesuffix("Backward")
        before = [each for each, _ in step.next_functions if each is not None]
        if kind not in _LINEAR and not (kind in _SCALED and len(before) == 1):
            raise BadInput(
                f"no projection leads back from {layer.name}: on the way lies {kind.strip('_').lower()}, and a "
                "DeconvNet goes back through convolutions, ReLUs and max pooling"
            )
        waiting += before
