"""What ONNX's own checker and the installed runtimes say of a model as a whole; nothing is computed."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import onnx
from onnx import helper

from convoynet.exporter.errors import short_reason
from convoynet.exporter.linting.kernels import onnxruntime_and_options, openvino_core
from convoynet.exporter.linting.model import Problem, Runtime, Subject

# Bytes. What is larger is weights, whose numbers say nothing of whether a graph is read.
_MOST_CONSTANT = 1 << 16
_MOST_WHOLE = 1 << 30
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_WHOLE = "the model"


def broken_rules(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """Rules of ONNX that the model breaks, the first of them; one runtime minds, another does not."""
    if subject.opset > onnx.defs.onnx_opset_version() or subject.model.ir_version > onnx.IR_VERSION:
        return  # the checker knows less than the model
    model = _without_weights(subject.model)
    model.graph.name = model.graph.name or "unnamed"  # every runtime does without these two
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError, TypeError) as error:
        yield Problem(
            _WHOLE,
            f"is no valid ONNX: {short_reason(error)}",
            "export it again, or repair it in the library that wrote it",
        )


def refused(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """What the installed runtime says to the model as a whole where it does not take it."""
    ask = {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime.family]()
    if ask is None:
        return
    reason = ask(_without_weights(subject.model).SerializeToString())
    if reason and subject.model.ByteSize() < _MOST_WHOLE:  # it may have wanted to know a weight
        reason = ask(subject.model.SerializeToString())
    if reason:
        fix = "export it again with other operators, or a newer exporter"
        yield Problem(_WHOLE, f"is refused by the {runtime.title} that is installed here: {reason}", fix)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs in the place of its weights, which cost time and room."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info", "quantization_annotation", "sparse_initializer"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _MOST_CONSTANT and not tensor.external_data:
            light.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            inputs.add(tensor.name)
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


@cache
def _onnxruntime() -> Callable[[bytes], str] | None:
    loaded: Any = onnxruntime_and_options()
    if loaded is None:
        return None
    onnxruntime, options = loaded

    def ask(model: bytes) -> str:
        try:
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # its own types, which have no common one
            return _PREFIX.sub("", short_reason(error))
        return ""

    return ask


@cache
def _openvino() -> Callable[[bytes], str] | None:
    core = openvino_core()
    if core is None:
        return None

    def ask(model: bytes) -> str:
        try:
            core.read_model(model)
        except RuntimeError as error:
            return short_reason(error)
        return ""

    return ask
