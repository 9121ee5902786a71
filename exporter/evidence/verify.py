"""Is the exported model the PyTorch model, and the gates that refuse it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.archs import Task
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.parity import Comparison, Parity, Sides, compare

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Images, Outputs, Predictor

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


@dataclass(frozen=True)
class Reference:
    """What PyTorch computed on the images that check: the name of who did, the network's task, and the outputs."""

    name: str
    task: Task
    outputs: Outputs


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
