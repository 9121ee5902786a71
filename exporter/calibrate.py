"""Ranges of activations over calibration images, by numpy and ONNX Runtime alone.

One pass over the images. The extremes are found by reductions inside the graph, so that no activation leaves the
runtime; percentiles need the values, which are counted in histograms of bounded size and forgotten.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from exporter import qdq_cpu, qdq_gpu
from exporter.errors import BadInput
from exporter.onnx_graph import Graph, replace, shapes

METHODS = ("minmax", "percentile")
PERCENTILE = 99.99
BINS = 2048

_ERRORS_ONLY = 3
# Activations that leave the runtime at a time.
_MAX_BYTES = 2**28
# The smallest float32 is 2**-149, and neighbouring ones differ by 2**-24 of their size: no bin needs to be narrower.
_MIN_EXPONENT = -149
_MAX_BIN = 2**24


@dataclass(frozen=True)
class Range:
    """The values that an activation takes, `low` to `high`."""

    low: float
    high: float


def calibrate(model: onnx.ModelProto, batches: Iterable[np.ndarray], method: str) -> dict[str, Range]:
    """Measure the range of every activation that `quantize` may need, for either target.

    The result does not depend on how the images are divided into batches.

    Args:
        model: a float graph with one input.
        batches: arrays of exactly what the graph's input takes; the sizes may differ.
        method: "minmax", or "percentile", which leaves out the largest and the smallest 0.01 % of the values.

    Returns:
        Tensor name -> range, in the order of the graph.

    Raises:
        BadInput: unknown method, no images, a batch that does not fit the input, or a network that computes a value
            that is not finite.
    """
    if method not in METHODS:
        raise BadInput(f"calibration method {method!r}: use {' or '.join(METHODS)}")
    graph = Graph(model)
    wanted = {name for place in (qdq_cpu.place, qdq_gpu.place) for name in place(graph).tensors}
    tensors = [name for name in [*graph.inputs, *(name for node in graph for name in node.output)] if name in wanted]
    return (_extremes if method == "minmax" else _percentiles)(model, batches, tensors)


def _extremes(model: onnx.ModelProto, batches: Iterable[np.ndarray], tensors: list[str]) -> dict[str, Range]:
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    reductions = ("ReduceMin", "ReduceMax", "ReduceSum")
    outputs = [f"{name}.{reduction}" for name in tensors for reduction in reductions]
    for name in tensors:
        for reduction in reductions:
            probed.graph.node.append(helper.make_node(reduction, [name], [f"{name}.{reduction}"], keepdims=0))
    session = _session(probed, outputs)
    low = np.full(len(tensors), np.inf)
    high = -low
    for batch in _chunks(session, batches, _rows(model, tensors)):
        values = np.array(session.run(outputs, {_input(session): batch}), np.float64).reshape(-1, len(reductions))
        for name, row in zip(tensors, values, strict=True):
            # A NaN may be lost in a minimum and a maximum, not in a sum.
            _require_finite(name, bool(np.isfinite(row).all()))
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])
    return {name: Range(float(a), float(b)) for name, a, b in zip(tensors, low, high, strict=True)}


def _percentiles(model: onnx.ModelProto, batches: Iterable[np.ndarray], tensors: list[str]) -> dict[str, Range]:
    inputs = Graph(model).inputs
    inner = [name for name in tensors if name not in inputs]
    session = _session(model, inner)
    histograms = {name: Histogram() for name in tensors}
    for batch in _chunks(session, batches, _rows(model, tensors)):
        feed = {_input(session): batch}
        values = feed | dict(zip(inner, session.run(inner, feed), strict=True))
        for name, histogram in histograms.items():
            _require_finite(name, bool(np.isfinite(values[name]).all()))
            histogram.add(values[name])
        del values  # or the next image's would come beside them
    return {name: histogram.range(PERCENTILE) for name, histogram in histograms.items()}


def _rows(model: onnx.ModelProto, tensors: list[str]) -> int:
    """How many images may be computed at a time for their activations to take bounded memory."""
    known = shapes(model)
    image_bytes = 4 * sum(math.prod(size or 1 for size in known.get(name, ())) for name in tensors)
    return max(1, _MAX_BYTES // max(image_bytes, 1))


def _chunks(session: onnxruntime.InferenceSession, batches: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The images in arrays of at most `rows`, checked against the input of the graph; at least one image in all."""
    (signature,) = session.get_inputs()
    dtype = np.dtype(np.uint8 if signature.type == "tensor(uint8)" else np.float32)
    images = 0
    for batch in batches:
        if batch.dtype != dtype or batch.ndim < 1 or list(batch.shape[1:]) != signature.shape[1:]:
            given = f"{batch.dtype} {list(batch.shape)}"
            raise BadInput(f"calibration batch {given}: input {signature.name!r} takes {dtype} {signature.shape}")
        images += len(batch)
        for start in range(0, len(batch), rows):
            yield batch[start : start + rows]
    if not images:
        raise BadInput("there are no calibration images: give at least one")


