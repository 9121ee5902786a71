"""RoIAlign over a feature pyramid with one look-up: every level lies in one picture, an atlas.

RoIAlign is K. He et al. 2017, "Mask R-CNN", arXiv:1703.06870, section 3; the level of a box is eq. 1 of T.-Y. Lin et
al. 2017, "Feature Pyramid Networks", arXiv:1612.03144. The usual way sorts the boxes by level and pools each lot, so
that shapes depend on the data. Here each box samples the atlas at the place of its level: one GridSample, which
TensorRT has as a layer of its own, and an average pool.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Eq. 1 of the pyramid paper: a box of 224 x 224 belongs to the fourth level. The small term is torchvision's.
_CANONICAL_SIZE, _CANONICAL_LEVEL, _TOLERANCE = 224, 4, 1e-6


def pyramid_roi_align(levels: Sequence[Tensor], boxes: Tensor, bins: int, stride: int, samples: int = 2) -> Tensor:
    """Pool every box from the pyramid level that suits its size.

    The same values as torchvision's MultiScaleRoIAlign with the same sampling ratio.

    Args:
        levels: float32 [N, C, H/stride, W/stride] and so on, each half the one before.
        boxes: float32 [N, P, 4], x1, y1, x2, y2 in pixels of the input, inside it.
        bins: Cells of a pooled box in each direction.
        stride: Of the first level, a power of two.
        samples: Of a cell, in each direction.

    Returns:
        float32 [N * P, C, bins, bins].
    """
    batch, count, _ = boxes.shape
    channels = levels[0].shape[1]
    grid = _sample_points(levels, boxes, bins * samples, stride).flatten(1, 2)  # N x P*S x S x 2
    values = F.grid_sample(_atlas(levels), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    pooled = F.avg_pool2d(values, samples) if samples > 1 else values  # N x C x P*bins x bins
    per_box = pooled.reshape(batch, channels, count, bins, bins).transpose(1, 2)
    return per_box.reshape(batch * count, channels, bins, bins)


def _atlas(levels: Sequence[Tensor]) -> Tensor:
    """The first level, and the others side by side below it."""
    first, *others = levels
    if not others:
        return first
    height, width = others[0].shape[-2], first.shape[-1]
    row = torch.cat([F.pad(level, (0, 0, 0, height - level.shape[-2])) for level in others], 3)
    return torch.cat([first, F.pad(row, (0, width - row.shape[-1]))], 2)


def _places(levels: Sequence[Tensor], stride: int) -> list[list[float]]:
    """For each level its scale, height and width, and the top and left of it in the atlas."""
    places, left = [], 0
    for index, level in enumerate(levels):
        height, width = level.shape[-2:]
        top = 0 if index == 0 else levels[0].shape[-2]
        places.append([0.5**index / stride, height, width, top, left])
        left += 0 if index == 0 else width
    return [[float(value) for value in place] for place in places]


def _sample_points(levels: Sequence[Tensor], boxes: Tensor, samples: int, stride: int) -> Tensor:
    """Where to read the atlas for each box: [N, P, samples, samples, 2], -1..1, x before y."""
    size = torch.sqrt((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))
    index = torch.zeros_like(size, dtype=torch.int64)
    first = stride.bit_length() - 1
    for level in range(first + 1, first + len(levels)):
        # floor(4 + log2(size / 224)) >= level, without the logarithm of the padding's zero size
        index = index + (size >= _CANONICAL_SIZE * 2.0 ** (level - _CANONICAL_LEVEL - _TOLERANCE)).to(torch.int64)
    table = torch.tensor(_places(levels, stride), dtype=boxes.dtype, device=boxes.device)
    scale, height, width, top, left = table[index].unsqueeze(-1).unbind(-2)  # each N x P x 1
    steps = (torch.arange(samples, dtype=boxes.dtype, device=boxes.device) + 0.5) / samples
    atlas_height = sum(level.shape[-2] for level in levels[:2])
    ys = _along(boxes[..., 1::2] * scale, steps, height, top, atlas_height)
    xs = _along(boxes[..., 0::2] * scale, steps, width, left, levels[0].shape[-1])
    full = (-1, -1, samples, samples)
    return torch.stack([xs.unsqueeze(-2).expand(full), ys.unsqueeze(-1).expand(full)], -1)


def _along(span: Tensor, steps: Tensor, length: Tensor, offset: Tensor, atlas_length: int) -> Tensor:
    """Sample positions in one direction, [N, P, samples], -1..1 over the atlas; outside of that where there is none."""
    start, end = span[..., :1], span[..., 1:]
    points = start + (end - start).clamp(min=1.0) * steps
    # At the border the last pixel repeats for one pixel, and then come zeros.
    inside = (points.clamp(min=0.0).minimum(length - 1) + offset) * (2.0 / (atlas_length - 1)) - 1.0
    return torch.where(points <= length, inside, -3.0)
