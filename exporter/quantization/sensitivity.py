"""Which layer costs how much when it is quantized: one at a time, the others in float.

The graph that is measured for a layer is the very one that `quantize` makes with all other layers in `keep_float`. A
session for each takes less time than one that can switch every layer: a switch keeps ONNX Runtime from fusing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx
from convoynet.exporter.progress import Progress
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import layers, quantize
from convoynet.exporter.running.runtime import inner_session

# The network runs on about so many images in all, the same few for every layer ...
RUNS = 2048
# ... of which there are no fewer, however many layers there are, and no more.
FEWEST_IMAGES, MOST_IMAGES = 4, 32
# Nothing above this can be told from float32's own rounding; equal outputs have it too.
MOST_DB = 140.0

_LOGITS = "logits"
_CHUNK = 8


@dataclass(frozen=True)
class LayerCost:
    """What quantizing one layer does, and what it saves.

    Attributes:
        layer: first output of its node, as `quantize` takes it for `keep_float`.
        name: for people: that of its weights, without ".weight".
        operator: Conv, Gemm or MatMul.
        sqnr_db: signal-to-noise ratio of the measured output in decibels, when this layer alone is quantized.
        measured_at: the output that was measured: "logits", or where the network has none the layer's own.
        macs: multiply-adds for one image.
        parameters: of its weights and bias.
    """

    layer: str
    name: str
    operator: str
    sqnr_db: float
    measured_at: str
    macs: int
    parameters: int

    @property
    def noise(self) -> float:
        """The power of the noise as a share of the signal's: what the layers add up to, roughly."""
        return float(10 ** (-self.sqnr_db / 10))

    def to_json(self) -> dict[str, Any]:
        """The fields as report.json has them."""
        return asdict(self) | {"sqnr_db": round(self.sqnr_db, 2)}


def sensitivity(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    images: np.ndarray,
    target: str,
    progress: Progress,
    number_format: str = "int8",
) -> list[LayerCost]:
    """Measure every layer that `quantize` would quantize: its weights, and the activations that come with it.

    A detector's outputs are lists, whose rows move and cannot be subtracted. There each layer is measured at its own
    output: that shows which layers round coarsely, not what becomes of it in the detections.

    Args:
        model: a float graph with one input.
        ranges: from `calibrate`.
        images: what the graph's input takes, [n, ...]; an evenly spread part of them is used, see RUNS.
        target: "cpu" or "gpu".
        progress: shows the layers.
        number_format: "int8" or "fp8".

    Returns:
        One cost for each layer, in the order of the graph; none for a network without such layers.

    Raises:
        BadInput: no images, or as `quantize`.
    """
    names = layers(model, target, number_format)
    if not len(images):
        raise BadInput("sensitivity needs images, and there are none: give at least one")
    if not names:
        return []
    chosen = _spread(images, max(FEWEST_IMAGES, min(MOST_IMAGES, RUNS // len(names))))
    graph = Graph(model)
    whole = _LOGITS in graph.outputs
    outputs = [_LOGITS] if whole else list(names)
    probed = _probed(model, outputs)
    exact = _run(probed, outputs, chosen)
    operations = {operation.writes[0]: operation for operation in trace_from_onnx("the network", model).operations}
    costs = []
    for name in progress.track(names, f"sensitivity of {len(names)} layers", len(names)):
        measured = _LOGITS if whole else name
        others = [other for other in names if other != name]
        alone = quantize(_probed(model, [measured]), ranges, target, others, number_format)
        found = _run(alone, [measured], chosen)[measured]
        cost, operation = _sqnr_db(exact[measured], found), operations[name]
        node = graph.producers[name]
        costs.append(
            LayerCost(
                layer=name,
                name=node.input[1].removesuffix(".weight"),
                operator=node.op_type,
                sqnr_db=cost,
                measured_at=measured,
                macs=operation.macs,
                parameters=operation.parameters,
            )
        )
    return costs


def plot(costs: Sequence[LayerCost], path: Path, title: str = "sensitivity") -> None:
    """Write a bar for each layer, the worst first, as a PNG.

    Args:
        costs: from `sensitivity`, at least one.
        path: the file to write.
        title: above the plot.
    """
    from matplotlib.figure import Figure

    ordered = sorted(costs, key=lambda cost: cost.sqnr_db)
    figure = Figure(figsize=(7, 1.1 + 0.17 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ordered))
    bars = axes.barh(places, [cost.sqnr_db for cost in ordered], 0.8, color="#2a6fbb")
    axes.bar_label(bars, [f"{cost.sqnr_db:.1f}" for cost in ordered], fontsize=6, padding=2)
    labels = [f"{cost.name} ({cost.operator}, {cost.macs / 1e6:.3g} M)" for cost in ordered]
    axes.set_yticks(places, labels, fontsize=6)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.margins(x=0.08)
    where = _LOGITS if ordered[0].measured_at == _LOGITS else "the layer's own output"
    axes.set_xlabel(f"signal-to-noise ratio of {where} in dB, this layer alone quantized")
    axes.set_title(f"{title}: layer (operator, multiply-adds), worst first", fontsize=9)
    # Without the library's stamp equal figures are equal files.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _spread(images: np.ndarray, count: int) -> np.ndarray:
    if len(images) <= count:
        return images
    chosen: np.ndarray = images[np.linspace(0, len(images) - 1, count).astype(int)]
    return chosen


def _probed(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """The graph with `outputs` beside its own: taking outputs away could let other layers be quantized."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    present = {value.name for value in probed.graph.output}
    added = [name for name in outputs if name not in present]
    known = shapes(model) if added else {}
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, known[name]) for name in added)
    return probed


def _run(model: onnx.ModelProto, outputs: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    # Beyond its basic optimisations ONNX Runtime 1.31 drops a ReLU before a QuantizeLinear to FP8.
    fp8 = any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)
    session = inner_session(model, outputs, optimized=not fp8)
    name = session.get_inputs()[0].name
    parts = [
        session.run(list(outputs), {name: images[start : start + _CHUNK]}) for start in range(0, len(images), _CHUNK)
    ]
    return {output: np.concatenate(rows) for output, rows in zip(outputs, zip(*parts, strict=True), strict=True)}


def _sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    signal = exact.astype(np.float64)
    noise = float(np.square(signal - found).sum())
    power = float(np.square(signal).sum())
    if noise <= power * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return float(10 * np.log10(power / noise)) if power else -MOST_DB
