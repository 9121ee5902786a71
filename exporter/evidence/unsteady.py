"""What PyTorch itself does otherwise, before a graph is blamed: chance, the batch, and the rounding of float32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from convoynet.exporter.evidence import limits
from convoynet.exporter.evidence.parity import Parity, Sides, compare, who
from convoynet.exporter.evidence.verify import REFERENCE_BATCH, Reference, outputs_of

if TYPE_CHECKING:
    from convoynet.exporter.data.images import Preprocess
    from convoynet.exporter.running.runtime import Images, Outputs, Predictor

# A graph that rounds at other places than PyTorch is this much further from it than PyTorch is from float64.
_TIMES = 4.0
_MOST_IMAGES = 32
_REPEATS = 3


class Earlier(NamedTuple):
    """What a network answered for the images before, computed so many at a time."""

    outputs: Outputs
    batch: int


def why_unsteady(predictor: Predictor, images: Images, earlier: Earlier | None = None) -> str:
    """Why a network cannot be compared image by image: its own answers differ; empty where they do not.

    Args:
        predictor: the PyTorch model.
        images: two or more, uint8 NHWC.
        earlier: tells a network apart that is another one once it has been asked.
    """
    batch = REFERENCE_BATCH if earlier is None else earlier.batch
    # Whole batches, since an answer may hang on them.
    chosen = images[: -(-_MOST_IMAGES // batch) * batch]
    if len(chosen) < 2:
        return ""
    first = outputs_of(predictor, chosen, batch)
    before = first if earlier is None else tuple(output[: len(chosen)] for output in earlier.outputs)
    named = who(predictor.name)
    # Chance can give the same answer twice.
    if _differ(before, first) or any(_differ(first, outputs_of(predictor, chosen, batch)) for _ in range(_REPEATS)):
        return (
            f"{named} itself answers otherwise when it is asked again, so something in the network is random in "
            "evaluation too, or hangs on earlier images or the time: F.dropout(x, p) needs training=self.training, and "
            "noise and counters have no place there"
        )
    if _differ(first, outputs_of(predictor, chosen, 1)):
        return (
            f"{named}'s answer for an image depends on the other images of its batch, as with BatchNorm2d("
            "track_running_stats=False), a layer that stays in training mode, or a mean or maximum over the batch: a "
            "server batches images of strangers; use running statistics, or another normalisation"
        )
    return ""


def _differ(one: Outputs, other: Outputs) -> bool:
    """Whether outputs differ by more than float32's rounding makes them."""
    for left, right in zip(one, other, strict=True):
        spread = float(np.abs(left).max(initial=0.0))
        if left.shape != right.shape or not np.abs(left - right).max(initial=0.0) <= limits.FP32_MAX_REL_ERROR * spread:
            return True
    return False


@dataclass(frozen=True)
class Rounding:
    """What float32 does to PyTorch's own outputs: their parity to those of the same network in float64."""

    parity: Parity

    def explains(self, graph: Parity) -> bool:
        """Whether a graph is no further from PyTorch than rounding makes it."""
        own, found = (one.spread.error or 0.0 if one.spread is not None else 0.0 for one in (self.parity, graph))
        alike = graph.agreement >= self.parity.agreement - limits.HALF_MAX_LOSS
        near = graph.max_rel_error <= max(_TIMES * self.parity.max_rel_error, limits.FP32_MAX_REL_ERROR)
        return alike and near and found <= max(_TIMES * own, limits.FP32_SPREAD_ERROR)

    @staticmethod
    def share(graph: Parity) -> float:
        """How much of the outputs it is: of their spread, or where they have none of their size."""
        error = graph.spread.error if graph.spread is not None else None
        return graph.max_rel_error if error is None else error

    def line(self, graph: Parity) -> str:
        """The cause and the way out."""
        return (
            f"float32's own rounding moves these outputs by {self.share(graph):.2g} of what they vary by: PyTorch's "
            "float32 and float64 differ as much, and no graph can be closer. Large constants cause it that are added "
            "or multiplied in the network: leave them to the code behind it; or a network that was not trained"
        )


def measure_rounding(
    network: nn.Module, reference: Reference, images: Images, preprocess: Preprocess
) -> Rounding | None:
    """Run the network in float64; None where it cannot run so, or detects.

    Args:
        network: on the CPU, in float32; stays as it is.
        reference: its outputs in float32.
        images: uint8 NHWC, those of `reference`.
        preprocess: how they become inputs.
    """
    if reference.task == "detection":
        return None
    chosen = images[:_MOST_IMAGES]
    inputs = torch.from_numpy(preprocess.normalize(chosen)).double()
    try:
        double = copy.deepcopy(network).double().eval()
        with torch.inference_mode():
            parts = [double(inputs[at : at + REFERENCE_BATCH]) for at in range(0, len(inputs), REFERENCE_BATCH)]
    except Exception:  # whatever the network raises: its code is for float32
        return None
    rows = [(part,) if isinstance(part, torch.Tensor) else part for part in parts]
    exact = tuple(torch.cat(column).numpy() for column in zip(*rows, strict=True))
    found = tuple(output[: len(chosen)] for output in reference.outputs)
    if any(left.shape != right.shape for left, right in zip(exact, found, strict=True)):
        return None
    sides = Sides("PyTorch float64", reference.name, kind=reference.kind, others=reference.others)
    return Rounding(compare(reference.task, exact, found, np.arange(len(chosen)), sides).parity)
