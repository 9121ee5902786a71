"""Is the exported model the PyTorch model, and the gates that refuse it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.archs import Task
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import limits
from convoynet.exporter.evidence.limits import Kind
from convoynet.exporter.evidence.parity import PYTORCH, Comparison, Parity, Sides, compare
from convoynet.exporter.evidence.spread import Spread

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Images, Outputs, Predictor

# The sizes that catch a batch axis frozen by tracing: one, two, and an odd number.
TELLING_BATCHES = (1, 2, 5)
EVAL_BATCH = 32
REFERENCE_BATCH = 8


@dataclass(frozen=True)
class Reference:
    """What PyTorch computed on the images that check.

    Attributes:
        name: who did.
        task: the network's.
        outputs: one row for each image.
        kind: what the outputs mean, where it is told.
        others: names of the outputs behind those of the task.
        untrained: whether the limits are those for random weights.
    """

    name: str
    task: Task
    outputs: Outputs
    kind: Kind | None = None
    others: tuple[str, ...] = ()
    untrained: bool = False


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
    sides = Sides(
        reference.name,
        exported.name,
        tuple(sorted(set(plan))),
        kind=reference.kind,
        others=reference.others,
        untrained=reference.untrained,
    )
    return compare(reference.task, reference.outputs, found, order, sides)


def check_fp32(parity: Parity) -> None:
    """Let a float32 graph pass only if it is the same network.

    Raises:
        Refused: an error above `limits.FP32_MAX_REL_ERROR` of the largest output or `limits.FP32_SPREAD_ERROR` of the
            spread (or not a number), an output that is dead or shifted, or fewer images, pixels or detections alike
            than `limits.FP32_MIN_SHARES` says; of any output.
    """
    for prefix, one in _each(parity):
        if not fp32_within(one):
            least, spread = _least(one), _error(one)
            named = f", {one.spread.named()}" if one.spread is not None and one.spread.faults else ""
            shares = f" and {spread:.2g} of the spread (allowed {limits.FP32_SPREAD_ERROR})" if one.spread else ""
            model = "the PyTorch model" if one.who == PYTORCH else one.who
            raise Refused(
                f"the ONNX graph is not {model}: {prefix}max relative error {one.max_rel_error:.2e} "
                f"(allowed {limits.FP32_MAX_REL_ERROR:.0e}){shares}{named}, {one.agreement_name} {one.agreement:.2%} "
                f"(at least {least:.0%}) on {one.samples} images; nothing was published"
            )


def fp32_within(one: Parity) -> bool:
    """Whether one output of a float32 graph is PyTorch's."""
    near = one.max_rel_error <= limits.FP32_MAX_REL_ERROR and _error(one) <= limits.FP32_SPREAD_ERROR
    return near and not (one.spread is not None and one.spread.faults) and one.agreement >= _least(one)


def _least(one: Parity) -> float:
    return limits.FP32_MIN_SHARES[one.task] if one.decides else 0.0


def _error(one: Parity) -> float:
    return one.spread.error if one.spread is not None and one.spread.error is not None else 0.0


def _each(parity: Parity) -> list[tuple[str, Parity]]:
    """Every output, and how a line about it begins."""
    return [("", parity), *((f"output {name}: ", other) for name, other in parity.others.items())]


def check_int8(parity: Parity) -> None:
    """Let a quantized graph pass only if its outputs still say what the model's do.

    Raises:
        Refused: the error against the spread of an output is above `limits.INT8` (or not a number), an output is dead
            or shifted, or less than `limits.INT8_MIN_MATCHED` of the detections have a partner.
    """
    for prefix, one in _each(parity):
        if reason := int8_reason(one):
            raise Refused(
                f"INT8 moved the outputs too far: {prefix}{reason}, {one.agreement_name} {one.agreement:.2%}, on "
                f"{one.samples} images; nothing was published. Try --calibration with images like the real ones, or "
                f"another --calibration-method{_by_accuracy(one)}"
            )


def _by_accuracy(one: Parity) -> str:
    """The way out where accuracy can be measured: it decides in the place of the error."""
    classes = one.spread is not None and one.spread.kind == "classification" and not one.spread.untrained
    return ", or let --eval and --max-drop decide, which keep layers in higher precision" if classes else ""


