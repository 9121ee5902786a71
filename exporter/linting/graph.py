"""Rules of the linter about everything but quantization: versions, operators, inputs, outputs and what is stored."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import external_data_helper

from convoynet.exporter.graph.onnx_clean import is_foldable
from convoynet.exporter.graph.onnx_graph import attribute
from convoynet.exporter.linting.model import Family, Problem, Runtime, Subject, dims, label

# Those for which OnnxParser.supports_operator of TensorRT-RTX 1.7 says no.
_NOT_IN_TENSORRT = frozenset({
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT",
    "DeformConv", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool",
    "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement",
    "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU",
    "TfIdfVectorizer", "Unique",
})  # fmt: skip
_INTEGER_OPERATORS = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
# The number of rows that they return hangs on the values that they are given.
_DATA_DEPENDENT = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
_CONTROL_FLOW = ("If", "Loop", "Scan")
_DOMAINS: Mapping[Family, frozenset[str]] = MappingProxyType(
    {
        "onnxruntime": frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}),
        "openvino": frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "org.openvinotoolkit"}),
        "tensorrt": frozenset({"", "ai.onnx"}),
    }
)
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
# Fewer are shapes, axes and indices, which are INT64 by ONNX's own rules.
_MANY_INTEGERS = 1024


def opset(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """An operator set that the runtime does not read."""
    known = runtime.opsets
    if known is not None and subject.opset not in known:
        span = f"{known.start} to {known.stop - 1}"
        fix = f"export with --opset {known.stop - 1} or less" if subject.opset >= known.stop else "export it again"
        yield Problem("the model", f"has opset {subject.opset}: {runtime.title} reads {span}", fix)


def ir_version(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """A file format that the runtime does not read."""
    if runtime.ir is not None and subject.model.ir_version > runtime.ir:
        yield Problem(
            "the model",
            f"has IR version {subject.model.ir_version}: {runtime.title} reads {runtime.ir} and older",
            "set model.ir_version = 10 before saving it, or make it with an older onnx",
        )


def unsupported_operators(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Operators that TensorRT's parser does not have."""
    for _scope, node in subject.nodes(*_NOT_IN_TENSORRT):
        if node.op_type in _INTEGER_OPERATORS:
            fix = "quantize with QuantizeLinear and DequantizeLinear pairs (QuantFormat.QDQ), for --target gpu"
        else:
            fix = "express it by other operators, or leave it to the code behind the model"
        yield Problem(label(node), "is no operator of TensorRT's parser", fix)
    for _scope, node in subject.nodes("Resize"):
        if attribute(node, "antialias", 0):
            fix = "resize without antialiasing, or before the image is sent"
            yield Problem(label(node), "resizes with antialiasing, which TensorRT's parser does not have", fix)


