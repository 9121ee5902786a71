"""Refinements of an INT8 quantization, each kept only where measurement says that it helps.

Every refinement changes stored numbers of the float graph, and the ranges that go with them: `quantize` stays the one
place where integers are made. What judges is the signal-to-noise ratio of the logits on every fourth image, on which
nothing is fitted here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_from_torch import OUTPUT_NAME
from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.progress import Progress
from convoynet.exporter.quantization.adaround import MAX_INPUTS, fan_in, learn_rounding
from convoynet.exporter.quantization.bias_correction import channel_means, correct_bias
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.equalize import chains, equalize
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.layer_data import BATCH, quantized_layers, run
from convoynet.exporter.quantization.qdq_placement import has_weights
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import Int8

EQUALIZATION, ROUNDING, BIAS = "cross-layer equalization", "learned rounding", "bias correction"
# Multiply-adds in all: what bounds the time. ResNet-50 at 224 x 224 takes 4e9 for one image.
WORK = 10**13
# Learned rounding is asked for by those who have the time.
_PATIENCE = 4
# No attempt is judged on fewer images than a quarter of these.
FEWEST_IMAGES = 16
# Image 1 of 0 to 3 judges, as in `calibrate`.
_PART, _PARTS = 1, 4
# A gain below this is noise of the few images that judge.
_LEAST_GAIN_DB = 0.01
_MOST_DB = 200.0


@dataclass(frozen=True)
class Refined:
    """What came of the refinements.

    Attributes:
        model: a float graph of the same nodes, for `quantize`.
        ranges: the ranges of its activations.
        log: one entry for each attempt in their order: `layer`, `technique`, `sqnr_before` and `sqnr_after` in dB on
            the images that judge, `kept`; an attempt that was not made has None and a `reason`.
        reason: why nothing was tried; "" where something was.
    """

    model: onnx.ModelProto
    ranges: dict[str, Range]
    log: list[dict[str, Any]]
    reason: str = ""


def refine(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    images: np.ndarray,
    step: Int8,
    target: str,
    progress: Progress,
) -> Refined:
    """Try what `step` asks for, chain by chain and layer by layer, and keep what brings the logits nearer to float32's.

    The number of images that an attempt runs falls with the number of attempts and the cost of the network, so that
    WORK bounds the multiply-adds, down to FEWEST_IMAGES; beyond that the work grows with the number of layers times
    the cost of the network. The same arguments give the same result on one machine.

    Args:
        model: a float graph; it is not changed.
        ranges: from `calibrate`, over the same images.
        images: the calibration images, exactly what the graph's input takes, [n, ...].
        step: says which refinements to try, and how to calibrate what equalization changed.
        target: "cpu" or "gpu", of `quantize`.
        progress: shows the layers.

    Raises:
        BadInput: unknown target, or a tensor without a range.
    """
    reason = _why_not(model, images, step)
    if reason:
        return Refined(model, dict(ranges), [], reason)
    links = chains(model) if step.equalize else []
    quantized = quantize(model, ranges, target)
    layers = quantized_layers(model, quantized)
    attempts = len(links) + len(layers) * (step.adaround + step.correct_bias)
    sample = _sample(model, images, attempts, _PATIENCE * WORK if step.adaround else WORK)
    judges = np.arange(len(sample)) % _PARTS == _PART
    trial = _Trial(model, dict(ranges), target, sample[judges])
    if links:
        with progress.step("equalizing layers"):
            equal = calibrate(equalize(model, links), _batches(images), step.method)
        for chain in progress.track(links, EQUALIZATION):
            changed = {name: equal[name] for name in chain.between if name in equal}
            trial.offer(" - ".join(chain.layers), EQUALIZATION, equalize(trial.model, [chain]), trial.ranges | changed)
    exact, fitted = trial.model, sample[~judges]
    if step.adaround:
        for layer in progress.track(layers, ROUNDING):
            if (inputs := fan_in(model, layer)) > MAX_INPUTS:
                trial.skip(layer, ROUNDING, f"{inputs} inputs are more than {MAX_INPUTS}")
                continue
            trial.offer(layer, ROUNDING, learn_rounding(trial.model, trial.quantized, layer, fitted, exact))
    if step.correct_bias and layers:
        means = channel_means(exact, layers, fitted)
        for layer in progress.track(layers, BIAS):
            trial.offer(layer, BIAS, correct_bias(trial.model, trial.quantized, layer, fitted, means[layer]))
    return Refined(trial.model, trial.ranges, trial.log)


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """The reference against its difference to what was found, as a ratio of squares, in decibels; at most 200."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - found).sum())
    if noise <= signal * 10 ** (-_MOST_DB / 10):
        return _MOST_DB
    return float(10 * np.log10(max(signal, np.finfo(np.float64).tiny) / noise))


