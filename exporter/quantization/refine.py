"""Refinements of an INT8 quantization, each kept only where measurement says that it helps.

Every refinement changes stored numbers of the float graph, and the ranges that go with them: `quantize` stays the one
place where integers are made. What judges is the signal-to-noise ratio of the outputs on every fourth image, or on
every second one where there is a single attempt; nothing is fitted on these here.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_from_torch import OUTPUT_NAME, compared
from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.progress import Progress
from convoynet.exporter.quantization.adaround import MAX_INPUTS, fan_in, learn_rounding
from convoynet.exporter.quantization.bias_correction import channel_means, correct_bias
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.equalize import chains, equalize
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.layer_data import BATCH, quantized_layers, run
from convoynet.exporter.quantization.mean_correction import mean_shifts, shift_biases
from convoynet.exporter.quantization.qdq_placement import has_weights
from convoynet.exporter.quantization.quantize import layers, quantize
from convoynet.exporter.recipe import Int8

EQUALIZATION, ROUNDING, BIAS = "cross-layer equalization", "learned rounding", "bias correction"
MEANS = "mean correction"
# Multiply-adds in all: what bounds the time. ResNet-50 at 224 x 224 takes 4e9 for one image.
WORK = 10**13
# Learned rounding is asked for by those who have the time.
_PATIENCE = 4
# Where nothing but the means is corrected, which every export pays for: so many images, and multiply-adds of a run.
IMAGES_AT_ONCE, WORK_AT_ONCE = 48, 2 * 10**11
# No attempt is judged on fewer images than a quarter of these.
FEWEST_IMAGES = 16
# Outputs of all images, in bytes, as far as FEWEST_IMAGES allows.
_OUTPUT_BYTES = 2**28
# Image 1 of 0 to 3 judges, as in `calibrate`; image 1 of 0 and 1 where there is a single attempt.
_PART, _PARTS, _PARTS_OF_ONE = 1, 4, 2
# A gain below this is noise of the few images that judge.
_LEAST_GAIN_DB = 0.01
_MOST_DB = 200.0


@dataclass(frozen=True)
class Refined:
    """What came of the refinements.

    Attributes:
        model: a float graph of the same nodes, for `quantize`.
        ranges: the ranges of its activations.
        log: one entry for each attempt in their order: `layer`, `technique`, `sqnr_before` and `sqnr_after` of the
            first output in dB on the images that judge, `kept`; an attempt that was not made has None and a `reason`.
        reason: why nothing was tried; "" where something was.
        shifts: first output of a layer -> what was added to its bias because its input and weights are rounded.
        judges: how many images judged.
    """

    model: onnx.ModelProto
    ranges: dict[str, Range]
    log: list[dict[str, Any]]
    reason: str = ""
    shifts: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    judges: int = 0

    def float_biases(self, layers: Collection[str]) -> onnx.ModelProto:
        """`model`, where some layers are not to be quantized after all: their biases lose what rounding asked for."""
        back = {name: -shift for name, shift in self.shifts.items() if name in layers}
        return shift_biases(self.model, back) if back else self.model

    @property
    def means(self) -> str:
        """In a line, what became of the mean correction; "" where it was not asked for."""
        entry = next((entry for entry in self.log if entry["technique"] == MEANS), None)
        if entry is None:
            return f"left as they are: {self.reason}" if self.reason else ""
        images = f"on {self.judges} images that judge"
        if "reason" in entry:
            return f"left as they are: {entry['reason']}"
        before, after = entry["sqnr_before"], entry["sqnr_after"]
        if entry["kept"]:
            return f"of {entry['layer']} moved to keep the means: {before:.1f} -> {after:.1f} dB {images}"
        found = "no number" if after is None else f"{after:.1f} dB"
        return f"left as they are: moved to keep the means, they give {found}, not {before:.1f} dB, {images}"


def refine(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    images: np.ndarray,
    step: Int8,
    target: str,
    progress: Progress,
) -> Refined:
    """Try what `step` asks for, and keep what brings the outputs nearer to float32's.

    The number of images that an attempt runs falls with the number of attempts and the cost of the network, so that
    WORK bounds the multiply-adds, down to FEWEST_IMAGES; beyond that the work grows with the number of layers times
    the cost of the network. The mean correction alone is one attempt, on IMAGES_AT_ONCE at most. The same arguments
    give the same result on one machine.

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
    sample, judges = _sampled(model, images, step, len(links), len(layers(model, target)))
    trial = _Trial(model, dict(ranges), target, sample[judges])
    if links:
        with progress.step("equalizing layers"):
            equal = calibrate(equalize(model, links), _batches(images), step.method)
        for chain in progress.track(links, EQUALIZATION):
            changed = {name: equal[name] for name in chain.between if name in equal}
            trial.offer(" - ".join(chain.layers), EQUALIZATION, equalize(trial.model, [chain]), trial.ranges | changed)
    exact, fitted = trial.model, sample[~judges]
    shifts: dict[str, np.ndarray] = {}
    if step.correct_means:
        with progress.step(MEANS):
            shifts = _correct_means(trial, _evenly(fitted, IMAGES_AT_ONCE // _PARTS_OF_ONE))
    if step.adaround or step.correct_bias:
        learned = _by_layer(trial, step, exact, fitted, progress)
        shifts = {name: shift for name, shift in shifts.items() if name not in learned}
    return Refined(trial.model, trial.ranges, trial.log, shifts=shifts, judges=int(judges.sum()))


def _correct_means(trial: "_Trial", images: np.ndarray) -> dict[str, np.ndarray]:
    """Move the biases of all layers at once where that helps; returns by how much, nothing where it does not."""
    shifts = mean_shifts(trial.model, trial.quantized, images)
    if not shifts:
        trial.skip("none", MEANS, "no quantized layer has a bias of its own")
        return {}
    moved = trial.offer(f"all {len(shifts)} layers", MEANS, shift_biases(trial.model, shifts))
    return shifts if moved else {}


def _by_layer(
    trial: "_Trial", step: Int8, exact: onnx.ModelProto, images: np.ndarray, progress: Progress
) -> frozenset[str]:
    """Learn the rounding and correct the bias of one layer after the other; returns where the rounding was learned."""
    names, learned = quantized_layers(trial.model, trial.quantized), set()
    if step.adaround:
        for layer in progress.track(names, ROUNDING):
            if (inputs := fan_in(trial.model, layer)) > MAX_INPUTS:
                trial.skip(layer, ROUNDING, f"{inputs} inputs are more than {MAX_INPUTS}")
            elif trial.offer(layer, ROUNDING, learn_rounding(trial.model, trial.quantized, layer, images, exact)):
                learned.add(layer)
    if step.correct_bias and names:
        means = channel_means(exact, names, images)
        for layer in progress.track(names, BIAS):
            trial.offer(layer, BIAS, correct_bias(trial.model, trial.quantized, layer, images, means[layer]))
    return frozenset(learned)


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
        self._outputs = compared(Graph(model).outputs)
        self._reference = self._run(model)
        self._sqnr = self._judge(self.quantized)

    def offer(self, layer: str, technique: str, model: onnx.ModelProto, ranges: dict[str, Range] | None = None) -> bool:
        """Take another float graph over where it is better in every output once quantized; whether it is."""
        ranges = self.ranges if ranges is None else ranges
        quantized = quantize(model, ranges, self._target)
        sqnr = self._judge(quantized)
        # A network that a refinement drove to NaN compares as worse.
        kept = all(after > before + _LEAST_GAIN_DB for before, after in zip(self._sqnr, sqnr, strict=True))
        finite = round(sqnr[0], 3) if np.isfinite(sqnr[0]) else None
        self._note(layer, technique, finite, kept)
        if kept:
            self.model, self.ranges, self.quantized, self._sqnr = model, ranges, quantized, sqnr
        return kept

    def skip(self, layer: str, technique: str, reason: str) -> None:
        """Note an attempt that was not made."""
        self._note(layer, technique, None, False)
        self.log[-1]["reason"] = reason

    def _note(self, layer: str, technique: str, after: float | None, kept: bool) -> None:
        before = round(self._sqnr[0], 3)
        self.log.append(
            {"layer": layer, "technique": technique, "sqnr_before": before, "sqnr_after": after, "kept": kept}
        )

    def _judge(self, model: onnx.ModelProto) -> list[float]:
        return [sqnr_db(wanted, found) for wanted, found in zip(self._reference, self._run(model), strict=True)]

    def _run(self, model: onnx.ModelProto) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in zip(*run(model, self._outputs, self._images), strict=True)]


def _why_not(model: onnx.ModelProto, images: np.ndarray, step: Int8) -> str:
    if not (step.refines or step.correct_means):
        return "no refinement was asked for"
    if OUTPUT_NAME not in Graph(model).outputs:
        return "the outputs are no logits: lists of detections cannot be subtracted, so nothing can judge"
    if len(images) < 2:
        return "a single image cannot both make a refinement and judge it"
    return ""


def _sampled(
    model: onnx.ModelProto, images: np.ndarray, step: Int8, links: int, quantized: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images that are used, and which of them judge."""
    if step.refines:
        attempts = links + quantized * (step.adaround + step.correct_bias)
        sample = _sample(model, images, attempts, _PATIENCE * WORK if step.adaround else WORK)
        return sample, np.arange(len(sample)) % _PARTS == _PART
    sample = _sample(model, _evenly(images, IMAGES_AT_ONCE), 1, WORK_AT_ONCE)
    return sample, np.arange(len(sample)) % _PARTS_OF_ONE == _PART


def _sample(model: onnx.ModelProto, images: np.ndarray, attempts: int, work: int) -> np.ndarray:
    """As many images, evenly spread, as the work allows each attempt and the outputs find room."""
    known = shapes(model)
    outputs = compared(Graph(model).outputs)
    room = 4 * sum(int(np.prod([size or 1 for size in known.get(name, ())])) for name in outputs)
    each = min(work // (max(attempts, 1) * max(_multiply_adds(model), 1)), _OUTPUT_BYTES // max(room, 1))
    return _evenly(images, max(FEWEST_IMAGES, each))


def _evenly(images: np.ndarray, count: int) -> np.ndarray:
    return images if count >= len(images) else images[np.arange(count) * len(images) // count]


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