def custom_operators(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """Operators that are neither ONNX's nor the runtime's, nor functions of the model."""
    own = {(item.domain, item.name) for item in subject.model.functions}
    for scope in subject.scopes:
        for node in scope.nodes:
            if node.domain not in _DOMAINS[runtime.family] and (node.domain, node.op_type) not in own:
                yield Problem(
                    label(node),
                    f"is of the domain {node.domain!r}: {runtime.title} has it only with a library that adds it",
                    "express it by operators of ONNX",
                )


def data_dependent_operators(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """Operators whose results have as many rows as the data says."""
    for _scope, node in subject.nodes(*_DATA_DEPENDENT):
        if runtime.family == "tensorrt" and node.op_type in _NOT_IN_TENSORRT:
            continue
        why = "the results of a batch cannot be told apart by rows"
        if runtime.family == "tensorrt" and node.op_type == "NonZero":
            why = "TensorRT-RTX does not have it"
        yield Problem(
            label(node),
            f"returns as many rows as the data says: {why}",
            "choose a fixed number with TopK and mask the rest",
        )


def control_flow(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """If, Loop and Scan: nothing is fused across them."""
    for _scope, node in subject.nodes(*_CONTROL_FLOW):
        yield Problem(
            label(node), "is control flow: TensorRT fuses nothing across it", "export one branch, or unroll the loop"
        )


def training_mode(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Dropout and batch normalisation that behave as in training."""
    fix = "export the network after .eval()"
    for scope, node in subject.nodes("BatchNormalization", "Dropout"):
        if node.op_type == "BatchNormalization":
            more = subject.opset < 14 and any(node.output[1:])
            if attribute(node, "training_mode", 0) or more:
                yield Problem(label(node), "normalises by the batch's own statistics, as in training", fix)
        elif len(node.input) > 2 and node.input[2]:
            stored = scope.constants.get(node.input[2])
            value = None if stored is None else subject.value(stored)
            if stored is None or (value is not None and value.any()):
                yield Problem(label(node), "drops values at random, as in training", fix)


def auxiliary_outputs(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Several float outputs of one shape: GoogLeNet's and DeepLab's auxiliary classifiers."""
    first: dict[tuple[int | None, ...], str] = {}
    for value in subject.outputs:
        shape = tuple(dims(value))
        if value.type.tensor_type.elem_type not in _FLOATS or len(shape) < 2 or None in shape[1:]:
            continue
        if shape[1:] in first:
            yield Problem(
                f"output {value.name!r}",
                f"has the shape of {first[shape[1:]]!r}: it may be an auxiliary classifier, for training alone",
                "export the main output only (aux_logits=False)",
            )
        first.setdefault(shape[1:], value.name)


def static_batch(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Inputs with a fixed number of rows."""
    for value in subject.inputs:
        shape = dims(value)
        if len(shape) > 1 and shape[0] is not None:
            yield Problem(
                f"input {value.name!r}",
                f"has a fixed batch of {shape[0]}: a server cannot batch requests",
                "export with a dynamic first axis, as convoy export does",
            )


def dynamic_size(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Inputs with more dynamic axes than the batch's."""
    for value in subject.inputs:
        if None in dims(value)[1:]:
            yield Problem(
                f"input {value.name!r}",
                "has dynamic axes behind the batch: TensorRT needs a profile for them and tunes for one size",
                "export one size: --input-size H[xW]",
            )


def raw_uint8_inputs(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """UINT8 inputs that anything but a Cast reads; Q and DQ have a rule of their own."""
    names = {value.name for value in subject.inputs if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    for name in names:
        for node in subject.graph.readers(name):
            if node.op_type not in {"Cast", "DequantizeLinear"}:
                yield Problem(
                    label(node),
                    f"reads the UINT8 input {name!r}: TensorRT takes UINT8 for an input and a Cast alone",
                    "cast the pixels to float before anything else, as --input uint8 does",
                )


def unfolded_batch_norms(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Batch normalisations that the layer before or behind could do at no cost."""
    for node in subject.graph:
        if node.op_type == "BatchNormalization" and is_foldable(subject.graph, node):
            yield Problem(
                label(node),
                "could be folded into the layer beside it",
                "export with torch.onnx.export(dynamo=True), whose optimizer folds it, or with convoy export",
            )


def missing_external_data(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Weights in files that are not there, too short, or outside of the model's folder."""
    if subject.folder is None:
        return
    told = set()
    for scope in subject.scopes:
        for tensor in scope.constants.values():
            if not external_data_helper.uses_external_data(tensor):
                continue
            info = external_data_helper.ExternalDataInfo(tensor)
            problem = _file_problem(subject.folder, info)
            if problem is not None and info.location not in told:
                told.add(info.location)
                fix = "copy it beside the model, or save the model with external_data=False"
                yield Problem(f"the weights' file {info.location!r}", problem, fix)


def _file_problem(folder: Path, info: external_data_helper.ExternalDataInfo) -> str | None:
    file = (folder / info.location).resolve()
    if not file.is_relative_to(folder.resolve()):
        return "is outside of the model's folder, where runtimes do not look"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size < (info.offset or 0) + (info.length or 0):
        return "is shorter than the model says"
    return None


def wide_numbers(subject: Subject, _: Runtime) -> Iterator[Problem]:
    """Stored FLOAT64, and more INT64 than shapes and indices need."""
    for tensor in subject.graph.initializers.values():
        count = int(np.prod(list(tensor.dims), dtype=np.int64))
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            yield Problem(
                f"weights {tensor.name!r}",
                "are FLOAT64: twice the size, and few kernels have it",
                "export a float32 network: model.float()",
            )
        elif tensor.data_type == onnx.TensorProto.INT64 and count > _MANY_INTEGERS:
            yield Problem(
                f"weights {tensor.name!r}",
                f"are {count} INT64 numbers: twice the size of INT32",
                "store them as INT32, or as float32 where they are no indices",
            )
