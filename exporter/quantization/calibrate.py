"""Ranges of activations over calibration images, by numpy and the fastest runtime there is.

One pass over the images. The values are counted in histograms of bounded size, on all cores, and forgotten.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.quantization import qdq_cpu, qdq_gpu
from convoynet.exporter.quantization.histogram import Extremes, Histogram, NotFinite, Range
from convoynet.exporter.quantization.output_error import joint_errors, output_errors
from convoynet.exporter.quantization.tail import Tail
from convoynet.exporter.quantization.taps import open_taps
from convoynet.exporter.recipe import CALIBRATION_METHODS as METHODS

PERCENTILE = 99.99
# "auto" runs the network on about so many images in all, for every tensor and method on the same few ...
TRIALS = 4096
# ... of which there are no fewer, however many tensors there are, and no more.
FEWEST_HELD_OUT, MOST_HELD_OUT = 4, 32
# What the choices are worth together is judged on so many, as far as they fit into so many bytes.
MOST_JUDGED, _JUDGED_BYTES = 128, 2**26
# Image 1 of 0 to 3 is held out, and so on: with two images there is one for each purpose.
_PARTS = (0, 1, 0, 0)
_LOGITS = "logits"
_Tally = TypeVar("_Tally", Histogram, Tail, Extremes)

# Activations that leave the runtime at a time.
_MAX_BYTES = 2**28
# Images are counted in groups: at the end of each some cores wait for others. As many batches as make so many images,
# or bytes of them.
_GROUP_IMAGES, _GROUP_BYTES = 128, 2**25


def calibrate(model: onnx.ModelProto, batches: Iterable[np.ndarray], method: str) -> dict[str, Range]:
    """Measure the range of every activation that `quantize` may need, for either target.

    The result does not depend on how the images are divided into batches. "percentile" leaves out the largest and the
    smallest 0.01 % of the values; for "entropy" and "mse" see `Histogram`. "auto" decides for each tensor which of the
    others serves it best: every fourth image is held out, the ranges come from the rest, and the one that moves the
    logits of the held-out images least, when that tensor alone is quantized, shows the method. What serves each tensor
    alone need not serve them together: where one method for all moves the logits less once everything is quantized, for
    both targets on the geometric mean, that one is taken. The ranges are then made anew from all images. The runs that
    this takes are bounded, see TRIALS. The outputs of a detector are lists, which cannot be subtracted: there the
    held-out values of the tensor itself decide.

    Args:
        model: a float graph with one input.
        batches: arrays of exactly what the graph's input takes; the sizes may differ.
        method: one of METHODS.

    Returns:
        Tensor name -> range, which says what method chose it, in the order of the graph.

    Raises:
        BadInput: unknown method, no images, a batch that does not fit the input, or a network that computes a value
            that is not finite.
    """
    if method not in METHODS:
        raise BadInput(f"calibration method {method!r}: use {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    graph = Graph(model)
    wanted = {name for place in (qdq_cpu.place, qdq_gpu.place) for name in place(graph).tensors}
    tensors = [name for name in [*graph.inputs, *(name for node in graph for name in node.output)] if name in wanted]
    if method == "minmax":
        (extremes,) = _count(model, batches, tensors, (0,), Extremes)
        return {name: found.minmax() for name, found in extremes.items()}
    if method == "auto":
        return _best(model, batches, tensors)
    if method == "mse":
        (tails,) = _count(model, batches, tensors, (0,), Tail)
        return {name: tail.mse() for name, tail in tails.items()}
    (histograms,) = _count(model, batches, tensors, (0,), Histogram)
    return {name: _CHOOSE[method](histogram) for name, histogram in histograms.items()}


_CHOOSE: dict[str, Callable[[Histogram], Range]] = {
    # The first of those that serve a tensor equally well is taken.
    "mse": Histogram.mse,
    "entropy": Histogram.entropy,
    "percentile": lambda histogram: histogram.percentile(PERCENTILE),
    "minmax": Histogram.minmax,
}


def _count(
    model: onnx.ModelProto,
    batches: Iterable[np.ndarray],
    tensors: list[str],
    parts: Sequence[int],
    tally: type[_Tally],
) -> list[dict[str, _Tally]]:
    """Count the tensors over each part of the images; image i belongs to the part `parts[i % len(parts)]`."""
    inputs = Graph(model).inputs
    taps = open_taps(model, [name for name in tensors if name not in inputs])
    counted = [{name: tally() for name in tensors} for _ in range(max(parts) + 1)]
    images = 0
    for batch in _grouped(_checked(model, batches)):
        belongs = np.take(parts, np.arange(images, images + len(batch)), mode="wrap")
        images += len(batch)
        # Each part has its own run: not every tensor has one row for one image.
        for part, tallies in enumerate(counted):
            own = batch[belongs == part]
            for name in tallies.keys() & inputs:
                _add(tallies, name, own)
            taps(own, partial(_add, tallies))
    return counted


def _add(tallies: Mapping[str, Histogram | Tail | Extremes], name: str, values: np.ndarray) -> None:
    """Let the tally of a tensor see some values; several threads do, and in whatever order it counts the same."""
    try:
        tallies[name].add(values)
    except NotFinite as error:
        raise _not_finite(name) from error


def _best(model: onnx.ModelProto, batches: Iterable[np.ndarray], tensors: list[str]) -> dict[str, Range]:
    """The range of each tensor by the method that serves it best on images which did not make the ranges."""
    limit = min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, TRIALS // (len(_CHOOSE) * max(len(tensors), 1))))
    pixels = math.prod(size or 1 for size in shapes(model).get(Graph(model).inputs[0], ())[1:])
    sample = _Sample(max(limit, min(MOST_JUDGED, _JUDGED_BYTES // (4 * pixels))))
    used, held_out = _count(model, sample.watch(batches), tensors, _PARTS, Histogram)
    candidates = {name: [choose(histogram) for choose in _CHOOSE.values()] for name, histogram in used.items()}
    # A single image has to do both.
    tests = {name: held_out[name] if len(held_out[name].counts) else histogram for name, histogram in used.items()}
    if _LOGITS in Graph(model).outputs:
        images, rows = np.stack(sample.images), _rows(model, tensors)
        few = images[:: -(-len(images) // limit)]
        trials = [few[at : at + rows] for at in range(0, len(few), rows)]
        chosen = _least(output_errors(model, _LOGITS, trials, candidates))
        plans = [chosen, *(dict.fromkeys(candidates, index) for index in range(len(_CHOOSE)))]
        judged = [images[at : at + rows] for at in range(0, len(images), rows)]
        planned = [{name: candidates[name][index] for name, index in plan.items()} for plan in plans]
        # The first of those that are equally good is taken.
        chosen = plans[int(np.argmin(joint_errors(model, _LOGITS, judged, planned)))]
    else:
        chosen = _least({n: [tests[n].squared_error(span) for span in spans] for n, spans in candidates.items()})
    for name, histogram in used.items():
        histogram.merge(held_out[name])
    return {name: _CHOOSE[candidates[name][index].method](used[name]) for name, index in chosen.items()}


def _least(errors: dict[str, list[float]]) -> dict[str, int]:
    """For each tensor the place of its smallest error."""
    return {name: int(np.argmin(found)) for name, found in errors.items()}


class _Sample:
    """Up to `limit` of the held-out images of a stream, evenly spread: folders are sorted by class."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._kept: list[np.ndarray] = []
        self._first: list[np.ndarray] = []

    @property
    def images(self) -> list[np.ndarray]:
        """Those kept; of a single image, itself."""
        return self._kept or self._first

    def watch(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass the batches on and keep some images; what is wrong with a batch is for its consumer to find."""
        images = held_out = 0
        for batch in batches:
            yield batch
            for image in batch:
                if _PARTS[images % len(_PARTS)]:
                    self._offer(held_out, image)
                    held_out += 1
                elif not images:
                    self._first = [image.copy()]
                images += 1

    def _offer(self, index: int, image: np.ndarray) -> None:
        if index % self._stride == 0 and len(self._kept) == self._limit:
            self._kept = self._kept[::2]
            self._stride *= 2
        if index % self._stride == 0:
            self._kept.append(image.copy())


def _rows(model: onnx.ModelProto, tensors: list[str]) -> int:
    """How many images may be computed at a time for their activations to take bounded memory."""
    known = shapes(model)
    image_bytes = 4 * sum(math.prod(size or 1 for size in known.get(name, ())) for name in tensors)
    return max(1, _MAX_BYTES // max(image_bytes, 1))


def _checked(model: onnx.ModelProto, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches, checked against the input of the graph; at least one image in all."""
    (signature,) = (value for value in model.graph.input if value.name in Graph(model).inputs)
    dtype = helper.tensor_dtype_to_np_dtype(signature.type.tensor_type.elem_type)
    shape = [dim.dim_value or dim.dim_param for dim in signature.type.tensor_type.shape.dim]
    images = 0
    for batch in batches:
        if batch.dtype != dtype or batch.ndim < 1 or list(batch.shape[1:]) != shape[1:]:
            given = f"{batch.dtype} {list(batch.shape)}"
            raise BadInput(f"calibration batch {given}: input {signature.name!r} takes {dtype} {shape}")
        images += len(batch)
        yield batch
    if not images:
        raise BadInput("there are no calibration images: give at least one")


def _grouped(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The images of batches in larger ones, of about _GROUP_IMAGES or _GROUP_BYTES."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _GROUP_IMAGES or sum(part.nbytes for part in waiting) >= _GROUP_BYTES:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _not_finite(name: str) -> BadInput:
    return BadInput(
        f"tensor {name!r} is not finite (NaN or infinity) on the calibration images: check weights and images"
    )
