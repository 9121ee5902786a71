"""The protocol's classification extension: the top classes of an output as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoynet.server.errors import InvalidRequest
from convoynet.server.types import Tensor

MAX_ELEMENTS = 1_000_000
"""Outputs with more elements are refused: every one of them would be compared, and with all asked for, spelt out."""
_FEW = 8
"""Below one class in so many a full sort costs more than finding the k-th best first."""


def classify(array: Tensor, datatype: str, classes: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """The top classes of an output.

    Args:
        array: Scores, [rows, ...] where batched, else [...]; what follows the batch axis counts as one list.
        datatype: The output's, in the protocol's words.
        classes: How many to give, fewer where there are fewer.
        labels: Name of class n at position n; may be shorter than the scores.
        batched: Whether the first axis is the batch.

    Returns:
        BYTES [rows, k] or [k]: `<score>:<index>[:<label>]`, best first, ties by the lower index, NaN last.

    Raises:
        InvalidRequest: The output's datatype has no order, or it has more than MAX_ELEMENTS elements.
    """
    if array.dtype.kind not in "iuf":
        raise InvalidRequest(f"class result not available for output due to unsupported type '{datatype}'")
    if array.size > MAX_ELEMENTS:
        raise InvalidRequest(
            f"class result not available for output: it has {array.size} elements, the most is {MAX_ELEMENTS}; "
            "ask for the output itself"
        )
    scores: NDArray[Any] = array.reshape(len(array) if batched else 1, -1)
    # Negated so that the best comes first; integers by their bits, which cannot overflow. NaN sorts last by itself.
    keys = -scores if scores.dtype.kind == "f" else ~scores
    count = min(classes, scores.shape[1])
    text = np.empty((len(scores), count), np.object_)
    form = "{:.6f}:{}" if scores.dtype.kind == "f" else "{}:{}"
    for row, (values, key) in enumerate(zip(scores, keys, strict=True)):
        best = _smallest(key, count)
        text[row] = [
            (form.format(value, i) + (f":{labels[i]}" if i < len(labels) else "")).encode()
            for value, i in zip(values[best].tolist(), best.tolist(), strict=True)
        ]
    return text if batched else text[0]


def _smallest(keys: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The places of the `count` smallest keys, smallest first, ties by place, NaN last."""
    if count * _FEW > len(keys):
        return np.argsort(keys, kind="stable")[:count]
    limit = np.partition(keys, count - 1)[count - 1]
    if np.isnan(limit):  # there are fewer numbers than were asked for
        return np.argsort(keys, kind="stable")[:count]
    below = np.flatnonzero(keys < limit)
    places = np.concatenate([below, np.flatnonzero(keys == limit)[: count - len(below)]])
    return places[np.argsort(keys[places], kind="stable")]
