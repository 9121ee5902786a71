"""From a PyTorch module to the graph that is published: ONNX, INT8 and what makes it better, 16-bit types."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from exporter import divergence, verify
from exporter.calibrate import calibrate
from exporter.errors import Refused
from exporter.onnx_from_torch import onnx_from_torch
from exporter.parity import Comparison, Parity
from exporter.quantize import quantize
from exporter.recipe import Fp8, Int8
from exporter.runtime import Array
from exporter.tensorrt_reading import as_tensorrt_reads
from exporter.workbench import Workbench

DIVERGENCE_PLOT = "divergence.png"
_CALIBRATION_BATCH = 8
# Images on which every tensor is compared.
_DIVERGENCE_IMAGES = 4


@dataclass
class Lowered:
    """A graph on its way, and what was found out about it.

    Attributes:
        graph: what is published in the end.
        exact: the float32 graph that it was made from.
        compared: the graph with the model that was named.
        to_compressed: with the module after its steps, where there were any.
        stages: how close each form of it is.
        done: for each step what it was and did.
        calibration: method, tensors by method, images; None where nothing was quantized.
        divergence: the error of each tensor; None where the graph is the float32 one.
        plots: file name -> what draws it.
    """

    graph: onnx.ModelProto
    exact: onnx.ModelProto
    compared: Comparison
    to_compressed: Parity | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    divergence: dict[str, Any] | None = None
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)


def lower(bench: Workbench, module: Any, reference: verify.Reference | None) -> Lowered:
    """Make the graph, check each form of it, and do the steps of the graph.

    Args:
        bench: the export.
        module: what to export: the named one, or what its steps left.
        reference: the outputs of `module` on the images that check, where it is not the named one; the gates compare
            with these.

    Raises:
        Refused: a form of the graph is too far from the module.
        BadInput: the module cannot be exported.
    """
    config, exported = bench.task.config, {}

    def keep_first(name: str, graph: onnx.ModelProto) -> None:
        exported.setdefault(name, graph.SerializeToString())

    with bench.task.progress.step("export to ONNX"):
        graph = onnx_from_torch(
            module,
            bench.task.arch.preprocess,
            task=bench.task.arch.task,
            uint8_input=config.input == "uint8",
            opset=config.opset,
            on_pass=keep_first,
        )
    raw = bench.compare(bench.session(next(iter(exported.values())))).parity
    exported.clear()
    lowered = Lowered(graph, graph, bench.compare(bench.session(graph.SerializeToString())))
    lowered.stages = [_stage("onnx", raw, None), _stage("fp32", lowered.compared.parity, graph)]
    verify.check_fp32(_gate(bench, lowered, reference))
    if isinstance(config.quantization, Int8):
        _quantize(bench, lowered, config.quantization, reference)
    return lowered


def _gate(bench: Workbench, lowered: Lowered, reference: verify.Reference | None) -> Parity:
    """What the gates look at: the parity to the module that was exported."""
    if reference is None:
        return lowered.compared.parity
    session = bench.session(lowered.graph.SerializeToString())
    lowered.to_compressed = bench.compare(session, reference).parity
    return lowered.to_compressed


def _quantize(bench: Workbench, lowered: Lowered, step: Int8 | Fp8, reference: verify.Reference | None) -> None:
    task, pictures = bench.task, bench.pictures
    ranges = calibrate(lowered.exact, _batches(bench), step.method)
    with task.progress.step("quantize"):
        lowered.graph = quantize(lowered.exact, ranges, task.config.target)
    lowered.calibration = {
        "method": step.method,
        "tensors": dict(Counter(span.method for span in ranges.values())),
        "samples": len(pictures.calibration),
        "source": pictures.calibration_source,
    }
    lowered.compared = bench.compare(bench.session(lowered.graph.SerializeToString()))
    lowered.stages.append(_stage(step.kind, lowered.compared.parity, lowered.graph))
    _find_divergence(bench, lowered)
    parity = _gate(bench, lowered, reference)
    try:
        verify.check_int8(parity)
    except Refused as refused:
        raise Refused(f"{refused}{_where(lowered)}") from refused
    if task.config.target == "gpu":
        read = bench.compare(bench.session(as_tensorrt_reads(lowered.graph).SerializeToString())).parity
        lowered.stages.append(_stage("as TensorRT reads it", read, None))
    if parity.min_cosine is not None and parity.min_cosine < verify.INT8_DOUBTFUL_COSINE:
        task.caveats.append(
            f"{step.kind.upper()} moves the logits far (smallest cosine {parity.min_cosine:.3f}); measure the accuracy"
            + (" with --eval" if task.arch.task == "classification" else "")
        )
    lowered.done.append(_described(step, task.config.target))


def _described(step: Int8 | Fp8, target: str) -> dict[str, Any]:
    activations = "uint8, asymmetric" if target == "cpu" else "int8, symmetric"
    described = {"target": target, "weights": "int8, one scale per output channel", "activations": activations}
    return step.to_dict() | described


def _batches(bench: Workbench) -> Iterator[Array]:
    """The calibration images as the graph takes them."""
    images = bench.pictures.calibration
    starts = range(0, len(images), _CALIBRATION_BATCH)
    for at in bench.task.progress.track(starts, "calibrate", len(starts)):
        yield _inputs(bench, images[at : at + _CALIBRATION_BATCH])


def _inputs(bench: Workbench, images: Array) -> Array:
    pixels = bench.task.config.input == "uint8"
    return images if pixels else bench.task.arch.preprocess.normalize(images)


def _find_divergence(bench: Workbench, lowered: Lowered) -> None:
    """Compare every tensor with the float32 graph's."""
    inputs = _inputs(bench, bench.pictures.check[:_DIVERGENCE_IMAGES])
    with bench.task.progress.step("compare every tensor"):
        errors = divergence.divergence(lowered.exact, lowered.graph, inputs)
    first = divergence.first_apart(errors)
    lowered.divergence = {
        "images": len(inputs),
        "threshold_db": divergence.THRESHOLD_DB,
        "first": asdict(first) if first else None,
        "tensors": [asdict(error) for error in errors],
    }
    if errors:
        lowered.plots[DIVERGENCE_PLOT] = partial(divergence.plot, errors)


def _where(lowered: Lowered) -> str:
    """Where the graphs part, for the line that refuses."""
    first = lowered.divergence["first"] if lowered.divergence else None
    if first is None:
        return ""
    return f"; the first tensor that diverges is {first['tensor']} ({first['operator']}, {first['sqnr_db']:.0f} dB)"


def _stage(name: str, parity: Parity, graph: onnx.ModelProto | None) -> dict[str, Any]:
    size = None if graph is None else graph.ByteSize()
    return {"stage": name, "bytes": size, "parity": asdict(parity)}
