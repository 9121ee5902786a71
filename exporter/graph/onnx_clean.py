"""Clean-up of exported graphs: named passes that leave what is computed as it is, up to float rounding.

Each pass rewrites a float graph in place and leaves what it does not recognise alone. Its patterns are those that
`torch.export` writes for the networks of the zoo.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from convoynet.exporter.graph.layer_names import name_layers
from convoynet.exporter.graph.onnx_graph import Graph, attribute, replace, shapes

Pass = Callable[[onnx.ModelProto], None]
OnPass = Callable[[str, onnx.ModelProto], None]

_FIVE_DIMENSIONAL = 5


def clean(model: onnx.ModelProto, on_pass: OnPass | None = None) -> None:
    """Run every pass of `PASSES` on `model`, in their order.

    Args:
        model: a float graph; it is changed.
        on_pass: called with the name of each pass and the graph that it left, which is valid and not to be changed:
            what measures the parity of every step hooks in here.
    """
    for name, run in PASSES.items():
        run(model)
        _drop_stale_shapes(model)
        if on_pass is not None:
            on_pass(name, model)


def remove_no_ops(model: onnx.ModelProto) -> None:
    """Remove nodes that return what they are given, and those that nothing reads."""
    graph = Graph(model)
    removed = []
    for node in graph:
        source, target = (node.input[0] if node.input else ""), node.output[0]
        if not _is_no_op(node) or any(name in graph.readings for name in node.output[1:]):
            continue
        if target in graph.outputs and (source not in graph.producers or source in graph.outputs):
            continue  # an output needs a node that makes it, and one tensor cannot have two names
        if target in graph.outputs:
            _rename(graph.producers[source], source, target)
            source, target = target, source
        graph.rewire(target, source)
        graph.refresh()
        removed.append(node)
    graph.remove(removed)
    graph.drop_unread()


def _is_no_op(node: onnx.NodeProto) -> bool:
    if node.op_type in {"Identity", "Dropout"}:
        return True
    if node.op_type not in {"AveragePool", "MaxPool"} or len(node.output) > 1:
        return False
    ones = {*attribute(node, "kernel_shape", []), *attribute(node, "strides", [1])} == {1}
    return ones and not any(attribute(node, "pads", []))


def name_response_norms(model: onnx.ModelProto) -> None:
    """Write the eight nodes of a local response normalisation as the one operator LRN.

    TensorRT has a layer for it; ONNX Runtime takes as long as for the eight, or a tenth longer (AlexNet). PyTorch's and
    ONNX's alpha both multiply the mean of the squares, zeros beyond the first and the last channel included. Where the
    window has an even size, PyTorch puts the extra channel before and ONNX behind: those stay as they are.
    """
    graph = Graph(model)
    known = shapes(model)
    found: list[onnx.NodeProto] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph:
        chain = _response_norm(graph, node, known.get(node.input[0], ()) if node.input else ())
        if chain is None:
            nodes.append(node)
            continue
        inner, constants = chain
        found += inner
        nodes.append(helper.make_node("LRN", [node.input[0]], [node.output[0]], name=node.name, **constants))
    replace(model.graph.node, nodes)
    graph.refresh()
    if found:
        made = {node.output[0] for node in found}
        graph.remove([node for node in graph if node.output[0] in made])


def _response_norm(
    graph: Graph, node: onnx.NodeProto, shape: tuple[int | None, ...]
) -> tuple[list[onnx.NodeProto], dict[str, Any]] | None:
    """The nodes before `node` that, with it, are x / (bias + alpha * mean(x^2))^beta, and the attributes of an LRN."""
    if node.op_type != "Div" or len(shape) != 4 or None in shape[1:]:
        return None
    inner: list[onnx.NodeProto] = []
    values: dict[str, Any] = {}
    tensor = node.input[1]
    for operator, name in (("Pow", "beta"), ("Add", "bias"), ("Mul", "alpha")):
        step = _only_reading(graph, tensor, operator)
        number = None if step is None else _scalar_operand(graph, step)
        if step is None or number is None:
            return None
        inner.append(step)
        tensor, values[name] = number
    for operator in ("Squeeze", "AveragePool", "Pad", "Reshape", "Mul"):
        step = _only_reading(graph, tensor, operator)
        if step is None:
            return None
        inner.append(step)
        tensor = step.input[0]
    *_, squeeze, pool, pad, reshape, square = inner
    size = _window(graph, pool, pad)
    if size is None or _integers(graph, squeeze, 1) != [1] or _integers(graph, reshape, 1) != [-1, 1, *shape[1:]]:
        return None
    if list(square.input) != [node.input[0]] * 2:
        return None
    return inner, {"size": size, **values}


def _only_reading(graph: Graph, tensor: str, operator: str) -> onnx.NodeProto | None:
    """The node that makes `tensor`, where it is an `operator` and one other node alone reads the tensor."""
    if graph.producer_type(tensor) != operator or len(graph.readings[tensor]) != 1 or tensor in graph.outputs:
        return None
    return graph.producers[tensor]


def _scalar_operand(graph: Graph, node: onnx.NodeProto) -> tuple[str, float] | None:
    """The activation and the stored number that a node combines; of a Pow the number must be the exponent."""
    pairs = [(node.input[0], node.input[1])]
    if node.op_type != "Pow":
        pairs.append((node.input[1], node.input[0]))
    for tensor, constant in pairs:
        if graph.is_constant(constant) and not graph.is_constant(tensor) and graph.constant(constant).size == 1:
            return tensor, float(graph.constant(constant).item())
    return None


def _window(graph: Graph, pool: onnx.NodeProto, pad: onnx.NodeProto) -> int | None:
    """The number of channels that a pool over N x 1 x C x H x W, padded with zeros, has the mean of, if it is odd."""
    size, *others = attribute(pool, "kernel_shape", [0])
    if len(others) != 2 or {*others, *attribute(pool, "strides", [1]), *attribute(pool, "dilations", [1])} != {1}:
        return None
    if any(attribute(pool, "pads", [])) or attribute(pool, "auto_pad", b"NOTSET") not in {b"NOTSET", b"VALID"}:
        return None
    if attribute(pad, "mode", b"constant") != b"constant" or len(pad.input) > 3:
        return None
    if any(name and (not graph.is_constant(name) or graph.constant(name).any()) for name in pad.input[2:]):
        return None
    around = [0] * 2 * _FIVE_DIMENSIONAL
    around[2] = around[2 + _FIVE_DIMENSIONAL] = size // 2
    return int(size) if size % 2 and _integers(graph, pad, 1) == around else None


def _integers(graph: Graph, node: onnx.NodeProto, index: int) -> list[int] | None:
    if len(node.input) <= index or not graph.is_constant(node.input[index]):
        return None
    return [int(value) for value in graph.constant(node.input[index]).ravel()]


def fold_batch_norms(model: onnx.ModelProto) -> None:
    """Move every batch normalisation, an affine step of each channel, into the layer before it or the one behind.

    Before: a Conv, ConvTranspose or Gemm whose result nothing else reads. Behind: a Conv, the only reader, that pads
    nothing, since padding comes after the normalisation and is not moved by it. Others, as DenseNet's between a Concat
    and a ReLU, stay: as Mul and Add they take ONNX Runtime longer.
    """
    graph = Graph(model)
    for name in [node.output[0] for node in graph if node.op_type == "BatchNormalization"]:
        node = graph.producers[name]  # by name: every removal copies the nodes
        affine = _affine(graph, node)
        if affine is None:
            continue
        before = _layer_before(graph, node)
        if before is not None:
            weights, bias = _scaled_results(graph, before, *affine)
            _set_weights(graph, before, node.output[0], weights, bias)
            if node.output[0] in graph.outputs:
                _rename(before, node.input[0], node.output[0])
            else:
                graph.rewire(node.output[0], node.input[0])
        else:
            behind = _layer_behind(graph, node)
            if behind is None:
                continue
            weights, bias = _scaled_inputs(graph, behind, *affine)
            _set_weights(graph, behind, node.output[0], weights, bias)
            behind.input[0] = node.input[0]
        graph.remove([node])


def is_foldable(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether `fold_batch_norms` would move this BatchNormalization; no weights are read."""
    if not _is_affine(graph, node):
        return False
    return _layer_before(graph, node) is not None or _layer_behind(graph, node) is not None


