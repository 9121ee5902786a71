"""Rules of the linter about Q/DQ pairs and half precision: what TensorRT has, and what others were measured to do."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_graph import attribute
from convoynet.exporter.linting.model import Problem, Runtime, Scope, Subject, label
from convoynet.exporter.quantization.qdq_placement import output_axis

# What TensorRT dequantizes. UINT8 parses as well, and is then taken for INT8: 128..255 become 127.
_QUANTIZED_TYPES = {
    getattr(onnx.TensorProto, name)
    for name in ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
    if hasattr(onnx.TensorProto, name)
}
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_INT8 = onnx.TensorProto.INT8
_FP8 = onnx.TensorProto.FLOAT8E4M3FN
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SCALE_TYPES = {
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "FLOAT8E8M0", "FLOAT8E4M3FN")
    if hasattr(onnx.TensorProto, name)
}
_CHANNEL_MULTIPLE = 8
# Pixels: the one layer whose inputs nobody can choose.
_IMAGE_CHANNELS = 4
_ONLY_SIGNED = "TensorRT has only signed types with zero point 0 and would misread it"
_FOR_GPU = "quantize for --target gpu: INT8 and zero point 0 (in onnxruntime.quantization QInt8, ActivationSymmetric)"


def types_that_tensorrt_misreads(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """UINT8, also as the default of a missing zero point, and every other type that TensorRT does not have."""
    for scope, node in subject.nodes(*_PAIR):
        data_type = _data_type(scope, node)
        if data_type is not None and data_type not in _QUANTIZED_TYPES and not _is_int32(node, data_type):
            name = onnx.TensorProto.DataType.Name(data_type)
            yield Problem(label(node), f"uses {name}: {_ONLY_SIGNED}", _FOR_GPU)


def int32_biases(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A DequantizeLinear of INT32: the bias that ONNX Runtime's quantizer and the cpu target write."""
    for scope, node in subject.nodes(*_PAIR):
        data_type = _data_type(scope, node)
        if data_type is not None and _is_int32(node, data_type):
            fix = "keep biases in float: quantize for --target gpu (in onnxruntime.quantization QuantizeBias: False)"
            yield Problem(label(node), "uses INT32: TensorRT dequantizes no INT32, and biases are INT32 here", fix)


