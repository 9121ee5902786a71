"""What the installed runtimes say of operators and types, asked with one node at a time; nothing is computed."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import onnx
from onnx import helper

from convoynet.exporter.linting.model import Problem, Runtime, Scope, Subject, label

# Larger ones than shapes and axes are weights, and a runtime takes those for inputs as well.
_MOST_CONSTANT = 1024
# Different nodes of one model: more are left to the runtime itself.
_MOST_ASKED = 400
_FATAL = 4
_NO_KERNEL = re.compile(r"NOT_IMPLEMENTED|No Op registered for")
_NO_RULE = re.compile(r"No conversion rule found for operations")


def operators_without_kernel(subject: Subject, runtime: Runtime) -> Iterator[Problem]:
    """Operators of ONNX, or types of their inputs, that the installed runtime has nothing for."""
    refuses = {"onnxruntime": _onnxruntime_refuses, "openvino": _openvino_refuses}[runtime.family]
    known = min(subject.opset, onnx.defs.onnx_opset_version())
    if known < subject.opset or (runtime.opsets is not None and known not in runtime.opsets):
        return  # of the whole file there is another rule
    asked: set[bytes] = set()
    for scope, node in subject.nodes():
        bfloat16 = any(scope.types.get(name) == onnx.TensorProto.BFLOAT16 for name in node.input)
        if bfloat16 or any(item.type in {item.GRAPH, item.GRAPHS} for item in node.attribute):
            continue  # a rule of its own, and a body whose nodes are asked for one by one
        question = _question(subject, scope, node)
        asked.add(question)
        if len(asked) > _MOST_ASKED:
            return
        if refuses(question):
            kinds = sorted({_name(scope, name) for name in node.input if name} - {"FLOAT", ""})
            of = f" for {' and '.join(kinds)}" if kinds else ""
            fix = "express it by other operators, or leave it to the code behind the model"
            if "DOUBLE" in kinds:
                fix = "export a float32 network: model.float()"
            yield Problem(label(node), f"has no implementation{of} in the {runtime.title} that is installed here", fix)


def _name(scope: Scope, tensor: str) -> str:
    kind = scope.types.get(tensor, 0)
    return onnx.TensorProto.DataType.Name(kind) if kind in onnx.TensorProto.DataType.values() and kind else ""


def _question(subject: Subject, scope: Scope, node: onnx.NodeProto) -> bytes:
    """A model of this node alone; nodes that differ in names alone make the same one."""
    names = dict.fromkeys(name for name in node.input if name)
    given = {name: f"i{index}" for index, name in enumerate(names)}
    graph = onnx.GraphProto(name="one")
    for name, short in given.items():
        stored = scope.constants.get(name)
        if stored is not None and 0 < stored.ByteSize() <= _MOST_CONSTANT and not stored.external_data:
            graph.initializer.add().CopyFrom(stored)
            graph.initializer[-1].name = short
        else:
            graph.input.append(
                helper.make_tensor_value_info(short, scope.types.get(name, 0) or onnx.TensorProto.FLOAT, None)
            )
    lone = graph.node.add()
    lone.CopyFrom(node)
    lone.name = ""
    lone.input[:] = [given.get(name, "") for name in node.input]
    lone.output[:] = [name and f"o{index}" for index, name in enumerate(node.output)]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in lone.output if name)
    opset = helper.make_opsetid("", subject.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString(deterministic=True)


@cache
def onnxruntime_and_options() -> tuple[Any, Any] | None:
    """ONNX Runtime, and options with which a session costs little; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime, options


@cache
def openvino_core() -> Any:
    """OpenVINO's core; None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    return openvino.Core()


@cache
def _onnxruntime_refuses(question: bytes) -> bool:
    loaded = onnxruntime_and_options()
    if loaded is None:
        return False
    onnxruntime, options = loaded
    try:
        onnxruntime.InferenceSession(question, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # its own types, which have no common one
        return bool(_NO_KERNEL.search(str(error)))
    return False


@cache
def _openvino_refuses(question: bytes) -> bool:
    core = openvino_core()
    if core is None:
        return False
    try:
        core.read_model(question)
    except RuntimeError as error:
        return bool(_NO_RULE.search(str(error)))
    return False
