"""From a PyTorch module to the graph that is published: ONNX, INT8 and what makes it better, 16-bit types."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from convoynet.exporter.archs.onnx_network import OnnxNetwork, float_outputs
from convoynet.exporter.compression.history import History
from convoynet.exporter.compression.history import plot as plot_history
from convoynet.exporter.compression.train import Settings
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import accuracy, divergence, verify
from convoynet.exporter.evidence.engines import Engine, passing
from convoynet.exporter.evidence.parity import Comparison, Parity
from convoynet.exporter.evidence.precision_shares import precision_shares
from convoynet.exporter.graph.onnx_clean import OnPass
from convoynet.exporter.graph.onnx_from_given import onnx_from_given
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_read import reading
from convoynet.exporter.graph.onnx_to_torch import TorchGraph
from convoynet.exporter.pipeline.exact_gate import ExactGate, steady
from convoynet.exporter.pipeline.module_steps import (
    DEVICE,
    Compressed,
    calibration_as_training,
    checkpoint,
    training_images,
)
from convoynet.exporter.pipeline.serving import engines_of, judge
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.equalize import chains
from convoynet.exporter.quantization.float16 import float32_nodes, to_bf16, to_fp16
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.mixed_precision import Budget, Build, Mix, Score, search
from convoynet.exporter.quantization.qat import Calibrated, fine_tune
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.refine import EQUALIZATION, Refined, refine
from convoynet.exporter.quantization.sensitivity import plot as plot_sensitivity
from convoynet.exporter.quantization.sensitivity import sensitivity
from convoynet.exporter.quantization.tensorrt_reading import as_tensorrt_reads
from convoynet.exporter.recipe import Bf16, Fp8, Fp16, Int8, Step
from convoynet.exporter.running.runtime import Array

DIVERGENCE_PLOT, SENSITIVITY_PLOT, QAT_PLOT = "divergence.png", "sensitivity.png", "qat.png"
_CALIBRATION_BATCH = 8
# Images on which every tensor is compared.
_DIVERGENCE_IMAGES = 4
# Labelled images that a search for a mix needs at least, and looks at at most for each trial.
_FEWEST_TO_SEARCH, _MOST_TO_SEARCH = 50, 1000


@dataclass
class Lowered:
    """A graph on its way, and what was found out about it.

    Attributes:
        graph: what is published in the end.
        exact: the float32 graph that it was made from.
        engines: those that a server may take, and what the graph is in each.
        stages: how close each form of it is.
        done: for each step what it was and did.
        calibration: method, tensors by method, images; None where nothing was quantized.
        divergence: the error of each tensor; None where the graph is the float32 one.
        rescaled: tensors that equalization gave other channels' sizes, so that they cannot be compared.
        sensitivity: what quantizing each layer alone costs; None where nothing asked for it.
        plots: file name -> what draws it.
        arithmetic: multiply-adds by precision, and what is in another than was asked for; None where that is not known.
    """

    graph: onnx.ModelProto
    exact: onnx.ModelProto
    engines: list[Engine]
    stages: list[dict[str, Any]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    divergence: dict[str, Any] | None = None
    rescaled: frozenset[str] = frozenset()
    sensitivity: list[dict[str, Any]] | None = None
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    arithmetic: dict[str, Any] | None = None

    @property
    def served(self) -> Engine:
        """The engine that a server takes first: its figures are the report's."""
        return passing(self.engines)[0]

    @property
    def compared(self) -> Comparison:
        """The graph with the model that was named, in that engine."""
        assert self.served.compared is not None
        return self.served.compared


