"""Explicit INT8 and FP8 quantization of an ONNX graph: one calibration, a graph for each runtime.

`qdq_cpu` and `qdq_gpu` say where Q/DQ pairs go and why; here are the numbers, and the surgery. The scheme is that of
B. Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 2.1 (real = scale * (integer - zero point)), with one scale per output channel for the weights as in
R. Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2. FP8 is E4M3 of
P. Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3, with the same scales: an integer's place is
taken by a number of 4 exponent and 3 mantissa bits.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import CUTS_ABOVE, CUTS_BELOW, Edge, Graph, replace
from convoynet.exporter.quantization import qdq_cpu, qdq_gpu
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.qdq_placement import WEIGHTED, Placement, output_axis

_MIN_OPSET = 19
_WEIGHT_LIMIT = 127
# The largest number of E4M3 in the variant without infinities, which ONNX and TensorRT use.
_FP8_LIMIT = 448
_FP8: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
# The INT32 bias is added to the INT32 sum of products: half of the range is for each.
_BIAS_LIMIT = 2**30
# No scale, and no product of two scales, may get near the smallest normal float32 (1.2e-38).
_MIN_SCALE = 1e-15


@dataclass(frozen=True)
class Scale:
    """How one activation is quantized: real = scale * (quantized - zero_point), of the zero point's type."""

    scale: np.float32
    zero_point: np.generic

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest real value that an integer stands for; beyond them it saturates."""
        limits = np.iinfo(self.zero_point.dtype.name)
        low, high = (float(self.scale) * (limit - int(self.zero_point)) for limit in (limits.min, limits.max))
        return low, high


def quantize(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    target: str,
    keep_float: Collection[str] = (),
    number_format: str = "int8",
) -> onnx.ModelProto:
    """Insert QuantizeLinear/DequantizeLinear pairs for the runtime of one target.

    The same model and ranges give the same bytes.

    Args:
        model: a float graph of opset 19 or later; it is not changed.
        ranges: from `calibrate`, which covers both targets.
        target: "cpu" (UINT8 activations with a zero point, INT32 biases; ONNX Runtime on x86 and OpenVINO) or "gpu"
            (INT8 activations, zero point 0, float biases; TensorRT). Neither runtime is fast with the other's graph,
            and TensorRT misreads UINT8.
        keep_float: first outputs of layers with weights that are not to be quantized, such as `layers` lists.
            For "gpu" they read float; for "cpu" they do, unless an integer kernel makes what they read.
        number_format: "int8", or "fp8" (E4M3 with zero point 0) for the target "gpu".

    Returns:
        A checked graph with float inputs and outputs of the same names, and INT8 or FP8 weights.

    Raises:
        BadInput: unknown target or number format, an opset without the needed operators, a name in `keep_float` that
            no such node has, or a tensor that was not calibrated.
    """
    opset = next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 0)
    if opset < _MIN_OPSET:
        raise BadInput(
            f"opset {opset} has no quantization that both runtimes read: export with --opset {_MIN_OPSET} or later"
        )
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = Graph(quantized)
    placement = place(graph, target, keep_float, number_format)
    how = fp8_scale if number_format == "fp8" else partial(activation_scale, target=target)
    scales = {name: how(span) for name, span in _shared_ranges(placement, ranges).items()}
    _quantize_weights(graph, placement, scales, target)
    _insert_pairs(graph, placement, scales)
    if target == "cpu":
        _shield(graph, keep_float)  # before a layer's first output may change its name
        _absorb_activations(graph, scales)
    graph.drop_unused_constants()
    made = {name for node in graph for name in node.output}
    replace(quantized.graph.value_info, [value for value in quantized.graph.value_info if value.name in made])
    onnx.checker.check_model(quantized)
    return quantized


def layers(model: onnx.ModelProto, target: str, number_format: str = "int8") -> tuple[str, ...]:
    """The first outputs of the nodes whose weights `quantize` quantizes, in the order of the graph.

    Raises:
        BadInput: unknown target or number format.
    """
    return place(Graph(model), target, (), number_format).weighted


_PLACES: dict[tuple[str, str], Callable[[Graph, Collection[str]], Placement]] = {
    ("cpu", "int8"): qdq_cpu.place,
    ("gpu", "int8"): qdq_gpu.place,
    ("gpu", "fp8"): qdq_gpu.place_fp8,
}


def place(graph: Graph, target: str, keep_float: Collection[str] = (), number_format: str = "int8") -> Placement:
    """Where `quantize` puts pairs; arguments and errors are its own."""
    targets = sorted({target for target, _ in _PLACES})
    if target not in targets:
        raise BadInput(f"target {target!r}: use {' or '.join(targets)}")
    if (target, number_format) not in _PLACES:
        known = [name for place, name in _PLACES if place == target]
        raise BadInput(f"number format {number_format!r} for target {target}: use {' or '.join(known)}")
    made = {node.output[0] for node in graph if node.op_type in WEIGHTED}
    unknown = [name for name in keep_float if name not in made]
    if unknown:
        raise BadInput(f"keep_float {unknown[0]!r}: no Conv, ConvTranspose, Gemm or MatMul has such a first output")
    return _PLACES[target, number_format](graph, keep_float)


def activation_scale(span: Range, target: str) -> Scale:
    """The scale that covers a range, and exactly represents 0: padding and ReLU depend on it."""
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    if target == "gpu":
        largest = max(-low, high)
        return Scale(np.float32(max(largest / _WEIGHT_LIMIT, _MIN_SCALE) if largest else 1.0), np.int8(0))
    width = high - low
    scale = np.float32(max(width / 255, _MIN_SCALE) if width else 1.0)
    return Scale(scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255)))


def fp8_scale(span: Range) -> Scale:
    """The scale at which the largest magnitude of a range is the largest of FP8."""
    largest = max(abs(span.low), abs(span.high))
    return Scale(np.float32(max(largest / _FP8_LIMIT, _MIN_SCALE) if largest else 1.0), _FP8.type(0))


def weight_scales(weights: np.ndarray, bias: np.ndarray | None = None, input_scale: float | None = None) -> np.ndarray:
    """One scale per output channel, symmetric: float32 [channels], all above zero.

    Args:
        weights: float32 [channels, ...].
        bias: [channels], where it becomes an INT32 of scale `input_scale * weight scale`: a channel whose weights are
            too small for its bias gets a larger scale, so that the bias fits.
        input_scale: the scale of the activation that meets the weights.
    """
    rows = weights.reshape(len(weights), -1)
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64) / _WEIGHT_LIMIT
    if bias is not None and input_scale is not None:
        scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (input_scale * _BIAS_LIMIT))
    scales[scales == 0] = scales.max() or 1.0
    result: np.ndarray = np.maximum(scales, _MIN_SCALE).astype(np.float32)
    return result


def quantize_weights(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round float32 [channels, ...] to INT8 -127..127; -128 is left out, since the range is symmetric."""
    integers = np.empty(weights.shape, np.int8)
    # A channel at a time stays in the cache: VGG's first fully connected layer would take 2 GB in float64.
    for target, channel, scale in zip(integers, weights, scales.astype(np.float64), strict=True):
        target[...] = np.clip(np.rint(channel.astype(np.float64) / scale), -_WEIGHT_LIMIT, _WEIGHT_LIMIT)
    return integers


