"""Is the exported model the PyTorch model, how accurate is it, and how fast; and the gates that refuse it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.archs import Task
from convoynet.exporter.data.images import Preprocess, load_images
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.parity import Comparison, Parity, Sides, compare
from convoynet.exporter.progress import Progress

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Array, Images, Outputs, Predictor

# A float32 graph does the same sums in another order; anything above this is another network.
FP32_MAX_REL_ERROR = 1e-3
# Of pixels and of detections: some of very many lie so near a tie that float32's rounding decides. Detectors with
# random weights have the most of them.
FP32_MIN_SHARES = {"classification": 1.0, "segmentation": 0.99, "detection": 0.9}
# Measured. Sound INT8 graphs: trained CIFAR ResNets 0.97 to 0.99, random ResNets and MobileNets 0.95 to 1, a random
# EfficientNet, which post-training quantization suits least, 0.83. Broken ones of a trained ResNet-20: every range
# 8 times too wide 0.77, one range 4 times too narrow 0.67, all 2 times too narrow 0.07, swapped channels -0.34.
INT8_MIN_COSINE = 0.8
INT8_MIN_MATCHED = 0.5
# Below this a person is told to measure accuracy.
INT8_DOUBTFUL_COSINE = 0.95
# 16-bit types round in the fourth or the third digit: that moves ties, not a tenth of the images.
HALF_MAX_LOSS = 0.1
# The sizes that catch a batch axis frozen by tracing: one, two, and an odd number.
TELLING_BATCHES = (1, 2, 5)
EVAL_BATCH = 32
REFERENCE_BATCH = 8

# Speed: rounds of both sides in turn, so that other work on the machine slows both alike.
MIN_ROUNDS, MAX_ROUNDS = 3, 15
ROUND_SECONDS = 0.005
SIDE_SECONDS = 1.0
# On a machine too slow or too busy for that many rounds, one has to do.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Reference:
    """What PyTorch computed on the images that check: the name of who did, the network's task, and the outputs."""

    name: str
    task: Task
    outputs: Outputs


@dataclass(frozen=True)
class Accuracy:
    """Share of images (0 to 1) whose class is the first, or among the five best, for PyTorch and as exported."""

    samples: int
    reference_top1: float
    top1: float
    reference_top5: float
    top5: float


@dataclass(frozen=True)
class Speed:
    """Images per second of both sides at one batch size; medians of interleaved rounds."""

    batch: int
    reference_images_per_second: float
    images_per_second: float


