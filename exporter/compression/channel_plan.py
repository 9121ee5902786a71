"""How many channels of each group stay, for a number of multiply-adds."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convoynet.exporter.compression.channels import Channels
from convoynet.exporter.compression.labels import FIXED, appearances
from convoynet.exporter.errors import BadInput

Kept = npt.NDArray[np.int64]
# What a target computes at once: a 512-bit register of a CPU holds 16 float32 or int32 sums, and the INT8 layout of
# NVIDIA's tensor cores has 32 channels.
_LIKED = {"cpu": 16, "gpu": 32}
# A narrow layer is cut in steps of a quarter of it at most: in steps of 16, one of 16 channels could not be cut.
_STEPS = 4
_HALVINGS = 50


@dataclass(frozen=True)
class Group:
    """Channels that are alike: each of them appears in the same layers.

    Attributes:
        labels: int64 [n], the least important first.
        scores: float64 [n], rising.
        step: that many go at a time; one label can be several channels of a layer.
    """

    labels: Tensor
    scores: npt.NDArray[np.float64]
    step: int


@dataclass(frozen=True)
class Rules:
    """What a plan is made by.

    Attributes:
        scope: "uniform" or "global".
        round_to: channels left are a multiple of it; None for what the target likes.
        target: "cpu" or "gpu".
    """

    scope: str
    round_to: int | None
    target: str


class Planner:
    """Groups of channels, and what it costs to keep how many of each.

    Args:
        channels: of the network.
        scores: float64 [channels.size], the importance of each label; NaN for what must stay.
        rules: how to choose.
        macs: multiply-adds of an image in the whole network, what is no layer of `channels` included.
    """

    def __init__(self, channels: Channels, scores: Tensor, rules: Rules, macs: int) -> None:
        signatures, widths = _signatures(channels)
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for label, signature in sorted(signatures.items()):
            if label != FIXED and not bool(scores[label].isnan()):
                alike[signature].append(label)
        self.groups = [_group(labels, scores, widths[labels[0]], rules) for labels in alike.values()]
        self._rules = rules
        self._costs = np.array([layer.cost for layer in channels.layers], dtype=np.float64)
        owner = {int(label): index for index, group in enumerate(self.groups) for label in group.labels}
        self._outputs = _counts([channels.slots[layer.weight, 0] for layer in channels.layers], owner, len(self.groups))
        read = [channels.slots.get((layer.weight, 1), torch.zeros(layer.inputs)) for layer in channels.layers]
        self._inputs = _counts(read, owner, len(self.groups))
        self.all = np.array([len(group.labels) for group in self.groups], dtype=np.int64)
        self.least = np.array([min(group.step, len(group.labels)) for group in self.groups], dtype=np.int64)
        self._rest = 0
        self._rest = macs - self.macs(self.all)

    def macs(self, kept: Kept) -> int:
        """Multiply-adds of one image where `kept` [groups] labels stay."""
        outputs, inputs = ((fixed + each @ kept) for fixed, each in (self._outputs, self._inputs))
        return self._rest + round(float((self._costs * outputs * inputs).sum()))

    def within(self, budget: float) -> Kept:
        """The plan with the most multiply-adds up to `budget`.

        Raises:
            BadInput: the budget is below the least that can be.
        """
        most = self.macs(self.all)
        if self.macs(self.least) > budget:
            reachable = 1 - self.macs(self.least) / most
            raise BadInput(
                f"step prune: ratio {1 - budget / most:g} cannot be reached: at most {_floor(reachable)} of the "
                "multiply-adds can go; use that or less, or a smaller round_to"
            )
        plan = self._global() if self._rules.scope == "global" else self._uniform
        # plan(low) is too much to keep, plan(high) is not.
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.macs(plan(middle)) <= budget else (middle, high)
        kept = self._filled(plan(high), plan(low), budget)
        # The staircase of the plans is coarse where many layers have the same width: one step more where it fits.
        steps = np.array([group.step for group in self.groups])
        return self._filled(kept, np.minimum(kept + steps, self.all), budget)

    def _uniform(self, removed: float) -> Kept:
        return self._rounded(np.float64(1 - removed) * self.all)

    def _global(self) -> Callable[[float], Kept]:
        scores = np.concatenate([group.scores for group in self.groups])
        owners = np.repeat(np.arange(len(self.groups)), self.all)
        ranked = owners[np.argsort(scores, kind="stable")]

        def plan(removed: float) -> Kept:
            gone = np.bincount(ranked[: round(removed * len(ranked))], minlength=len(self.groups))
            return self._rounded(np.float64(1) * (self.all - gone))

        return plan

    def _rounded(self, wanted: npt.NDArray[np.float64]) -> Kept:
        """The nearest multiples of the steps."""
        steps = np.array([group.step for group in self.groups])
        whole = np.floor(wanted / steps + 0.5).astype(np.int64) * steps
        # A group that is no multiple itself is whole, or one.
        return np.where(wanted >= self.all, self.all, np.clip(whole, self.least, self.all))

    def _filled(self, kept: Kept, more: Kept, budget: float) -> Kept:
        """`kept`, and of what `more` keeps beyond it what still fits, the most important first."""
        kept = kept.copy()

        def importance(index: int) -> float:
            scores = self.groups[index].scores
            return float(scores[len(scores) - more[index] : len(scores) - kept[index]].mean())

        for index in sorted(np.flatnonzero(more > kept).tolist(), key=importance, reverse=True):
            fewer = int(kept[index])
            kept[index] = more[index]
            if self.macs(kept) > budget:
                kept[index] = fewer
        return kept

    def removed(self, kept: Kept, size: int) -> Tensor:
        """Which labels go, bool [size]."""
        gone = torch.zeros(size, dtype=torch.bool)
        for group, count in zip(self.groups, kept.tolist(), strict=True):
            gone[group.labels[: len(group.labels) - count]] = True
        return gone


def _signatures(channels: Channels) -> tuple[dict[int, tuple[tuple[int, int], ...]], dict[int, int]]:
    """Where each label appears, as (slot, times), and how many channels of a layer's output it is at most."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    widths: dict[int, int] = defaultdict(lambda: 1)
    made = {(layer.weight, 0) for layer in channels.layers}
    for index, (slot, labels) in enumerate(channels.slots.items()):
        for label, times in appearances(labels).items():
            places[label].append((index, times))
            if slot in made:
                widths[label] = max(widths[label], times)
    return {label: tuple(found) for label, found in places.items()}, widths


def _group(labels: Sequence[int], scores: Tensor, width: int, rules: Rules) -> Group:
    found = torch.tensor(labels)
    values, order = torch.sort(scores[found], stable=True)
    round_to = rules.round_to
    if round_to is None:
        # The largest power of two that is no more than a quarter of the layer.
        share = max(1, len(labels) * width // _STEPS)
        round_to = min(_LIKED[rules.target], 1 << (share.bit_length() - 1))
    return Group(found[order], values.numpy(), round_to // gcd(round_to, width))


def _counts(
    slots: Sequence[Tensor], owner: dict[int, int], groups: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How many indices of each slot stay, [slots], and how many one label of each group is, [slots, groups]."""
    fixed, each = np.zeros(len(slots)), np.zeros((len(slots), groups))
    for row, slot in enumerate(slots):
        for label, times in appearances(slot).items():
            if label in owner:
                each[row, owner[label]] = times
            else:
                fixed[row] += times
    return fixed, each


def _floor(share: float) -> str:
    """A share that is not rounded up: it can be asked for."""
    return f"{np.floor(share * 1000) / 1000:g}"