def lower(bench: Workbench, compressed: Compressed, reference: verify.Reference | None) -> Lowered:
    """Make the graph, check each form of it, and do the steps of the graph.

    Args:
        bench: the export.
        compressed: has the module to export: the named one, or what its steps left.
        reference: the outputs of that module on the images that check, where it is not the named one; the gates
            compare with these.

    Raises:
        Refused: a form of the graph is too far from the module.
        BadInput: the module cannot be exported.
    """
    config = bench.task.config
    exported: list[bytes] = []

    def keep_first(name: str, graph: onnx.ModelProto) -> None:
        if not exported:
            exported.append(graph.SerializeToString())

    with bench.task.progress.step("export to ONNX"), steady(bench):
        graph = graph_of(bench, compressed.module, keep_first)
    raw = bench.compare(bench.session(exported.pop())).parity
    lowered = Lowered(graph, graph, engines_of(bench), stages=[_stage("onnx", raw, None)])
    gate = ExactGate(bench, compressed.module, reference or bench.reference)
    exact = config.given == "fp32"
    with steady(bench):
        try:
            _judge(bench, lowered, config.given, gate if exact else _quantized_gate, reference)
        except Refused as refused:
            raise (Refused(f"{gate.reason}; nothing was published") if gate.reason else refused) from refused
    bench.task.caveats.extend(gate.caveats)
    ranges: dict[str, Range] = {}
    if config.quantization is not None:
        ranges = _quantize(bench, lowered, config.quantization)
        _check_quantized(bench, lowered, config.quantization.kind, reference)
    else:
        bench.task.caveats.extend(verify.constants(lowered.served.gated, "the graph"))
    if config.half is not None:
        _halve(bench, lowered, config.half, ranges, reference)
    _count_arithmetic(bench, lowered)
    return lowered


def graph_of(bench: Workbench, module: nn.Module, on_pass: OnPass | None = None) -> onnx.ModelProto:
    """The float graph of a module, or of the ONNX file that stands in its place."""
    config, arch = bench.task.config, bench.task.arch
    pixels, opset = config.input == "uint8", config.onnx_opset
    if isinstance(module, OnnxNetwork):
        with reading(str(module.given.path), module.given.model):
            return onnx_from_given(
                module.given,
                float_outputs(module),
                arch.preprocess,
                uint8_input=pixels,
                opset=opset,
                task=arch.task,
                on_pass=on_pass,
            )
    return onnx_from_torch(
        module,
        arch.preprocess,
        task=arch.task,
        others=arch.outputs,
        uint8_input=pixels,
        opset=opset,
        on_pass=on_pass,
    )


def _quantized_gate(engine: Engine) -> None:
    verify.check_int8(engine.gated)


def _count_arithmetic(bench: Workbench, lowered: Lowered) -> None:
    """See what of the graph is in the precision that was asked for."""
    config = bench.task.config
    asked = config.quantization or config.half
    shares = precision_shares(lowered.graph, asked.kind) if asked is not None else None
    if asked is not None and shares is not None:
        lowered.arithmetic = shares.to_json(asked.kind)
        if warning := shares.warning(asked.kind):
            bench.task.caveats.append(warning)


def _judge(
    bench: Workbench,
    lowered: Lowered,
    stage: str,
    check: Callable[[Engine], None],
    reference: verify.Reference | None,
) -> None:
    """Let every engine through the gate by itself, and note the stage."""
    speaker = judge(bench, lowered.engines, stage, lowered.graph, check, reference)
    lowered.stages.append(_stage(stage, speaker.parities[stage], lowered.graph))


def _quantize(bench: Workbench, lowered: Lowered, step: Int8 | Fp8) -> dict[str, Range]:
    """Make the quantized graph; returns the ranges of its activations."""
    task, pictures = bench.task, bench.pictures
    ranges = calibrate(lowered.exact, _batches(bench), step.method)
    done = _described(step, task.config.target)
    lowered.calibration = {
        "method": step.method,
        "tensors": dict(Counter(span.method for span in ranges.values())),
        "samples": len(pictures.calibration),
        "source": pictures.calibration_source,
    }
    refined = Refined(lowered.exact, ranges, [])
    if isinstance(step, Int8):
        refined = _improve(bench, lowered, step, ranges, done)
    ranges = refined.ranges

    def build(keep_float: Collection[str] = ()) -> onnx.ModelProto:
        return quantize(refined.float_biases(keep_float), ranges, task.config.target, keep_float, step.kind)

    with task.progress.step("quantize"):
        lowered.graph = build()
    if task.config.max_drop is not None:
        mix = _mix(bench, lowered, build, ranges, step.kind)
        if mix is not None:
            lowered.graph = build(mix.keep_float)
            done["mix"] = mix.to_json()
    lowered.done.append(done)
    return ranges


