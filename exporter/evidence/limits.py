"""What an exported model may lose, by what its outputs mean. The table is again in docs/exporting.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# What outputs mean: told by the user or the network, or seen in them. "values" are not known to be anything.
Kind = Literal[
    "classification", "labels", "regression", "embedding", "one value", "values", "segmentation", "detection"
]


@dataclass(frozen=True)
class Limits:
    """What INT8 may lose: RMS errors as shares of the standard deviation of PyTorch's outputs over the images.

    One answer for all images has an error of 1.

    Attributes:
        name: what a person calls such outputs.
        error: of all outputs together.
        each: of each output alone; None where it has only to be alive and in its place.
        untrained: in the place of `error` where the weights are random, or --max-drop measures what is lost; None where
            that makes no difference.
    """

    name: str
    error: float
    each: float | None
    untrained: float | None = None


# Above what correct INT8 graphs have: of trained networks 0.01 (LeNet-5), 0.07 (SqueezeNet 1.0) and 0.10
# (EfficientNet-Lite0) on real images, 0.07 (ResNet-20) and 0.26 (SqueezeNet 1.0) on noise; with random weights 0.02 to
# 0.33 on made images, and 0.74 and 0.75 for MobileNetV2 and ShuffleNet, of which a third of the answers agree then;
# single outputs up to 0.7. Below what wrong ones have: mean and deviation swapped are 0.61 (ResNet-20) to 1.13
# (LeNet-5). They catch a broken graph. How much accuracy an error costs they do not say.
INT8: Mapping[str, Limits] = MappingProxyType(
    {
        # The class is decided between many logits, and their noise cancels out; --eval is what measures it.
        "classification": Limits("classes", 0.5, None, 0.9),
        "segmentation": Limits("maps of classes", 0.5, None, 0.9),
        # Every label is an answer of its own, rare ones too.
        "labels": Limits("several labels", 0.5, 0.9),
        # Every number is used as it is.
        "regression": Limits("regression", 0.5, 0.5),
        "one value": Limits("one value", 0.5, 0.5),
        # May be numbers that are used as they are.
        "values": Limits("outputs that nothing says are classes", 0.5, 0.9),
        # Distances between images count, not single elements.
        "embedding": Limits("embeddings", 0.5, None),
    }
)
# From fewer images no spread of a single output is known, and the limit is what tells a graph from one answer for all.
FEWEST_IMAGES, FEW_LIMIT = 8, 0.9
# Above this a person is told to measure accuracy: 10 dB.
DOUBTFUL = 0.32
# Boxes: the share of detections that have a partner.
INT8_MIN_MATCHED = 0.5
# One image has no spread: what is left is its outputs' size.
ONE_IMAGE_ERROR = 0.5

# A float32 graph does the same sums in another order; anything above this is another network.
FP32_MAX_REL_ERROR = 1e-3
# The same against the spread, which can be small beside the outputs; PyTorch's own rounding is looked at before more
# is held against a graph.
FP32_SPREAD_ERROR = 0.01
# As much may be rounding that PyTorch itself has, against float64: the outputs still say something.
ROUNDING_SPREAD_ERROR = 0.1
# Of pixels and of detections: some of very many lie so near a tie that float32's rounding decides. Detectors with
# random weights have the most of them.
FP32_MIN_SHARES: Mapping[str, float] = MappingProxyType({"classification": 1.0, "segmentation": 0.99, "detection": 0.9})
# 16-bit types round in the fourth or the third digit: that moves ties, not a tenth of the images.
HALF_MAX_LOSS = 0.1
