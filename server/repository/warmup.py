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
    stated = set()
    for warm in config.model_warmup:
        rows = _rows(config, warm)
        if rows > most:
            raise InvalidModel(f"model_warmup '{warm.name}' has batch_size {rows}, max_batch_size is {most}")
        size = rows * sum(_bytes(given.data_type, dims) for _, given, dims in _inputs(config, warm))
        if size > max_queue_bytes:
            raise InvalidModel(
                f"model_warmup '{warm.name}' takes {size} bytes, {max_queue_bytes} may wait (max_queue_bytes)"
            )
        stated.add(rows)
    return tuple(sorted(stated or {1, max(min(most, _BLIND_BYTES // max(row, 1)), 1)}))


def warmup_shapes(config: pb.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Dims of a row to warm up each input with that model_warmup names: the first that it states.

    Raises:
        InvalidModel: There is no such input, or its dims are others.
    """
    own = {tensor.name: list(tensor.dims) for tensor in config.input}
    found: dict[str, tuple[int, ...]] = {}
    for warm in config.model_warmup:
        for name, _, dims in _inputs(config, warm):
            if name not in own:
                raise InvalidModel(f"model_warmup '{warm.name}' names the input '{name}'; there are {', '.join(own)}")
            fits = len(own[name]) == len(dims) and all(
                d in (-1, s) and s >= 1 for d, s in zip(own[name], dims, strict=True)
            )
            if not fits:
                raise InvalidModel(f"model_warmup '{warm.name}' has dims {dims} for input '{name}' of dims {own[name]}")
            found.setdefault(name, tuple(dims))
    return found


def _has_rows(config: pb.ModelConfig, warm: pb.ModelWarmup) -> bool:
    """Whether the dims of a warm-up begin with the number of rows: as Triton has it, where batch_size is 0."""
    ranks = {tensor.name: len(tensor.dims) for tensor in config.input}
    longer = (len(given.dims) == ranks.get(name, 0) + 1 for name, given in warm.inputs.items())
    return config.max_batch_size > 0 and warm.batch_size == 0 and all(longer)


def _rows(config: pb.ModelConfig, warm: pb.ModelWarmup) -> int:
    """How many rows a warm-up has; raises InvalidModel where its inputs have different numbers of them."""
    if not _has_rows(config, warm):
        return max(warm.batch_size, 1)
    rows = {max(given.dims[0], 1) for given in warm.inputs.values()} or {1}
    if len(rows) > 1:
        raise InvalidModel(f"model_warmup '{warm.name}' has batch_size 0, and inputs of {sorted(rows)} rows")
    return rows.pop()


def _inputs(config: pb.ModelConfig, warm: pb.ModelWarmup) -> list[tuple[str, pb.ModelWarmup.Input, list[int]]]:
    """Name, what is stated, and dims of a row, of each input of a warm-up."""
    first = int(_has_rows(config, warm))
    return [(name, given, list(given.dims)[first:]) for name, given in sorted(warm.inputs.items())]


def _bytes(data_type: int, dims: Iterable[int]) -> int:
    """Of one row, whose free dimensions are taken as 1."""
    name = datatype_of(data_type)
    return 0 if name == "INVALID" else math.prod(max(d, 1) for d in dims) * max(datatypes.itemsize(name), 1)