def fp8_weights(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round float32 [channels, ...] to E4M3, to the nearest and ties to even."""
    rows = scales.reshape(-1, *(1,) * (weights.ndim - 1))
    result: np.ndarray = np.clip(weights / rows, -_FP8_LIMIT, _FP8_LIMIT).astype(_FP8)
    return result


def _shared_ranges(placement: Placement, ranges: Mapping[str, Range]) -> dict[str, Range]:
    tensors = placement.tensors
    missing = [name for name in tensors if name not in ranges]
    if missing:
        raise BadInput(
            f"tensor {missing[0]!r} was not calibrated: give the ranges that calibrate() made for this graph"
        )
    shared = {name: ranges[name] for name in tensors}
    for group in placement.groups:
        members = [shared[name] for name in tensors if name in group]
        union = Range(min(span.low for span in members), max(span.high for span in members))
        shared.update({name: union for name in tensors if name in group})
    return shared


def _quantize_weights(graph: Graph, placement: Placement, scales: Mapping[str, Scale], target: str) -> None:
    """Store the weights of the chosen nodes as INT8 with a DequantizeLinear, and for a CPU the biases as INT32."""
    nodes = []
    for node in graph:
        if node.output[0] in placement.weighted:
            nodes += _weight_nodes(graph, node, scales[node.input[0]], target)
        nodes.append(node)
    replace(graph.model.graph.node, nodes)
    graph.refresh()


def _weight_nodes(graph: Graph, node: onnx.NodeProto, met: Scale, target: str) -> list[onnx.NodeProto]:
    """The DequantizeLinear nodes of a layer's weights and bias, which meet an activation of the scale `met`."""
    input_scale = float(met.scale)
    axis = output_axis(node, graph.initializers[node.input[1]].dims)
    weights = np.moveaxis(graph.constant(node.input[1]), axis, 0)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    bias = graph.constant(node.input[2]) if has_bias else None
    if bias is None or target == "gpu" or bias.shape != weights.shape[:1]:
        scales = weight_scales(weights)
    else:
        scales = weight_scales(weights, bias, input_scale)
    # The node's own name in each constant's: two nodes may share weights and not their scales.
    name = f"{node.output[0]}.weight"
    if met.zero_point.dtype == _FP8:
        scales *= np.float32(_WEIGHT_LIMIT / _FP8_LIMIT)
        numbers = fp8_weights(weights, scales)
    else:
        numbers = quantize_weights(weights, scales)
    nodes = [_dequantize(graph, name, np.ascontiguousarray(np.moveaxis(numbers, 0, axis)), scales, axis)]
    node.input[1] = nodes[0].output[0]
    if bias is not None and target == "cpu" and bias.shape == scales.shape:
        bias_scales = (scales.astype(np.float64) * input_scale).astype(np.float32)
        rounded = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64)).astype(np.int32)
        nodes.append(_dequantize(graph, f"{node.output[0]}.bias", rounded, bias_scales, 0))
        node.input[2] = nodes[1].output[0]
    return nodes