def zero_points(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A zero point that is not 0, or that is not stored, so that nobody can know."""
    for scope, node in subject.nodes(*_PAIR):
        name = node.input[2] if len(node.input) > 2 else ""
        if name and name not in scope.constants:
            yield Problem(label(node), f"has a zero point that is computed: {_ONLY_SIGNED}", _FOR_GPU)
        elif name and scope.constants[name].data_type in _QUANTIZED_TYPES:
            value = subject.value(scope.constants[name])
            if value is not None and np.any(value.astype(np.float32) != 0):
                yield Problem(label(node), f"has a zero point that is not 0: {_ONLY_SIGNED}", _FOR_GPU)


def scales(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A scale that is 0, below 0 or no number, or of another form than its channels and zero points."""
    fix = "calibrate again, and give a channel that is always zero any positive scale"
    for scope, node in subject.nodes(*_PAIR):
        stored = scope.constants.get(node.input[1])
        value = None if stored is None else subject.value(stored)
        if stored is None or value is None:
            continue
        numbers = value.astype(np.float32)
        if problem := _form(scope, node, stored):
            yield Problem(label(node), problem, "give each channel its scale, or all of them one")
            continue
        if not np.all(np.isfinite(numbers) & (numbers > 0)):
            first = numbers[~(np.isfinite(numbers) & (numbers > 0))].flat[0]
            count = numbers.size - np.count_nonzero(np.isfinite(numbers) & (numbers > 0))
            where = f"{count} of {numbers.size} scales that are" if numbers.size > 1 else "a scale that is"
            yield Problem(label(node), f"has {where} not above 0, such as {first:g}: nothing can be told by it", fix)
        channels = _channels_along(scope, node)
        if numbers.ndim == 1 and numbers.size > 1 and channels not in (None, numbers.size):
            told = f"has {numbers.size} scales for {channels} channels (axis {attribute(node, 'axis', 1)})"
            yield Problem(label(node), told, "give each channel its scale, or all of them one; and set the right axis")


def _form(scope: Scope, node: onnx.NodeProto, scale: onnx.TensorProto) -> str:
    """What is wrong with the scale as a tensor: its type, shape or number; empty where nothing is."""
    shape, kind = list(scale.dims), onnx.TensorProto.DataType.Name(scale.data_type)
    if scale.data_type not in _SCALE_TYPES:
        return f"has a scale of {kind}, which is no float"
    if 0 in shape:
        return "has a scale without a number"
    if len(shape) > 1 and not attribute(node, "block_size", 0):
        return f"has scales of the shape {shape}: without a block_size they are one number, or one row"
    zeros = scope.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zeros is not None and np.prod(list(zeros.dims)) != np.prod(shape):
        return f"has scales of the shape {shape} and zero points of {list(zeros.dims)}"
    return ""


def _channels_along(scope: Scope, node: onnx.NodeProto) -> int | None:
    """How long the axis is that the scales run along; None where the quantized tensor's shape is not known."""
    if attribute(node, "block_size", 0):
        return None
    shape = scope.shapes.get(node.input[0])
    axis = int(attribute(node, "axis", 1))
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    return shape[axis]


def _is_int32(node: onnx.NodeProto, data_type: int) -> bool:
    return node.op_type == "DequantizeLinear" and data_type == onnx.TensorProto.INT32


def _data_type(scope: Scope, node: onnx.NodeProto) -> int | None:
    """The quantized type of a Q or DQ; None where its zero point is computed."""
    name = node.input[2] if len(node.input) > 2 else ""
    if name:
        return scope.constants[name].data_type if name in scope.constants else None
    if node.op_type == "QuantizeLinear":
        return int(attribute(node, "output_dtype", 0)) or onnx.TensorProto.UINT8  # ONNX's default
    return scope.types.get(node.input[0], onnx.TensorProto.UNDEFINED)


def signed_activations(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """INT8 activations, for which ONNX Runtime has few integer kernels on x86."""
    for scope, node in subject.nodes("QuantizeLinear"):
        if node.input[0] not in scope.constants and _data_type(scope, node) == onnx.TensorProto.INT8:
            yield Problem(
                label(node),
                "makes INT8 activations: on x86 ONNX Runtime leaves many layers behind them in float (ResNet-18: 1.1 "
                "times float32, with UINT8 3.2 times)",
                "quantize activations to UINT8: --target cpu",
            )


def fp8_pairs(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A QuantizeLinear to FP8, before which ONNX Runtime drops the activation."""
    for scope, node in subject.nodes("QuantizeLinear"):
        if _data_type(scope, node) == _FP8:
            yield Problem(
                label(node),
                "makes FP8: ONNX Runtime 1.31 drops a ReLU before it, as it may before UINT8, and fuses others to what "
                "it has no kernel for",
                "run it in TensorRT, or in ONNX Runtime with its basic optimisations alone; for a CPU quantize to INT8",
            )


def fp16_scales(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A Concat between pairs whose scales are FP16, which ONNX Runtime fuses to a kernel that has float32 scales."""
    graph = subject.graph
    types = subject.scopes[0].types
    for node in graph:
        pairs = [graph.producers[name] for name in node.input if graph.producer_type(name) == "DequantizeLinear"]
        behind = [reader.op_type for reader in graph.readers(node.output[0])]
        surrounded = len(pairs) == len(node.input) and behind == ["QuantizeLinear"]
        half = any(types.get(pair.input[1]) == onnx.TensorProto.FLOAT16 for pair in pairs)
        if node.op_type == "Concat" and surrounded and half:
            yield Problem(
                label(node),
                "stands between pairs with FP16 scales: ONNX Runtime 1.31 fuses them to an operator that has only "
                "float32 scales, and refuses the graph",
                "run it in TensorRT, or in ONNX Runtime with its basic optimisations alone; for a CPU quantize "
                "without fp16",
            )


def bfloat16_layers(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Layers and pairs in bfloat16, for which ONNX Runtime has no kernels on a CPU."""
    for scope, node in subject.nodes(*_WEIGHTED, *_PAIR):
        if onnx.TensorProto.BFLOAT16 in {scope.types.get(name) for name in node.input}:
            yield Problem(
                label(node),
                "is in bfloat16: ONNX Runtime 1.31 has no kernel for it on a CPU",
                "run it in TensorRT: --target gpu; for a CPU export float32 or INT8",
            )


def bfloat16_scales(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """INT8 with scales in bfloat16, which OpenVINO computes wrongly."""
    for scope, node in subject.nodes("DequantizeLinear"):
        if scope.types.get(node.input[1]) == onnx.TensorProto.BFLOAT16 and _data_type(scope, node) == _INT8:
            yield Problem(
                label(node),
                "has a scale in bfloat16: OpenVINO 2026.4 computed other numbers (ResNet-20: noise and no signal)",
                "run it in TensorRT: --target gpu; for a CPU quantize without bf16",
            )


def fp16_layers(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Layers in FP16, which ONNX Runtime computes in float32 on a CPU."""
    for scope, node in subject.nodes(*_WEIGHTED):
        if scope.types.get(node.input[0]) == onnx.TensorProto.FLOAT16:
            yield Problem(
                label(node),
                "is in FP16: on a CPU ONNX Runtime computes it in float32, in the same time (ResNet-20)",
                "run it on a GPU; for a CPU export float32 or INT8",
            )


def float_weights(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """A QuantizeLinear of stored weights."""
    for scope, node in subject.nodes("QuantizeLinear"):
        if node.input[0] in scope.constants:
            yield Problem(
                label(node),
                "quantizes stored weights: the file keeps them in float, and ONNX Runtime fuses nothing with them "
                "(ResNet-18: slower than float32)",
                "store the integers and a DequantizeLinear, as convoy export --int8 does",
            )


def one_scale_for_all_channels(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """INT8 weights of several output channels with one scale."""
    graph = subject.graph
    for layer in _integer_layers(subject):
        scale = graph.initializers.get(layer.weights.input[1])
        if scale is not None and _count(scale) == 1 and layer.outputs > 1:
            yield Problem(
                label(layer.node),
                "has one scale for the weights of all output channels: it loses accuracy (ResNet-18: 2.6 dB)",
                "give each output channel its scale (in onnxruntime.quantization per_channel=True)",
            )


def odd_channels(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """INT8 convolutions over channels that do not fill the vectors of tensor cores."""
    for layer in _integer_layers(subject):
        if layer.node.op_type != "Conv":
            continue
        inputs = 0 if layer.inputs <= _IMAGE_CHANNELS else layer.inputs
        if inputs % _CHANNEL_MULTIPLE or layer.outputs % _CHANNEL_MULTIPLE:
            yield Problem(
                label(layer.node),
                f"has {layer.inputs} input and {layer.outputs} output channels in INT8: TensorRT's integer "
                f"kernels want multiples of {_CHANNEL_MULTIPLE}",
                f"choose widths that are multiples of {_CHANNEL_MULTIPLE}, or leave this layer in float",
            )


def operators_newer_than_the_opset(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Q/DQ forms that the stated opset does not have."""
    for scope, node in subject.nodes(*_PAIR):
        scale = scope.constants.get(node.input[1])
        needed, what = 10, "quantization"
        if scale is not None and _count(scale) > 1:
            needed, what = 13, "one scale for each channel"
        if _data_type(scope, node) == _FP8:
            needed, what = 19, "FP8"
        if scale is not None and scale.data_type != onnx.TensorProto.FLOAT:
            needed, what = 19, "scales other than float32"
        if subject.opset < needed:
            yield Problem(
                label(node),
                f"needs opset {needed} for {what}, and the model states {subject.opset}",
                f"export with opset {needed} or later",
            )


class _Layer(NamedTuple):
    node: onnx.NodeProto
    weights: onnx.NodeProto  # the DequantizeLinear
    inputs: int
    outputs: int


def _integer_layers(subject: Subject) -> Iterator[_Layer]:
    """The layers of the main graph that multiply dequantized activations with dequantized stored INT8 weights.

    FP8 is none: its rounding is relative to each weight, so that one scale for all channels costs it little.
    """
    graph = subject.graph
    for node in graph:
        if node.op_type not in _WEIGHTED or graph.producer_type(node.input[0]) != "DequantizeLinear":
            continue
        weights = graph.producers.get(node.input[1])
        if weights is None or weights.op_type != "DequantizeLinear":
            continue
        if _data_type(subject.scopes[0], weights) == _FP8:
            continue
        stored = weights.input[0]
        if graph.producer_type(stored) == "QuantizeLinear":
            stored = graph.producers[stored].input[0]
        if not graph.is_constant(stored):
            continue
        shape = list(graph.initializers[stored].dims)
        groups = int(attribute(node, "group", 1))
        if node.op_type == "ConvTranspose":
            yield _Layer(node, weights, shape[0], shape[1] * groups)
        elif node.op_type == "Conv":
            yield _Layer(node, weights, shape[1] * groups, shape[0])
        elif len(shape) == 2:
            axis = output_axis(node)
            yield _Layer(node, weights, shape[1 - axis], shape[axis])


def _count(tensor: onnx.TensorProto) -> int:
    return int(np.prod(list(tensor.dims), dtype=np.int64))
