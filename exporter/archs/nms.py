"""Greedy non-maximum suppression with tensors of fixed shape, so that it batches and needs no control flow.

Greedy suppression takes the boxes by falling score and drops each that overlaps a kept one. The kept set is the
only fixed point of: a box stays exactly if no box that stays has a higher score and overlaps it. Started with all
boxes, one round of that rule settles at least one link more of every chain of suppressions (box a drops b, which
would have dropped c, and so on), so it ends with the greedy result after as many rounds as the longest chain has
links: Cluster-NMS, Zheng et al. 2020, "Enhancing Geometric Factors in Model Learning and Inference for Object
Detection and Instance Segmentation", arXiv:2005.03572, section 4.1.
"""

import torch
from torch import Tensor

# A detector's boxes make short chains: on photographs, with random weights and 1,000 boxes a level, 8 links were the
# most, where this many are allowed. An even number of rounds errs on the side of keeping: were a chain longer, every
# box that greedy suppression keeps would still be there, and perhaps an overlapping one as well.
ROUNDS = 20


def suppress(boxes: Tensor, alive: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """Which boxes greedy suppression keeps.

    Args:
        boxes: float32 [..., K, 4], x1, y1, x2, y2, sorted by falling score.
        alive: bool [..., K]; the others are neither kept nor suppress anything.
        threshold: Boxes with a larger intersection over union exclude each other.
        groups: int64 [..., K]; boxes of different groups leave each other alone. None: all are one group.

    Returns:
        bool [..., K].
    """
    size = boxes.shape[-2]
    excludes = _overlap(boxes, threshold) & torch.ones(size, size, dtype=torch.bool, device=boxes.device).triu(1)
    if groups is not None:
        excludes = excludes & (groups.unsqueeze(-1) == groups.unsqueeze(-2))
    links = -excludes.to(boxes.dtype)  # [..., i, j]: -1 where i has the higher score and overlaps j
    start = alive.to(boxes.dtype).unsqueeze(-2)  # [..., 1, K]
    kept = start
    for _ in range(ROUNDS):
        kept = torch.relu(start + torch.matmul(kept, links))
    return kept.squeeze(-2) > 0.5


def _overlap(boxes: Tensor, threshold: float) -> Tensor:
    """Whether the intersection over union of each pair is above the threshold: bool [..., K, K]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = torch.minimum(x2.unsqueeze(-1), x2.unsqueeze(-2)) - torch.maximum(x1.unsqueeze(-1), x1.unsqueeze(-2))
    height = torch.minimum(y2.unsqueeze(-1), y2.unsqueeze(-2)) - torch.maximum(y1.unsqueeze(-1), y1.unsqueeze(-2))
    shared = width.clamp(min=0) * height.clamp(min=0)
    area = (x2 - x1) * (y2 - y1)
    union = area.unsqueeze(-1) + area.unsqueeze(-2) - shared
    # Not a quotient: the padding has boxes without area, and 0/0 is no number.
    return shared > threshold * union
