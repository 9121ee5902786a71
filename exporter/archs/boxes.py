"""What all detectors do with boxes, in tensors of fixed shapes.

An ONNX graph of it has no loops, no branches and no operator whose output has an unknown size, so that it batches.
Fewer boxes than there is room for are padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convoynet.exporter.errors import BadInput

STRIDE = 32  # torchvision pads its batches to multiples of that
_LARGEST_CODE = math.log(1000 / 16)  # torchvision's: a box grows at most that much


class Detections(NamedTuple):
    """The boxes of N images, D for each, by falling score; behind the first `counts` they are zeros.

    Attributes:
        boxes: float32 [N, D, 4], x1, y1, x2, y2 in pixels of the input.
        scores: float32 [N, D], 0..1.
        labels: int64 [N, D]; of padding 0, which is the background.
        counts: int64 [N, 1], how many of the D are detections.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


def require_classes(num_classes: int) -> None:
    """See that there is something to detect.

    Raises:
        BadInput: Fewer than two classes: the first is the background.
    """
    if num_classes < 2:
        raise BadInput(f"{num_classes} class: a detector needs 2 or more, the first being the background")


def require_strides(what: str, size: tuple[int, int]) -> None:
    """See that the pyramid's levels are halves of each other.

    Raises:
        BadInput: The sides of the input are no multiples of the coarsest stride of the trunk.
    """
    height, width = size
    if height % STRIDE or width % STRIDE:
        raise BadInput(f"an input of {height}x{width}: {what} needs multiples of {STRIDE}")


def grid_anchors(shapes: Sequence[Sequence[float]], size: tuple[int, int], level: Tensor) -> Tensor:
    """Anchors of one level, [rows * columns * shapes, 4] in pixels; spaced as torchvision spaces them.

    Args:
        shapes: x1, y1, x2, y2 around the place of each.
        size: (height, width) of the input.
        level: [N, C, rows, columns].
    """
    rows, columns = level.shape[-2:]
    # NumPy and not tensors: the anchors of an input size become one constant of the graph.
    ys, xs = np.meshgrid(np.arange(rows) * (size[0] // rows), np.arange(columns) * (size[1] // columns), indexing="ij")
    centres = np.stack([xs, ys, xs, ys], -1).reshape(-1, 1, 4)
    anchors = (centres + np.asarray(shapes)).reshape(-1, 4).astype(np.float32)
    return torch.tensor(anchors, device=level.device)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, K] of `values` [N, M, C]: [N, K, C]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def large(boxes: Tensor, smallest: float) -> Tensor:
    """Which boxes [..., 4] have no side that is shorter: bool [...]."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides.amin(-1) >= smallest


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes [..., 4] at the borders of an image of (height, width)."""
    height, width = size
    return boxes.clamp(min=0.0).minimum(boxes.new_tensor([width, height, width, height]))


def decode(codes: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Move and scale boxes [..., 4] by codes [..., 4]: Ren et al. 2015, eq. 2, with torchvision's weights and limit."""
    codes = codes / codes.new_tensor(weights)
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = codes[..., :2] * sides + (boxes[..., :2] + 0.5 * sides)
    halves = 0.5 * codes[..., 2:].clamp(max=_LARGEST_CODE).exp() * sides
    return torch.cat([centres - halves, centres + halves], -1)


def best_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of [N, R, C]: them by falling score, and the row and the column of each, [N, K] all three.

    Of many rows the `count` with the highest maxima are taken first: they have all that can be among the highest.
    """
    rows, columns = scores.shape[1:]
    chosen = scores.amax(-1).topk(count, 1).indices if rows > count else None
    near = (scores if chosen is None else pick(scores, chosen)).flatten(1)
    best, index = near.topk(min(count, near.shape[1]), 1)
    row = index // columns
    return best, row if chosen is None else chosen.gather(1, row), index % columns


def detections(boxes: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, count: int) -> Detections:
    """The `count` kept boxes with the highest scores, which are above zero; zeros where there are fewer."""
    ranks, order = torch.where(kept, scores, -1.0).topk(min(count, scores.shape[1]), 1)
    real = ranks > 0
    return Detections(
        boxes=pick(boxes, order) * real.unsqueeze(-1),
        scores=ranks.clamp(min=0.0),
        labels=labels.gather(1, order) * real,
        counts=real.sum(1, keepdim=True),
    )


def earlier(labels: Tensor) -> Tensor:
    """How many before each have the same label: int64 [N, K] to int64 [N, K]."""
    same = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    before = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool, device=labels.device).tril(-1)
    return (same & before).to(torch.int64).sum(-1)
