"""The batch sizes that a model runs before it is ready, none of them larger than a request could be."""

from __future__ import annotations

import math
from collections.abc import Iterable

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidModel

_BLIND_BYTES = 2**28
"""The most that a batch may have which nobody asked for."""


def datatype_of(value: int) -> str:
    """The protocol's name for a data_type; "INVALID" for none, or one that there is not."""
    if value not in pb.DataType.values():
        return "INVALID"
    return pb.DataType.Name(pb.DataType.ValueType(value)).removeprefix("TYPE_").replace("STRING", "BYTES")


def warmup_sizes(config: pb.ModelConfig, max_queue_bytes: int) -> tuple[int, ...]:
    """Those of model_warmup; where there is none, 1 and the largest batch.

    Args:
        config: It is complete.
        max_queue_bytes: The most bytes of inputs that may wait for the model.

    Raises:
        InvalidModel: One is larger than any request, or a single row is.
    """
    row = sum(_bytes(t.data_type, t.dims) for t in config.input)
    if row > max_queue_bytes:
        raise InvalidModel(f"one row of its inputs takes {row} bytes, {max_queue_bytes} may wait (max_queue_bytes)")
    most = max(config.max_batch_size, 1)
    for warm in config.model_warmup:
        rows = max(warm.batch_size, 1)
        if rows > most:
            raise InvalidModel(f"model_warmup '{warm.name}' has batch_size {rows}, max_batch_size is {most}")
        size = rows * sum(_bytes(given.data_type, given.dims) for given in warm.inputs.values())
        if size > max_queue_bytes:
            raise InvalidModel(
                f"model_warmup '{warm.name}' takes {size} bytes, {max_queue_bytes} may wait (max_queue_bytes)"
            )
    stated = {max(warm.batch_size, 1) for warm in config.model_warmup}
    return tuple(sorted(stated or {1, max(min(most, _BLIND_BYTES // max(row, 1)), 1)}))


def warmup_shapes(config: pb.ModelConfig, max_queue_bytes: int) -> dict[str, tuple[int, ...]]:
    """Dims to warm up each input with that model_warmup names: the first that it states.

    Args:
        config: It is complete.
        max_queue_bytes: The most bytes of inputs that may wait for the model.

    Raises:
        InvalidModel: There is no such input, or its dims are others, or too large.
    """
    inputs = {tensor.name: tensor for tensor in config.input}
    found: dict[str, tuple[int, ...]] = {}
    for warm in config.model_warmup:
        for name, given in sorted(warm.inputs.items()):
            if name not in inputs:
                raise InvalidModel(
                    f"model_warmup '{warm.name}' names the input '{name}'; there are {', '.join(inputs)}"
                )
            own, stated = list(inputs[name].dims), list(given.dims)
            fits = len(own) == len(stated) and all(d in (-1, s) and s >= 1 for d, s in zip(own, stated, strict=True))
            if not fits:
                raise InvalidModel(f"model_warmup '{warm.name}' has dims {stated} for input '{name}' of dims {own}")
            size = max(warm.batch_size, 1) * _bytes(inputs[name].data_type, stated)
            if size > max_queue_bytes:
                raise InvalidModel(
                    f"model_warmup '{warm.name}' takes {size} bytes, {max_queue_bytes} may wait (max_queue_bytes)"
                )
            found.setdefault(name, tuple(stated))
    return found


def _bytes(data_type: int, dims: Iterable[int]) -> int:
    """Of one row, whose free dimensions are taken as 1."""
    name = datatype_of(data_type)
    return 0 if name == "INVALID" else math.prod(max(d, 1) for d in dims) * max(datatypes.itemsize(name), 1)
