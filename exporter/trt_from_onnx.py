"""ONNX to TensorRT engines. The one place that imports TensorRT.

`tensorrt` where it works, else `tensorrt_rtx`, which has the same API and builds without a GPU. The networks are
strongly typed: precision is what the graph says, Q/DQ pairs and casts included.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from exporter.errors import BadInput, Missing
from exporter.lint import TENSORRT_QUANTIZATION, lint
from exporter.lint_model import RUNTIMES

_MODULES = ("tensorrt", "tensorrt_rtx")
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
    misread = lint(content, RUNTIMES["tensorrt"], rules=TENSORRT_QUANTIZATION)
    if misread:
        raise BadInput(misread[0].line)
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