def _is_affine(graph: Graph, node: onnx.NodeProto) -> bool:
    return not attribute(node, "training_mode", 0) and all(graph.is_constant(name) for name in node.input[1:5])


def _affine(graph: Graph, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
    """The factor and the summand of each channel, float64; None where they are no constants."""
    if not _is_affine(graph, node):
        return None
    scale, shift, mean, variance = (graph.constant(name).astype(np.float64) for name in node.input[1:5])
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return factor, shift - mean * factor


def _layer_before(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    layers = (_only_reading(graph, node.input[0], operator) for operator in ("Conv", "ConvTranspose", "Gemm"))
    return next((layer for layer in layers if layer is not None and _is_plain(graph, layer)), None)


def _layer_behind(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    readings = graph.readings.get(node.output[0], [])
    if len(readings) != 1 or readings[0].index != 0 or node.output[0] in graph.outputs:
        return None
    layer = graph.producers[readings[0].reader]
    if layer.op_type != "Conv" or not _is_plain(graph, layer):
        return None
    pads = any(attribute(layer, "pads", [])) or attribute(layer, "auto_pad", b"NOTSET") not in {b"NOTSET", b"VALID"}
    return None if pads else layer


def _is_plain(graph: Graph, layer: onnx.NodeProto) -> bool:
    """Whether weights and bias are stored, one number of the bias for each channel, and nothing else is computed."""
    if not all(graph.is_constant(name) for name in layer.input[1:] if name):
        return False
    if layer.op_type != "Gemm":
        return True
    if len(layer.input) > 2 and layer.input[2]:
        weights, bias = (graph.initializers[name].dims for name in layer.input[1:3])
        if list(bias) != [weights[0 if attribute(layer, "transB", 0) else 1]]:
            return False
    return attribute(layer, "alpha", 1.0) == attribute(layer, "beta", 1.0) == 1.0 and not attribute(layer, "transA", 0)


def _scaled_results(
    graph: Graph, layer: onnx.NodeProto, factor: np.ndarray, summand: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias, float64, of the layer that computes factor * result + summand."""
    weights = graph.constant(layer.input[1]).astype(np.float64)
    moved = _bias(graph, layer, len(factor)) * factor + summand
    if layer.op_type == "ConvTranspose":  # inputs x outputs of a group x kernel; the groups divide the inputs
        groups = int(attribute(layer, "group", 1))
        parts = weights.reshape(groups, -1, *weights.shape[1:])
        scaled = parts * factor.reshape(groups, 1, weights.shape[1], *[1] * (weights.ndim - 2))
        return scaled.reshape(weights.shape), moved
    axis = 0 if layer.op_type == "Conv" or attribute(layer, "transB", 0) else 1
    along = np.moveaxis(weights, axis, -1) * factor
    return np.moveaxis(along, -1, axis), moved


def _scaled_inputs(
    graph: Graph, layer: onnx.NodeProto, factor: np.ndarray, summand: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias, float64, of the Conv that takes factor * input + summand."""
    weights = graph.constant(layer.input[1]).astype(np.float64)  # outputs x inputs of a group x kernel
    groups = int(attribute(layer, "group", 1))
    # For each output the input channels of its group.
    inputs = np.arange(len(factor)).reshape(groups, -1).repeat(len(weights) // groups, axis=0)
    moved = weights.reshape(*weights.shape[:2], -1).sum(-1) * summand[inputs]
    per_weight = factor[inputs].reshape(*weights.shape[:2], *[1] * (weights.ndim - 2))
    return weights * per_weight, _bias(graph, layer, len(weights)) + moved.sum(1)


def _bias(graph: Graph, layer: onnx.NodeProto, channels: int) -> np.ndarray:
    if len(layer.input) < 3 or not layer.input[2]:
        return np.zeros(channels)
    return graph.constant(layer.input[2]).astype(np.float64)


def _set_weights(graph: Graph, layer: onnx.NodeProto, norm: str, weights: np.ndarray, bias: np.ndarray) -> None:
    """Store weights and bias under new names, after the normalisation: another layer may share the old ones."""
    names = [f"{norm}.folded.weight", f"{norm}.folded.bias"]
    for name, values in zip(names, (weights, bias), strict=True):
        stored = np.ascontiguousarray(values, np.float32)
        graph.model.graph.initializer.append(numpy_helper.from_array(stored, name))
    replace(layer.input, [layer.input[0], *names])


def pool_globally(model: onnx.ModelProto) -> None:
    """Write the mean over both spatial axes as GlobalAveragePool.

    ONNX Runtime has an integer kernel for GlobalAveragePool and none for ReduceMean; TensorRT reads both alike.
    """
    graph = Graph(model)
    known = shapes(model)
    nodes = []
    for node in graph:
        if not _is_spatial_mean(graph, node, len(known.get(node.input[0], ())) if node.input else 0):
            nodes.append(node)
            continue
        source, target = node.input[0], node.output[0]
        if attribute(node, "keepdims", 1):
            nodes.append(helper.make_node("GlobalAveragePool", [source], [target], name=node.name))
        else:
            pooled = f"{target}.pooled"
            nodes.append(helper.make_node("GlobalAveragePool", [source], [pooled], name=node.name))
            nodes.append(helper.make_node("Flatten", [pooled], [target], name=f"{node.name}.flatten", axis=1))
    replace(model.graph.node, nodes)
    graph.refresh()
    graph.drop_unused_constants()


def _is_spatial_mean(graph: Graph, node: onnx.NodeProto, rank: int) -> bool:
    if node.op_type != "ReduceMean" or rank != 4 or len(node.input) != 2 or not graph.is_constant(node.input[1]):
        return False
    return sorted(int(axis) % rank for axis in graph.constant(node.input[1])) == [2, 3]


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    node.output[list(node.output).index(old)] = new


def _drop_stale_shapes(model: onnx.ModelProto) -> None:
    made = {name for node in model.graph.node for name in node.output}
    replace(model.graph.value_info, [value for value in model.graph.value_info if value.name in made])


PASSES: Mapping[str, Pass] = MappingProxyType(
    {
        "layer names": name_layers,
        "no-ops": remove_no_ops,
        "response norms": name_response_norms,
        "batch norms": fold_batch_norms,
        "global pools": pool_globally,
    }
)