def _input(session: onnxruntime.InferenceSession) -> str:
    name: str = session.get_inputs()[0].name
    return name


def _require_finite(name: str, finite: bool) -> None:
    if not finite:
        raise BadInput(
            f"tensor {name!r} is not finite (NaN or infinity) on the calibration images: check weights and images"
        )


@dataclass
class Histogram:
    """Counts of values in at most 2,048 bins, whose width is a power of two.

    Bin i of width 2**exponent holds the values of [i, i + 1) * 2**exponent. When values fall outside, neighbouring
    bins are merged in pairs until all fit. Because every bin is then exactly two of the former ones, the counts are
    those of a histogram that had known all the values from the start, in whatever order they came.
    """

    exponent: int = _MIN_EXPONENT
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count finite float32 values."""
        if values.size == 0:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self._cover(self.low, self.high)
        # In float64 scaling by a power of two is exact for every float32: none becomes 0.
        scaled = np.floor(np.ldexp(values.ravel().astype(np.float64), -self.exponent))
        self.counts += np.bincount((scaled - self.first).astype(np.int64), minlength=len(self.counts))

    def range(self, percentile: float) -> Range:
        """The values between the two bins that end with the given share of all values above, and below, them.

        Args:
            percentile: of the values, 50 to 100, that lie below the upper end, and above the lower end.
        """
        below = np.cumsum(self.counts)
        share = below[-1] * (percentile / 100)
        upper = self.first + int(np.searchsorted(below, share)) + 1
        above = np.cumsum(self.counts[::-1])
        lower = self.first + len(self.counts) - 1 - int(np.searchsorted(above, share))
        width = 2.0**self.exponent
        return Range(max(self.low, lower * width), min(self.high, upper * width))

    def _cover(self, low: float, high: float) -> None:
        """Merge bins until `low` to `high` needs at most 2,048, and lay the counts out from the bin of `low`."""
        exponent = self.exponent
        while True:
            first, last = (math.floor(math.ldexp(value, -exponent)) for value in (low, high))
            if last - first < BINS and max(-first, last) <= _MAX_BIN:
                break
            exponent += 1
        counts = np.zeros(last - first + 1, np.int64)
        former = (self.first + np.arange(len(self.counts))) >> (exponent - self.exponent)
        np.add.at(counts, former - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts


def _session(model: onnx.ModelProto, outputs: list[str]) -> onnxruntime.InferenceSession:
    """A session that returns inner tensors.

    Graph outputs keep their names and values through ONNX Runtime's optimisations, which are on: they halve the time.
    """
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    replace(
        probed.graph.output, [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # An arena keeps, and doubles, what one image once needed; and in this order a value is reduced as soon as it is
    # there, and not after all the others: at 800 x 800 pixels that is gigabytes.
    options.enable_cpu_mem_arena = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
