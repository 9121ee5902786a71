"""Reads ONNX files that others made: what is no valid model ends here in one line, whatever libraries think of it."""

import contextlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import TensorProto, external_data_helper

from convoynet.exporter.errors import BadInput, ExporterError, short_reason
from convoynet.exporter.graph.onnx_graph import bodies_of, reads

_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
    "COMPLEX128": 128,
}
# Where numbers may stand that are not raw bytes. Complex numbers take two.
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_MOST_OPSET = 2**31
_OURS = "ONNX's own checker finds nothing wrong with it, so the fault may be Convoy's"


def read_model(source: Path | bytes, *, name: str | None = None, weights: bool = True) -> onnx.ModelProto:
    """Read an ONNX model and check that it holds what it says.

    Args:
        source: a file, or what it holds.
        name: what errors call it (default: the file).
        weights: whether those that are stored in other files are read too.

    Raises:
        BadInput: it is none, has no operators, or declares tensors that it does not hold.
    """
    name = name or (str(source) if isinstance(source, Path) else "the model")
    try:
        if isinstance(source, bytes):
            model = onnx.load_model_from_string(source)
        else:
            model = onnx.load(source, load_external_data=False)
        fault = _fault(model)
        if fault:
            raise BadInput(f"{name} is no valid ONNX model: {fault}")
        if weights and isinstance(source, Path):
            external_data_helper.load_external_data_for_model(model, str(source.parent))
    except (OSError, DecodeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise BadInput(f"{name} cannot be read as an ONNX model: {short_reason(error)}") from error
    if not model.graph.node:
        raise BadInput(f"{name} is no ONNX model: it has no operators")
    return model


@contextlib.contextmanager
def reading(name: str, model: onnx.ModelProto) -> Iterator[None]:
    """Look into a model that others made: what fails in the block fails for what the model is.

    A graph can break the rules of ONNX at every name, type and attribute, and any library that follows it raises what
    it likes. CONVOY_DEBUG=1 shows where.

    Raises:
        BadInput: for any exception of the block that is no ExporterError.
    """
    try:
        yield
    except ExporterError:
        raise
    except Exception as error:
        broken = _broken_rule(model)
        said = f"is no valid ONNX model: {broken}" if broken else f"cannot be used: {_told(error)}; {_OURS}"
        raise BadInput(f"{name} {said}") from error


def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor of a graph and of the graphs within it."""
    yield from graph.initializer
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: object) -> Iterator[TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for item in node.attribute:
            if item.HasField("t"):
                yield item.t
            yield from item.tensors
        for body in bodies_of(node):
            yield from tensors(body)


def _fault(model: onnx.ModelProto) -> str:
    if not _is_text(model):
        return "a name or a text of it is not UTF-8"
    for item in model.opset_import:
        if not 0 < item.version < _MOST_OPSET:
            return f"it states opset {item.version} of the domain {item.domain!r}"
    if circle := _circle(model.graph):
        return f"its nodes lead in a circle, with {circle} in it"
    stored = [*tensors(model.graph), *(tensor for function in model.functions for tensor in _tensors_of(function.node))]
    return next(filter(None, map(_tensor_fault, stored)), "")


def _circle(graph: onnx.GraphProto) -> str:
    """A node of a graph, or of one within it, that cannot be computed before its own result is; empty where none is.

    OpenVINO would look at such a graph for ever.
    """
    made = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needed = [{made[name] for name in reads(node) if name in made} for node in graph.node]
    readers: dict[int, list[int]] = {}
    for index, others in enumerate(needed):
        for other in others:
            readers.setdefault(other, []).append(index)
    waits = [len(others) for others in needed]
    ready = [index for index, count in enumerate(waits) if not count]
    while ready:
        for reader in readers.get(ready.pop(), ()):
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
    for node in (node for node, count in zip(graph.node, waits, strict=True) if count):
        return f"{node.op_type} {node.name or node.output[0]!r}"
    bodies = [body for node in graph.node for body in bodies_of(node)]
    return next(filter(None, map(_circle, bodies)), "")


def _is_text(message: Message) -> bool:
    """Whether every text of a message is one: proto2 takes any bytes, and gives them as bytes or raises."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = value if field.is_repeated else [value]
            try:
                if not all(isinstance(text, str) for text in texts):
                    return False
            except UnicodeDecodeError:
                return False
        elif field.type == field.TYPE_MESSAGE and not all(map(_is_text, value if field.is_repeated else [value])):
            return False
    return True


def _tensor_fault(tensor: TensorProto) -> str:
    """Why a tensor cannot be had, before anybody makes room for it."""
    where = f"the tensor {tensor.name!r}"
    if tensor.data_type not in _TYPES:
        return f"{where} has the unknown type {tensor.data_type}"
    shape = list(tensor.dims)
    if min(shape, default=0) < 0:
        return f"{where} has the shape {shape}"
    kind = TensorProto.DataType.Name(tensor.data_type)
    count = prod(shape)
    needed = -(-count * _BITS.get(kind, 8) // 8)
    if external_data_helper.uses_external_data(tensor):
        fault = _external_fault(tensor, needed)
    elif tensor.HasField("raw_data"):
        fault = "" if len(tensor.raw_data) == needed else f"holds {len(tensor.raw_data)} bytes"
    else:
        held = max(len(getattr(tensor, field)) for field in _FIELDS)
        # Numbers of less than a byte are packed, two or four in one; complex ones are two.
        fewest = -(-count * min(_BITS.get(kind, 8), 8) // 8)
        most = 2 * count if "COMPLEX" in kind else count
        fault = "" if fewest <= held <= most else f"holds {held} numbers"
    return f"{where} {fault}; {kind}{shape} needs {count} numbers, {needed} bytes" if fault else ""


def _external_fault(tensor: TensorProto, needed: int) -> str:
    stated = {entry.key: entry.value for entry in tensor.external_data}
    numbers = [stated[key] for key in ("offset", "length") if key in stated]
    if not all(text.isascii() and text.isdigit() for text in numbers):
        return f"lies at {' and '.join(map(repr, numbers))} of its file"
    held = int(stated.get("length", needed))
    return "" if held == needed else f"has {held} bytes of its file"


def _broken_rule(model: onnx.ModelProto) -> str:
    """What ONNX's own checker says; empty where it finds nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return short_reason(error)
    except (RuntimeError, ValueError, TypeError, EncodeError) as error:
        return _told(error)
    return ""


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {short_reason(error)} (CONVOY_DEBUG=1 shows where)"