def int8_reason(parity: Parity) -> str:
    """Why quantized outputs do not say what PyTorch's say; empty where they do."""
    spread = parity.spread
    if not np.isfinite(parity.max_abs_error):
        return "some are not a number"
    if spread is None:
        few = parity.agreement < limits.INT8_MIN_MATCHED
        return f"fewer than {limits.INT8_MIN_MATCHED:.0%} of the detections have a partner" if few else ""
    if spread.error is None:
        size = 10 ** (-(parity.sqnr_db if parity.sqnr_db is not None else np.inf) / 20)
        far = size > limits.ONE_IMAGE_ERROR and spread.outputs > 1
        return f"their error is {size:.2f} of their size" if far else spread.named()
    limit, name = limit_of(spread), limits.INT8[spread.kind].name
    if not spread.error <= limit:
        named = f"; {spread.named()}" if spread.faults else ""
        return (
            f"their error is {spread.error:.2f} of what {parity.who}'s vary by from image to image (at most {limit} "
            f"for {name}; one answer for all images has 1){named}"
        )
    return spread.named()


def limit_of(spread: Spread) -> float:
    """The largest error, as a share of the spread, that INT8 may make."""
    if spread.images < limits.FEWEST_IMAGES:
        return limits.FEW_LIMIT
    known = limits.INT8[spread.kind]
    return known.untrained if spread.untrained and known.untrained is not None else known.error


def constants(parity: Parity, what: str) -> list[str]:
    """What to keep in mind where PyTorch gives one answer for all images; `what` is the graph's precision."""
    return [
        f"{prefix}{one.who} answers the same for all {one.spread.images} images that check the result, so that "
        f"nothing shows what {what} keeps: look at the weights, or give images that differ"
        for prefix, one in _each(parity)
        if one.spread is not None and one.spread.error is None and one.spread.images > 1
    ]


def int8_caveats(parity: Parity, precision: str) -> list[str]:
    """What to keep in mind of a quantized graph that passed."""
    told = constants(parity, precision)
    for prefix, one in _each(parity):
        spread = one.spread
        if spread is None or (spread.error is None and spread.images > 1):
            continue
        if spread.images < limits.FEWEST_IMAGES:
            told.append(
                f"{prefix}{spread.images} image{'s' * (spread.images > 1)} cannot show whether {precision} keeps what "
                f"the outputs vary by: give {4 * limits.FEWEST_IMAGES} or more with --calibration, or "
                "with --eval where that is given"
            )
        elif spread.error is not None and spread.error > limits.DOUBTFUL:
            told.append(
                f"{prefix}{precision} has an error of {spread.error:.2f} of what the outputs vary by; measure the "
                "accuracy" + (" with --eval" if spread.kind == "classification" else "")
            )
        if spread.quiet:
            told.append(
                f"{prefix}in {precision} output {', '.join(map(str, spread.quiet))} is nearly constant; beside the "
                "others it varies little in {one.who} too"
            )
    return told


def check_half(before: Parity, after: Parity) -> None:
    """Let a graph with 16-bit types pass only if it is as good as the one that it was made from.

    Raises:
        Refused: its agreement with PyTorch is `limits.HALF_MAX_LOSS` lower.
    """
    if not after.agreement >= before.agreement - limits.HALF_MAX_LOSS:
        raise Refused(
            f"16-bit types moved the outputs too far: {after.agreement_name} {after.agreement:.2%}, from "
            f"{before.agreement:.2%}, on {after.samples} images; nothing was published. Leave out --fp16 or --bf16"
        )


def check_engine(graph: Parity, engine: Parity) -> None:
    """Let a TensorRT engine pass only if it is as good as the graph that it was built from.

    Raises:
        Refused: its agreement with PyTorch is `limits.HALF_MAX_LOSS` lower, or its outputs no longer say what the
            graph's do.
    """
    reason = int8_reason(engine)
    apart = bool(reason) and not int8_reason(graph)
    if apart or not engine.agreement >= graph.agreement - limits.HALF_MAX_LOSS:
        cosine = f" ({reason})" if reason else ""
        raise Refused(
            f"the TensorRT engine is not the graph that it was built from: {engine.agreement_name} "
            f"{engine.agreement:.2%}{cosine}, from {graph.agreement:.2%}, on {engine.samples} images; nothing was "
            f"published. Compare them tensor by tensor, or use --format onnx"
        )
