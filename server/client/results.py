"""What the outputs of a network say about an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from convoynet.server.client.errors import ClientError

ACTIVATIONS = ("softmax", "sigmoid", "none")
"""What makes probabilities of outputs: of one class out of all, of each class by itself, or nothing."""


class Prediction(NamedTuple):
    """One class of one image.

    Attributes:
        score: its probability where the model's config names an activation, else the bare output value.
    """

    label: str
    class_index: int
    score: float

    @property
    def probability(self) -> float:
        """The score, where it is a probability."""
        return self.score


class BarePrediction(Prediction):
    """One class of one image, of a model whose config names no activation."""

    __slots__ = ()

    @property
    def probability(self) -> float:
        """There is none."""
        raise AttributeError("the model's config names no activation, so that this is no probability: read .score")


class ClassShare(NamedTuple):
    """One class of a segmented image; `share` is the part of the pixels that it has, 0..1."""

    label: str
    class_index: int
    share: float


class Segmentation(NamedTuple):
    """The class of every pixel of one image.

    Attributes:
        classes: int32 [height, width]; -1 where a crop kept the pixel from the network.
        shares: of the pixels that the network saw, the largest share first.
    """

    classes: NDArray[np.int32]
    shares: list[ClassShare]


class Detection(NamedTuple):
    """One object; `box` is x1, y1, x2, y2 in pixels of the image, 0, 0 being its top left corner."""

    label: str
    class_index: int
    score: float
    box: tuple[float, float, float, float]


def predictions(row: NDArray[Any], activation: str) -> list[Prediction]:
    """The classes of one row, given as `bytes` "value:index" or "value:index:label", the best first.

    Raises:
        ClientError: the activation is none of ACTIVATIONS.
    """
    fields = [element.decode().split(":", 2) for element in row]
    values = activated(np.array([float(field[0]) for field in fields]), activation)
    kind = BarePrediction if activation == "none" else Prediction
    return [
        kind(field[2] if len(field) > 2 else field[1], int(field[1]), float(value))
        for field, value in zip(fields, values, strict=True)
    ]


def activated(values: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    """The bare outputs [..., classes] behind the activation.

    Raises:
        ClientError: the activation is none of ACTIVATIONS.
    """
    if activation not in ACTIVATIONS:
        raise ClientError(
            f"the model has the activation '{activation}', this client knows {', '.join(ACTIVATIONS)}",
            grpc.StatusCode.UNIMPLEMENTED,
        )
    if activation == "softmax":
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        values = exponentials / exponentials.sum(axis=-1, keepdims=True)
    elif activation == "sigmoid":
        values = np.exp(-np.logaddexp(0, -values))
    return values


def segmentation(classes: NDArray[np.int32], labels: Sequence[str]) -> Segmentation:
    """The shares of the classes in a map, [height, width] with -1 where nothing is known."""
    counts = np.bincount(classes.ravel() + 1)[1:]
    order = np.argsort(-counts, kind="stable")
    shares = [
        ClassShare(_label(labels, index), index, float(counts[index] / counts.sum()))
        for index in order.tolist()
        if counts[index]
    ]
    return Segmentation(classes, shares)


def detections(
    boxes: NDArray[np.float64], scores: NDArray[Any], indices: NDArray[Any], labels: Sequence[str]
) -> list[Detection]:
    """Boxes [n, 4] with their scores and classes, [n] each, the highest score first; empty boxes are left out."""
    found = [
        Detection(_label(labels, index), index, score, (x1, y1, x2, y2))
        for (x1, y1, x2, y2), score, index in zip(boxes.tolist(), scores.tolist(), indices.tolist(), strict=True)
        if x1 < x2 and y1 < y2
    ]
    return sorted(found, key=lambda each: -each.score)


def _label(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else str(index)
