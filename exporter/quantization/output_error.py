"""How far the outputs of a network move when a single activation is quantized, and when everything is."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.graph.onnx_graph import Graph, replace
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import activation_scale, quantize
from convoynet.exporter.running.runtime import inner_session

_NO_ERROR = 1e-30
_CHOICE, _SCALE, _ZERO_POINT = "trial.tensor", "trial.scale", "trial.zero_point"


def output_errors(
    model: onnx.ModelProto, output: str, batches: Sequence[np.ndarray], candidates: Mapping[str, Sequence[Range]]
) -> dict[str, list[float]]:
    """Run the network once for every batch and candidate range, each time with one tensor in UINT8.

    One session serves all of the runs: behind every tensor stands an If that quantizes the one that is asked for.

    Args:
        model: a float graph with one input.
        output: name of the output that is compared with the float graph's.
        batches: arrays of what the graph's input takes.
        candidates: tensor name -> ranges to try.

    Returns:
        Tensor name -> for each of its ranges the sum of squared errors of the output over all images.
    """
    session = inner_session(_on_trial(model, output, list(candidates)), [output])
    name = next(item.name for item in session.get_inputs() if not item.name.startswith("trial."))

    def run(choice: int, scale: np.float32, zero_point: np.uint8) -> list[np.ndarray]:
        feed = {
            _CHOICE: np.array(choice, np.int64),
            _SCALE: np.array(scale, np.float32),
            _ZERO_POINT: np.array(zero_point, np.uint8),
        }
        return [session.run([output], {**feed, name: batch})[0].astype(np.float64) for batch in batches]

    exact = run(-1, np.float32(1), np.uint8(0))
    errors: dict[str, list[float]] = {}
    for index, (tensor, spans) in enumerate(candidates.items()):
        errors[tensor] = []
        for span in spans:
            scale = activation_scale(span, "cpu")
            found = run(index, scale.scale, np.uint8(scale.zero_point))
            errors[tensor].append(sum(float(((a - b) ** 2).sum()) for a, b in zip(found, exact, strict=True)))
    return errors


def joint_errors(
    model: onnx.ModelProto, output: str, batches: Sequence[np.ndarray], plans: Sequence[Mapping[str, Range]]
) -> list[float]:
    """Quantize the network by each plan for both targets, and run it.

    Args:
        model: a float graph with one input.
        output: name of the output that is compared with the float graph's.
        batches: arrays of what the graph's input takes.
        plans: tensor name -> range, for all that `quantize` needs.

    Returns:
        For each plan the geometric mean over both targets of the sum of squared errors of the output.
    """

    def run(graph: onnx.ModelProto) -> list[np.ndarray]:
        session = inner_session(graph, [output])
        (signature,) = session.get_inputs()
        return [session.run([output], {signature.name: batch})[0].astype(np.float64) for batch in batches]

    exact = run(model)

    def error(plan: Mapping[str, Range], target: str) -> float:
        found = run(quantize(model, dict(plan), target))
        # A target that quantizes nothing leaves the choice to the other.
        return max(sum(float(((a - b) ** 2).sum()) for a, b in zip(found, exact, strict=True)), _NO_ERROR)

    return [math.sqrt(math.prod(error(plan, target) for target in ("cpu", "gpu"))) for plan in plans]


def _on_trial(model: onnx.ModelProto, output: str, tensors: list[str]) -> onnx.ModelProto:
    """The same network with inputs that say which of `tensors` to quantize, if any, and how."""
    trial = onnx.ModelProto()
    trial.CopyFrom(model)
    graph = Graph(trial)
    places = {name: index for index, name in enumerate(tensors)}
    nodes = [node for name in graph.inputs if name in places for node in _switch(trial, name, places[name])]
    for node in graph:
        for index, name in enumerate(node.input):
            if name in places:
                node.input[index] = f"{name}.trial"
        nodes += [
            node,
            *(item for name in node.output if name in places for item in _switch(trial, name, places[name])),
        ]
    replace(trial.graph.node, nodes)
    replace(trial.graph.output, [value for value in trial.graph.output if value.name == output])
    trial.graph.input.extend(
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in ((_CHOICE, TensorProto.INT64), (_SCALE, TensorProto.FLOAT), (_ZERO_POINT, TensorProto.UINT8))
    )
    return trial


def _switch(model: onnx.ModelProto, tensor: str, index: int) -> list[onnx.NodeProto]:
    """Nodes that make `tensor`.trial: quantized and back where it is the chosen one, else the tensor itself."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(index, np.int64), f"{tensor}.index"))
    quantized, rounded, kept = (f"{tensor}.{end}" for end in ("quantized", "rounded", "kept"))
    pair = [
        helper.make_node("QuantizeLinear", [tensor, _SCALE, _ZERO_POINT], [quantized]),
        helper.make_node("DequantizeLinear", [quantized, _SCALE, _ZERO_POINT], [rounded]),
    ]
    kept_node = helper.make_node("Identity", [tensor], [kept])
    return [
        helper.make_node("Equal", [_CHOICE, f"{tensor}.index"], [f"{tensor}.chosen"]),
        helper.make_node(
            "If",
            [f"{tensor}.chosen"],
            [f"{tensor}.trial"],
            then_branch=_branch(pair, rounded),
            else_branch=_branch([kept_node], kept),
        ),
    ]


def _branch(nodes: list[onnx.NodeProto], made: str) -> onnx.GraphProto:
    return helper.make_graph(nodes, made, [], [helper.make_tensor_value_info(made, TensorProto.FLOAT, None)])