def outputs_of(predictor: Predictor, images: Images, batch: int = REFERENCE_BATCH) -> Outputs:
    """Return the outputs for all uint8 NHWC `images`, computed `batch` at a time."""
    parts = [predictor(predictor.prepare(images[at : at + batch])) for at in range(0, len(images), batch)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def batch_plan(samples: int, batch: tuple[int, int]) -> list[int]:
    """Return batch sizes within `batch` that together cover `samples` images at least once.

    One, two, five and both ends of the range come first, then the largest that is not above EVAL_BATCH for the rest.
    """
    low, high = batch
    sizes = sorted({size for size in TELLING_BATCHES if low <= size <= high} | {low, high})
    usual = max(low, min(high, EVAL_BATCH))
    rest = samples - sum(sizes)
    return sizes + [usual] * max(0, -(-rest // usual))


def measure_parity(reference: Reference, exported: Predictor, images: Images, batch: tuple[int, int]) -> Comparison:
    """Run the exported model over `images` at telling batch sizes and compare.

    Args:
        reference: the outputs to compare with, one row for each image.
        exported: the model to check.
        images: uint8 NHWC [n, H, W, C].
        batch: smallest and largest batch that the model promises to take.
    """
    plan = batch_plan(len(images), batch)
    found = tuple(np.empty((sum(plan), *rows.shape[1:]), rows.dtype) for rows in reference.outputs)
    # Images come round again where the batches want more than there are.
    order = np.arange(sum(plan)) % len(images)
    at = 0
    for size in plan:
        outputs = exported(exported.prepare(images[order[at : at + size]]))
        for rows, output in zip(found, outputs, strict=True):
            rows[at : at + size] = output
        at += size
    sides = Sides(reference.name, exported.name, tuple(sorted(set(plan))))
    return compare(reference.task, reference.outputs, found, order, sides)


def check_fp32(parity: Parity) -> None:
    """Let a float32 graph pass only if it is the same network.

    Raises:
        Refused: max_rel_error above FP32_MAX_REL_ERROR (or not a number), or fewer images,
            pixels or detections alike than FP32_MIN_SHARES says.
    """
    least = FP32_MIN_SHARES[parity.task]
    if not parity.max_rel_error <= FP32_MAX_REL_ERROR or parity.agreement < least:
        raise Refused(
            f"the ONNX graph is not the PyTorch model: max relative error {parity.max_rel_error:.2e} "
            f"(allowed {FP32_MAX_REL_ERROR:.0e}), {parity.agreement_name} {parity.agreement:.2%} "
            f"(at least {least:.0%}) on {parity.samples} images; nothing was published"
        )


def why_unsteady(predictor: Predictor, images: Images) -> str:
    """Why a network cannot be compared image by image: its own answers differ; empty where they do not.

    Args:
        predictor: the PyTorch model.
        images: two or more, uint8 NHWC.
    """
    inputs = predictor.prepare(images[:REFERENCE_BATCH])
    if len(inputs) < 2:
        return ""
    first = predictor(inputs)
    if _differ(first, predictor(inputs)):
        return (
            "PyTorch itself answers otherwise when it is asked twice, so something in the network is random in "
            "evaluation too: F.dropout(x, p) needs training=self.training, and noise has no place there"
        )
    halves = [predictor(inputs[:1]), predictor(inputs[1:])]
    if _differ(first, tuple(np.concatenate(parts) for parts in zip(*halves, strict=True))):
        return (
            "PyTorch's answer for an image depends on the other images of its batch, as with BatchNorm2d("
            "track_running_stats=False) or a mean over the batch: a server batches images of strangers; use running "
            "statistics, or another normalisation"
        )
    return ""


def _differ(one: Outputs, other: Outputs) -> bool:
    """Whether outputs differ by more than float32's rounding makes them."""
    for left, right in zip(one, other, strict=True):
        spread = float(np.abs(left).max(initial=0.0))
        if left.shape != right.shape or not np.abs(left - right).max(initial=0.0) <= FP32_MAX_REL_ERROR * spread:
            return True
    return False


def check_int8(parity: Parity) -> None:
    """Let a quantized graph pass only if its outputs still say what the model's do.

    Raises:
        Refused: min_cosine below INT8_MIN_COSINE (or not a number), or less than INT8_MIN_MATCHED of the detections.
    """
    if parity.min_cosine is None:
        moved = parity.agreement < INT8_MIN_MATCHED
        figures = f"{parity.agreement_name} {parity.agreement:.2%} (at least {INT8_MIN_MATCHED:.0%})"
    else:
        moved = not parity.min_cosine >= INT8_MIN_COSINE
        figures = (
            f"smallest cosine {parity.min_cosine:.4f} (at least {INT8_MIN_COSINE}), "
            f"{parity.agreement_name} {parity.agreement:.2%}"
        )
    if moved:
        raise Refused(
            f"INT8 moved the outputs too far: {figures} on {parity.samples} images; nothing was published. "
            f"Try --calibration with images like the real ones, or another --calibration-method"
        )


def check_half(before: Parity, after: Parity) -> None:
    """Let a graph with 16-bit types pass only if it is as good as the one that it was made from.

    Raises:
        Refused: its agreement with PyTorch is HALF_MAX_LOSS lower.
    """
    if not after.agreement >= before.agreement - HALF_MAX_LOSS:
        raise Refused(
            f"16-bit types moved the outputs too far: {after.agreement_name} {after.agreement:.2%}, from "
            f"{before.agreement:.2%}, on {after.samples} images; nothing was published. Leave out --fp16 or --bf16"
        )


def check_engine(graph: Parity, engine: Parity) -> None:
    """Let a TensorRT engine pass only if it is as good as the graph that it was built from.

    Raises:
        Refused: its agreement with PyTorch is HALF_MAX_LOSS lower, or its outputs point elsewhere.
    """
    apart = engine.min_cosine is not None and not engine.min_cosine >= min(INT8_MIN_COSINE, graph.min_cosine or 0.0)
    if apart or not engine.agreement >= graph.agreement - HALF_MAX_LOSS:
        cosine = "" if engine.min_cosine is None else f", smallest cosine {engine.min_cosine:.4f}"
        raise Refused(
            f"the TensorRT engine is not the graph that it was built from: {engine.agreement_name} "
            f"{engine.agreement:.2%}{cosine}, from {graph.agreement:.2%}, on {engine.samples} images; nothing was "
            f"published. Compare them tensor by tensor, or use --format onnx"
        )


def check_drop(accuracy: Accuracy, max_drop: float) -> None:
    """Compare the loss of top-1 accuracy with what is allowed, in percentage points.

    Raises:
        Refused: the loss is larger.
    """
    drop = 100 * (accuracy.reference_top1 - accuracy.top1)
    # The small term forgives the rounding of the division, not an image.
    if drop > max_drop + 1e-9:
        raise Refused(
            f"top-1 fell by {drop:.2f} points, from {accuracy.reference_top1:.2%} to {accuracy.top1:.2%} on "
            f"{accuracy.samples} images, and --max-drop allows {max_drop:g}; nothing was published"
        )


def measure_accuracy(
    reference: Predictor,
    exported: Predictor,
    labelled: Sequence[tuple[Path, int]],
    preprocess: Preprocess,
    progress: Progress,
    batch: int = EVAL_BATCH,
) -> Accuracy:
    """Run both models over labelled image files, `batch` of them at a time."""
    before, after = hit_rates((reference, exported), labelled, preprocess, progress, batch)
    return Accuracy(len(labelled), before[0], after[0], before[1], after[1])


def hit_rates(
    predictors: Sequence[Predictor],
    labelled: Sequence[tuple[Path, int]],
    preprocess: Preprocess,
    progress: Progress,
    batch: int = EVAL_BATCH,
) -> list[tuple[float, float]]:
    """For each model the share (0 to 1) of images whose class is the first, and among the five best."""
    hits = np.zeros((len(predictors), 2), np.int64)
    batches = [labelled[at : at + batch] for at in range(0, len(labelled), batch)]
    for chosen in progress.track(batches, f"accuracy on {len(labelled)} images", len(batches)):
        images = load_images([path for path, _ in chosen], preprocess)
        classes = np.array([label for _, label in chosen])
        for index, predictor in enumerate(predictors):
            (logits,) = predictor(predictor.prepare(images))
            right = np.argsort(-logits, axis=1, kind="stable")[:, :5] == classes[:, None]
            hits[index] += right[:, 0].sum(), right.any(axis=1).sum()
    return [(float(top1), float(top5)) for top1, top5 in hits / len(labelled)]


def measure_speed(
    reference: Predictor, exported: Predictor, images: Images, batches: Iterable[int], progress: Progress
) -> list[Speed]:
    """Time both models at each batch size, on inputs that are prepared already."""
    speeds = []
    for batch in progress.track(list(dict.fromkeys(batches)), "speed"):
        chosen = images[np.arange(batch) % len(images)]
        seconds = seconds_of_call([(predictor, predictor.prepare(chosen)) for predictor in (reference, exported)])
        speeds.append(Speed(batch, *(batch / once for once in seconds)))
    return speeds


def seconds_of_call(sides: Sequence[tuple[Predictor, Array]]) -> list[float]:
    """The median seconds that each model takes for its inputs, in rounds of one after the other."""
    for side in sides:  # the first call allocates and plans
        _seconds(*side, 1)
    once = [_seconds(*side, 1) for side in sides]
    calls = [max(1, round(ROUND_SECONDS / seconds)) for seconds in once]
    round_seconds = max(seconds * count for seconds, count in zip(once, calls, strict=True))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(SIDE_SECONDS / round_seconds)))
    taken: list[list[float]] = [[] for _ in sides]
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while len(taken[0]) < rounds and not (taken[0] and time.perf_counter() > deadline):
        for side, count, seconds in zip(sides, calls, taken, strict=True):
            seconds.append(_seconds(*side, count))
    return [statistics.median(seconds) for seconds in taken]


def _seconds(predictor: Predictor, inputs: Array, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        predictor(inputs)
    return (time.perf_counter() - began) / calls


def speed_summary(speeds: Sequence[Speed]) -> dict[str, object]:
    """Return the batch size at which the exported model does most, and every one that was timed."""
    best = max(speeds, key=lambda speed: speed.images_per_second)
    return {**asdict(best), "batches": [asdict(speed) for speed in speeds]}