def _improve(bench: Workbench, lowered: Lowered, step: Int8, ranges: dict[str, Range], done: dict[str, Any]) -> Refined:
    """Change the numbers of the float graph so that less is lost when they are rounded."""
    task = bench.task
    refined = Refined(lowered.exact, ranges, [])
    if step.refines or step.correct_means:
        images = inputs_of(bench, bench.pictures.calibration)
        refined = refine(lowered.exact, ranges, images, step, task.config.target, task.progress)
        done["biases"] = refined.means
        kept = [entry for entry in refined.log if entry["kept"]]
        done["refinements"] = {"tried": len(refined.log), "kept": len(kept), "why_not": refined.reason}
        done["refined_layers"] = refined.log
        names = {entry["layer"] for entry in kept if entry["technique"] == EQUALIZATION}
        equalized = [chain for chain in chains(lowered.exact) if " - ".join(chain.layers) in names]
        lowered.rescaled = frozenset(name for chain in equalized for name in chain.between)
    if step.qat_epochs:
        data = training_images(task, bench.pictures)
        settings = Settings(
            seed=task.config.seed,
            device=DEVICE,
            checkpoint=checkpoint(bench, _up_to(task.config.steps, step)),
            held_out=calibration_as_training(task, bench.pictures) if task.config.finetune is not None else None,
        )
        calibrated = Calibrated(refined.model, refined.ranges, task.config.target)
        model, ranges, told = fine_tune(calibrated, data, step, TorchGraph(lowered.exact), settings, task.progress)
        past = History.from_dict(told.pop("history"))
        lowered.plots[QAT_PLOT] = partial(plot_history, past)
        done["qat"] = told
        # Training has moved the biases on, for whatever they then stood for.
        refined = Refined(model, ranges, refined.log)
    return refined


def _up_to(steps: Sequence[Step], last: Step) -> Sequence[Step]:
    return steps[: steps.index(last) + 1]


def _mix(bench: Workbench, lowered: Lowered, build: Build, ranges: Mapping[str, Range], kind: str) -> Mix | None:
    """The layers that have to stay in higher precision for --max-drop; None where none has to."""
    task = bench.task
    max_drop, labelled = task.config.max_drop, task.labelled
    assert max_drop is not None
    named, exact, quantized = (
        100 * top1
        for top1, _ in accuracy.hit_rates(
            [bench.eager, *(bench.session(graph.SerializeToString()) for graph in (lowered.exact, lowered.graph))],
            labelled,
            task.arch.preprocess,
            task.progress,
        )
    )
    if named - quantized <= max_drop or len(labelled) < _FEWEST_TO_SEARCH:
        return None
    left = max_drop - (named - exact)
    if left < 0:
        raise Refused(
            f"top-1 is {exact:.2f} % on {len(labelled)} images before anything is quantized, from {named:.2f} %, and "
            f"--max-drop allows {max_drop:g} points; nothing was published. Train longer, compress less, or allow more"
        )
    inputs = inputs_of(bench, bench.pictures.calibration)
    costs = sensitivity(lowered.exact, ranges, inputs, task.config.target, task.progress, kind)
    lowered.sensitivity = [cost.to_json() for cost in costs]
    lowered.plots[SENSITIVITY_PLOT] = partial(plot_sensitivity, costs)
    # Neighbours in a sorted folder are of one class: each half gets as much of every class.
    budget = Budget(left, *(_score(bench, _evenly(labelled[start::2])) for start in (0, 1)))
    try:
        return search(lowered.exact, build, costs, budget, task.progress)
    except Refused as refused:
        raise Refused(f"{refused}; nothing was published") from refused