class _Trial:
    """The best graph so far, and what was tried."""

    def __init__(self, model: onnx.ModelProto, ranges: dict[str, Range], target: str, images: np.ndarray) -> None:
        self.model = model
        self.ranges = ranges
        self.quantized = quantize(model, ranges, target)
        self.log: list[dict[str, Any]] = []
        self._target = target
        self._images = images
        self._reference = self._logits(model)
        self._sqnr = sqnr_db(self._reference, self._logits(self.quantized))

    def offer(self, layer: str, technique: str, model: onnx.ModelProto, ranges: dict[str, Range] | None = None) -> None:
        """Take another float graph over where it is better once quantized."""
        ranges = self.ranges if ranges is None else ranges
        quantized = quantize(model, ranges, self._target)
        sqnr = sqnr_db(self._reference, self._logits(quantized))
        # A network that a refinement drove to NaN compares as worse.
        kept = bool(sqnr > self._sqnr + _LEAST_GAIN_DB)
        finite = round(sqnr, 3) if np.isfinite(sqnr) else None
        self._note(layer, technique, finite, kept)
        if kept:
            self.model, self.ranges, self.quantized, self._sqnr = model, ranges, quantized, sqnr

    def skip(self, layer: str, technique: str, reason: str) -> None:
        """Note an attempt that was not made."""
        self._note(layer, technique, None, False)
        self.log[-1]["reason"] = reason

    def _note(self, layer: str, technique: str, after: float | None, kept: bool) -> None:
        before = round(self._sqnr, 3)
        self.log.append(
            {"layer": layer, "technique": technique, "sqnr_before": before, "sqnr_after": after, "kept": kept}
        )

    def _logits(self, model: onnx.ModelProto) -> np.ndarray:
        return np.concatenate([logits for (logits,) in run(model, [OUTPUT_NAME], self._images)])


def _why_not(model: onnx.ModelProto, images: np.ndarray, step: Int8) -> str:
    if not (step.equalize or step.correct_bias or step.adaround):
        return "no refinement was asked for"
    if Graph(model).outputs != [OUTPUT_NAME]:
        return "the outputs are no logits: lists of detections cannot be subtracted, so nothing can judge"
    if len(images) < 2:
        return "a single image cannot both make a refinement and judge it"
    return ""


def _sample(model: onnx.ModelProto, images: np.ndarray, attempts: int, work: int) -> np.ndarray:
    """As many images, evenly spread, as the work allows each attempt."""
    each = max(FEWEST_IMAGES, work // (max(attempts, 1) * max(_multiply_adds(model), 1)))
    if each >= len(images):
        return images
    return images[np.arange(each) * len(images) // each]


def _multiply_adds(model: onnx.ModelProto) -> int:
    """Of the layers with weights, for one image; 1 for each output whose shape is not known."""
    graph, known = Graph(model), shapes(model)
    total = 0
    for node in graph:
        if has_weights(graph, node):
            dims = graph.initializers[node.input[1]].dims
            places = int(np.prod([size or 1 for size in known.get(node.output[0], ())[2:]]))
            total += int(np.prod(dims)) * places
    return total


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    return (images[at : at + BATCH] for at in range(0, len(images), BATCH))
