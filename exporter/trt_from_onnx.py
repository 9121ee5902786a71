"""ONNX to TensorRT engines. The one place that imports TensorRT.

`tensorrt` where it works, else `tensorrt_rtx`, which has the same API and builds without a GPU. The networks are
strongly typed: precision is what the graph says, Q/DQ pairs and casts included.
"""

import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from exporter.errors import BadInput, Missing
from exporter.onnx_graph import attribute

_MODULES = ("tensorrt", "tensorrt_rtx")
# What TensorRT dequantizes. UINT8 parses as well, and is then taken for INT8: 128..255 become 127.
_QUANTIZED_TYPES = {
    getattr(onnx.TensorProto, name)
    for name in ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
    if hasattr(onnx.TensorProto, name)
}
_MAX_REASON = 300


def builder_name() -> str | None:
    """The library that builds engines here and its version, as "tensorrt_rtx 1.7.1"; None where there is none."""
    library = _library()
    return None if library is None else f"{library.__name__} {library.__version__}"


def trt_from_onnx(model: bytes | Path, batch: tuple[int, int, int]) -> bytes:
    """Build a serialized engine with one optimization profile.

    Args:
        model: an ONNX model, or the file that holds it.
        batch: smallest, most usual and largest number of images of one call.

    Returns:
        The engine, for the machine's own GPU type and this version of the builder.

    Raises:
        Missing: neither `tensorrt` nor `tensorrt_rtx` can be imported.
        BadInput: no ONNX model; a batch range that is none, or not the graph's; quantization that TensorRT does not
            have (UINT8, INT32, or a zero point that is not 0), some of which it would misread in silence; or a graph
            that its parser or builder rejects: the message has their words and the node.
    """
    smallest, usual, largest = batch
    if not 1 <= smallest <= usual <= largest:
        raise BadInput(f"batch {batch}: give smallest, usual and largest, rising from 1")
    library = _library()
    if library is None:
        raise Missing("TensorRT is not installed: pip install tensorrt, or tensorrt-rtx, whose builder needs no GPU")
    content = _read(model)
    _require_tensorrt_quantization(content)
    # Bytes, and not the file: weights stored beside it are in `content` now.
    return _build(library, content.SerializeToString(), batch)


@cache
def _library() -> Any:
    for name in _MODULES:
        try:
            library = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue  # PyPI's `tensorrt` is installed in many places where its libraries are not
        if hasattr(library, "Builder") and hasattr(library, "OnnxParser"):
            return library
    return None


def _read(model: bytes | Path) -> onnx.ModelProto:
    try:
        if isinstance(model, Path):
            return onnx.load(str(model))
        return onnx.load_model_from_string(model)
    except FileNotFoundError as error:
        raise BadInput(f"{model!s}: no such file") from error
    except (DecodeError, OSError) as error:
        source = str(model) if isinstance(model, Path) else "these bytes"
        raise BadInput(f"{source}: no ONNX model ({error})") from error


def _require_tensorrt_quantization(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT quantizes otherwise than ONNX says."""
    for nodes, constants, types in _graphs(model):
        for node in nodes:
            if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and node.domain in {"", "ai.onnx"}:
                problem = _zero_point_problem(node, constants, types)
                if problem:
                    raise BadInput(
                        f"{node.op_type} {node.name or node.output[0]!r} {problem}: TensorRT has only signed types with"
                        " zero point 0 and would misread it; quantize for --target gpu"
                    )


def _zero_point_problem(node: onnx.NodeProto, constants: dict[str, np.ndarray], types: dict[str, int]) -> str | None:
    name = node.input[2] if len(node.input) > 2 else ""
    data_type: int
    if name:
        if name not in constants:
            return "has a zero point that is computed"
        data_type = helper.np_dtype_to_tensor_dtype(constants[name].dtype)
        if data_type in _QUANTIZED_TYPES and np.any(constants[name].astype(np.float32) != 0):
            return "has a zero point that is not 0"
    elif node.op_type == "QuantizeLinear":
        data_type = attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8  # ONNX's default
    else:
        data_type = types.get(node.input[0], onnx.TensorProto.UNDEFINED)
    if data_type not in _QUANTIZED_TYPES:
        return f"uses {onnx.TensorProto.DataType.Name(data_type)}"
    return None


def _graphs(model: onnx.ModelProto) -> Iterator[tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, int]]]:
    """Each graph in the model, bodies of control flow and functions included: nodes, constants and element types.

    A body sees the constants and types of the graphs around it.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    yield from _walk(inferred.graph, {}, {})
    for function in inferred.functions:
        yield list(function.node), _constants(function.node, []), {}


def _walk(
    graph: onnx.GraphProto, constants: dict[str, np.ndarray], types: dict[str, int]
) -> Iterator[tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, int]]]:
    constants = constants | _constants(graph.node, graph.initializer)
    values = [*graph.input, *graph.value_info, *graph.output]
    types = types | {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    yield list(graph.node), constants, types
    for node in graph.node:
        for item in node.attribute:
            for body in [item.g, *item.graphs] if item.type in {item.GRAPH, item.GRAPHS} else []:
                yield from _walk(body, constants, types)


def _constants(nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]) -> dict[str, np.ndarray]:
    """The small stored tensors: zero points are among them, and weights need not be decoded."""
    stored = {tensor.name: tensor for tensor in initializers}
    stored |= {
        node.output[0]: item.t
        for node in nodes
        if node.op_type == "Constant"
        for item in node.attribute
        if item.name == "value"
    }
    used = {node.input[2] for node in nodes if len(node.input) > 2 and node.op_type.endswith("tizeLinear")}
    return {name: numpy_helper.to_array(tensor) for name, tensor in stored.items() if name in used}


def _build(library: Any, model: bytes, batch: tuple[int, int, int]) -> bytes:
    logger = _logger(library)
    logger.errors.clear()
    builder = library.Builder(logger)
    # TensorRT 11 knows only strongly typed networks, and 10 needs to be told; what is always so may have no flag.
    flags = getattr(library, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = library.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BadInput(f"TensorRT cannot read this graph: {_parser_words(parser)}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        axis, *rest = tensor.shape
        if axis not in {-1, batch[0]} or (axis != -1 and len(set(batch)) > 1) or -1 in rest:
            raise BadInput(f"batch {batch}: input {tensor.name!r} has the shape {list(tensor.shape)}")
        if axis == -1:
            profile.set_shape(tensor.name, *((size, *rest) for size in batch))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        words = " ".join("; ".join(logger.errors).split())[:_MAX_REASON]
        raise BadInput(f"TensorRT cannot build this graph: {words or 'the builder gave no reason'}")
    return bytes(engine)


def _parser_words(parser: Any) -> str:
    """The parser's errors on one line, each with the node that it is about."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    words = [f"{error.node_operator()} {error.node_name()!r}: {error.desc()}" for error in errors]
    return " ".join("; ".join(words).split())[:_MAX_REASON] or "the parser gave no reason"


@cache
def _logger(library: Any) -> Any:
    """The one logger of this process: TensorRT keeps the first that it is given. It collects errors, in silence."""

    class Recorder(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message)

    return Recorder()