def _evenly(labelled: Sequence[tuple[Path, int]]) -> Sequence[tuple[Path, int]]:
    """Some of the images, of every class as much."""
    return labelled[:: -(-len(labelled) // _MOST_TO_SEARCH)]


def _score(bench: Workbench, labelled: Sequence[tuple[Path, int]]) -> Score:
    """The share of some images that a graph gets right."""

    def score(graph: onnx.ModelProto) -> float:
        session = bench.session(graph.SerializeToString())
        return accuracy.hit_rates([session], labelled, bench.task.arch.preprocess, Quiet())[0][0]

    return score


def _check_quantized(bench: Workbench, lowered: Lowered, kind: str, reference: verify.Reference | None) -> None:
    """Look at the quantized graph from all sides, and let it pass or not."""
    task = bench.task
    _find_divergence(bench, lowered)
    try:
        _judge(bench, lowered, kind, _quantized_gate, reference)
    except Refused as refused:
        raise Refused(f"{refused}{_where(lowered)}") from refused
    parity = lowered.served.gated
    # What becomes an engine is run so anyway.
    if task.config.target == "gpu" and task.config.format == "onnx" and kind == "int8":
        read = bench.compare(bench.session(as_tensorrt_reads(lowered.graph).SerializeToString())).parity
        lowered.stages.append(_stage("as TensorRT reads it", read, None))
    task.caveats.extend(verify.int8_caveats(parity, kind.upper()))


def _halve(
    bench: Workbench,
    lowered: Lowered,
    step: Fp16 | Bf16,
    ranges: Mapping[str, Range],
    reference: verify.Reference | None,
) -> None:
    """Give what is not quantized a 16-bit type."""
    before = {engine.name: engine.last for engine in lowered.engines}
    with bench.task.progress.step(f"convert to {step.kind}"):
        lowered.graph = to_fp16(lowered.graph, ranges) if isinstance(step, Fp16) else to_bf16(lowered.graph)

    def check(engine: Engine) -> None:
        earlier, now = before[engine.name], engine.last
        assert earlier is not None
        assert now is not None
        verify.check_half(earlier, now)

    _judge(bench, lowered, bench.task.config.precision, check, reference)
    lowered.done.append(step.to_dict() | {"float32_nodes": float32_nodes(lowered.graph)})


def _described(step: Int8 | Fp8, target: str) -> dict[str, Any]:
    activations = "uint8, asymmetric" if target == "cpu" else f"{step.kind}, symmetric"
    described = {"target": target, "weights": f"{step.kind}, one scale per output channel", "activations": activations}
    return step.to_dict() | described


def _batches(bench: Workbench) -> Iterator[Array]:
    """The calibration images as the graph takes them."""
    images = bench.pictures.calibration
    starts = range(0, len(images), _CALIBRATION_BATCH)
    for at in bench.task.progress.track(starts, "calibrate", len(starts)):
        yield inputs_of(bench, images[at : at + _CALIBRATION_BATCH])


def inputs_of(bench: Workbench, images: Array) -> Array:
    """Pixels as the graph takes them."""
    pixels = bench.task.config.input == "uint8"
    return images if pixels else bench.task.arch.preprocess.normalize(images)


def _find_divergence(bench: Workbench, lowered: Lowered) -> None:
    """Compare every tensor with the float32 graph's."""
    inputs = inputs_of(bench, bench.pictures.check[:_DIVERGENCE_IMAGES])
    with bench.task.progress.step("compare every tensor"):
        errors = divergence.divergence(lowered.exact, lowered.graph, inputs)
    errors = [error for error in errors if error.tensor not in lowered.rescaled]
    lowered.divergence = divergence.to_json(errors, len(inputs))
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
