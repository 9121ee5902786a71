"""Labels in classes: a union-find over whole numbers, by tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The class of what stays.
FIXED = 0
# What has no channel of its own: a number, or a zero that only fills up.
NEUTRAL = -1


class Labels:
    """Numbers from 1 on, each in a class of its own until it is united with others."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def new(self, count: int) -> Tensor:
        """Labels that nothing else has, int64 [count]."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Make one class of each pair at the same place of two int64 tensors of one shape; NEUTRAL stays out of it."""
        pairs = torch.stack((left.reshape(-1), right.reshape(-1)), 1)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs >= FIXED).all(1)]
        for one, other in torch.unique(pairs, dim=0).tolist():
            first, second = sorted((self._root(one), self._root(other)))
            self._parents[second] = first  # so that FIXED, the smallest, is the root of its class

    def fix(self, labels: Tensor) -> None:
        """Unite `labels` with FIXED."""
        self.unite(labels, torch.full_like(labels, FIXED))

    def roots(self) -> Tensor:
        """The class of each label, int64 [labels]: its smallest member."""
        return torch.tensor([self._root(label) for label in range(len(self._parents))])

    def _root(self, label: int) -> int:
        root = label
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[label] != root:
            self._parents[label], label = root, self._parents[label]
        return root


def compact(labels: Tensor) -> Tensor:
    """The same labels with size 1 along the dimensions that were expanded from one."""
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0 or labels.shape[dim] == 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def spread(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 along the dimensions in which they do not vary."""
    for dim in range(labels.ndim):
        first = labels.narrow(dim, 0, 1).expand_as(labels)
        if bool((labels == first).all()):
            labels = first
    return labels


def broadcast(labels: Sequence[Tensor]) -> list[Tensor]:
    """The same labels in one common shape."""
    return list(torch.broadcast_tensors(*labels))  # type: ignore[no-untyped-call]


def appearances(labels: Tensor) -> dict[int, int]:
    """How often each label appears."""
    found, times = torch.unique(labels, return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))
