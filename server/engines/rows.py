"""The rows of requests into one batch, and out of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from convoynet.server import datatypes
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.place import Answer
from convoynet.server.errors import RowsDiffer
from convoynet.server.types import Tensor


def serialized(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The texts of some requests, filled up to `shape`, as the protocol serializes them."""
    texts = np.full(shape, b"", object)
    if parts[0].shape == shape:
        texts = parts[0]
    else:
        np.concatenate(parts, out=texts[: sum(map(len, parts))])
    return np.frombuffer(datatypes.encode(texts), np.uint8)


def gather(views: Mapping[str, Tensor], sources: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Copies the inputs of a batch to where the engine reads them: the one copy on their way."""
    for name, parts in sources:
        view = views[name]
        if len(parts) == 1 and parts[0].shape == view.shape:
            np.copyto(view, parts[0], casting="equiv")
        else:
            rows = sum(map(len, parts))
            np.concatenate(parts, out=view[:rows], casting="equiv")
            view[rows:] = 0


def split(
    spec: EngineSpec,
    outputs: Sequence[Answer],
    requests: Sequence[Mapping[str, Tensor]],
    pad_to: int,
    *,
    whole: bool = False,
) -> list[dict[str, Tensor]]:
    """Gives each request a copy of its own rows, or the one that there is all of them.

    Raises:
        RowsDiffer: An output does not have the rows of the batch.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in requests]
    counts = [len(next(iter(request.values()))) for request in requests] if spec.max_rows and not whole else []
    for slot, view in outputs:
        values = datatypes.decode("BYTES", slot.dims, view.tobytes()) if slot.datatype == "BYTES" else view
        if not counts:
            parts[0][slot.name] = values.copy()
            continue
        if not values.ndim or len(values) != max(sum(counts), pad_to):
            size = max(sum(counts), pad_to)
            raise RowsDiffer(
                f"output '{slot.name}' of model '{spec.name}' has the shape {list(values.shape)} for a batch of {size}"
            )
        start = 0
        for part, rows in zip(parts, counts, strict=True):
            part[slot.name] = values[start : start + rows].copy()
            start += rows
    return parts