def _dequantize(graph: Graph, name: str, integers: np.ndarray, scales: np.ndarray, axis: int) -> onnx.NodeProto:
    constants = [
        numpy_helper.from_array(integers, f"{name}.integers"),
        numpy_helper.from_array(scales, f"{name}.scale"),
        numpy_helper.from_array(np.zeros(scales.shape, integers.dtype), f"{name}.zero_point"),
    ]
    graph.model.graph.initializer.extend(constants)
    inputs = [constant.name for constant in constants]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{name}.dq", axis=axis)


def _absorb_activations(graph: Graph, scales: Mapping[str, Scale]) -> None:
    """Remove each ReLU and Clip that the QuantizeLinear behind it makes superfluous by saturating."""
    absorbed = []
    for node in graph:
        source, target = (node.input[0] if node.input else ""), node.output[0]
        if node.op_type not in qdq_cpu.ABSORBED or target not in scales or source not in graph.producers:
            continue
        if len(graph.readings[source]) > 1 or source in graph.outputs or not _saturates(graph, node, scales[target]):
            continue
        if any(reader.op_type != "QuantizeLinear" for reader in graph.readers(target)):
            continue  # a layer that is kept in float needs the activation
        producer = graph.producers[source]
        producer.output[list(producer.output).index(source)] = target
        for reader in graph.readers(target):
            reader.doc_string = _cuts(graph, node, scales[target])
        absorbed.append(node)
    graph.remove(absorbed)


def _shield(graph: Graph, kept: Collection[str]) -> None:
    """Keep ONNX Runtime from quantizing layers that are to stay float, to INT8 with one scale for all channels.

    It does that (1.31, "WeightBiasQuantization") wherever a layer stands between DequantizeLinear and QuantizeLinear.
    A Max with the smallest value that the integers have changes nothing, and no optimisation removes it.
    """
    nodes = []
    for node in graph:
        if node.output[0] in kept and graph.producer_type(node.input[0]) == "DequantizeLinear":
            pair = graph.producers[node.input[0]]
            scale, zero_point = (graph.constant(name).flat[0] for name in pair.input[1:])
            name = f"{node.output[0]}.input"
            low = np.array(Scale(scale, zero_point).bounds[0], np.float32)
            graph.model.graph.initializer.append(numpy_helper.from_array(low, f"{name}.low"))
            nodes.append(helper.make_node("Max", [node.input[0], f"{name}.low"], [name], name=name))
            node.input[0] = name
        nodes.append(node)
    replace(graph.model.graph.node, nodes)
    graph.refresh()


def _saturates(graph: Graph, node: onnx.NodeProto, scale: Scale) -> bool:
    """Whether quantization cuts off at the bounds of the activation or inside them, up to rounding."""
    low, high = scale.bounds
    if node.op_type == "Relu":
        return low == 0
    limits, tolerance = _limits(graph, node), 0.01 * float(scale.scale)
    return low >= limits[0] - tolerance and high <= limits[1] + tolerance


def _cuts(graph: Graph, node: onnx.NodeProto, scale: Scale) -> str:
    """At which ends of the range a Clip cuts off, for whoever differentiates the graph."""
    (low, high), (least, most) = scale.bounds, _limits(graph, node)
    tolerance = 0.01 * float(scale.scale)
    return "; ".join(
        told
        for told, cut in ((CUTS_BELOW, low <= least + tolerance), (CUTS_ABOVE, high >= most - tolerance))
        if cut and node.op_type == "Clip"
    )


def _limits(graph: Graph, clip: onnx.NodeProto) -> list[float]:
    return [
        float(graph.constant(name)) if graph.is_constant(name) else default
        for name, default in zip([*clip.input[1:], "", ""], (-np.inf, np.inf), strict=False)
    ]


def _insert_pairs(graph: Graph, placement: Placement, scales: Mapping[str, Scale]) -> None:
    """Put one Q/DQ pair behind each quantized tensor and let the chosen readings read it."""
    readings: dict[str, list[Edge]] = {}
    for edge in placement.edges:
        readings.setdefault(edge.tensor, []).append(edge)
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for name, edges in readings.items():
        pairs[name] = _pair(graph, name, scales[name])
        for edge in edges:
            graph.producers[edge.reader].input[edge.index] = pairs[name][1].output[0]
    nodes = [node for name in graph.inputs for node in pairs.get(name, [])]
    for node in graph:
        nodes += [node, *(item for name in node.output for item in pairs.get(name, []))]
    replace(graph.model.graph.node, nodes)
    graph.refresh()


def _pair(graph: Graph, name: str, scale: Scale) -> list[onnx.NodeProto]:
    constants = [
        numpy_helper.from_array(np.array(scale.scale), f"{name}.scale"),
        numpy_helper.from_array(np.array(scale.zero_point), f"{name}.zero_point"),
    ]
    graph.model.graph.initializer.extend(constants)
    parameters = [constant.name for constant in constants]
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"], name=f"{name}.q"),
        helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"], name=f"{name}.dq"),
    ]
