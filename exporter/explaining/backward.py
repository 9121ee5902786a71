"""The gradient of a score at the map of features as ONNX nodes: reverse-mode differentiation of the head alone."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.feature_map import WHOLE, Head
from convoynet.exporter.explaining.rules import PLACES, ROW_RANK, RULES, axes_of, cuts, matrix, no_rule, shape_of
from convoynet.exporter.explaining.writer import Writer
from convoynet.exporter.graph.onnx_graph import attribute, captured

# Layers that add up products of integers, which are no shapes.
_OF_INTEGERS = ("MatMulInteger", "ConvInteger")
# What is between a map and a fully connected layer that reads all of it.
_FLATTENING = ("Reshape", "Flatten", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear")


def gradient(writer: Writer, start: Mapping[str, str]) -> str:
    """The gradient at the map of features, averaged over its places: [batch, channels], the weights of Grad-CAM.

    Args:
        writer: of the graph.
        start: gradients that are there already, by their tensors: the score's, or that of what it is made from.

    Raises:
        BadInput: the head has an operator without a rule, or uses one in another way, or lets no gradient through.
    """
    head = writer.head
    found = dict(start)
    sums: list[str] = []
    for node in reversed(head.nodes):
        if node.output[0] not in found:
            continue
        at = found.pop(node.output[0])
        if not all(map(writer.is_stored, captured(node))):
            raise no_rule(node)
        for index, name in enumerate(node.input):
            if not name or writer.is_stored(name):
                continue
            if head.types.get(name) in WHOLE:
                if head.graph.producer_type(name) in _OF_INTEGERS:
                    raise no_rule(head.graph.producers[name])
                continue
            if name == head.source:
                sums.append(_summed(writer, node, index, at))
            elif index == 0 and flattens(writer, name) and (weights := matrix(writer, node)) is not None:
                sums.append(writer.add("MatMul", [at, writer.constant(summed(head, weights))]))
            else:
                passed = _passed(writer, node, index, at)
                found[name] = writer.add("Add", [found[name], passed]) if name in found else passed
    if not sums:
        raise BadInput(
            f"the scores {head.score!r} have no gradient at the map of features {head.features!r}: what is between the "
            "two compares or counts, and an explanation says which features the scores hang on"
        )
    return averaged(writer, sums)


def averaged(writer: Writer, sums: Sequence[str]) -> str:
    """Sums over the places of the map as the mean of all."""
    height, width = writer.head.size
    total = sums[0] if len(sums) == 1 else writer.add("Sum", sums)
    return writer.add("Mul", [total, writer.constant(1 / (height * width))])


def _passed(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None or len(node.output) > 1:
        raise no_rule(node)
    return rule(writer, node, index, at)


def _summed(writer: Writer, node: onnx.NodeProto, index: int, at: str) -> str:
    """The gradient at the map of features through one reader of it, summed over the places of the map.

    A pool hands each gradient on to places of which it does not matter which they are.
    """
    kind = node.op_type
    pool = kind in ("GlobalAveragePool", "GlobalMaxPool", "MaxPool") or (kind == "AveragePool" and not _padded(node))
    if pool or (kind in ("ReduceMean", "ReduceMax") and axes_of(writer, node) == PLACES):
        shape = shape_of(writer, node.output[0])
        if len(shape) == ROW_RANK:
            return at
        if all(shape[axis] == 1 for axis in PLACES):  # a sum of one: as a sum it would cost OpenVINO more than the map
            return writer.add("Reshape", [at, writer.whole(-1, writer.head.channels)])
        return writer.add("ReduceSum", [at, writer.whole(*PLACES)], keepdims=0)
    return writer.add("ReduceSum", [_passed(writer, node, index, at), writer.whole(*PLACES)], keepdims=0)


def _padded(node: onnx.NodeProto) -> bool:
    """Whether an average may be over places that are none of the map: these keep a share of the gradient."""
    if not attribute(node, "count_include_pad", 0):
        return False
    own = attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
    return own or any(attribute(node, "pads", [])) or bool(attribute(node, "ceil_mode", 0))


def flattens(writer: Writer, tensor: str) -> bool:
    """Whether a tensor is the map of features as rows, [batch, channels * height * width], read nowhere else so."""
    head = writer.head
    height, width = head.size
    if list(shape_of(writer, tensor))[1:] != [head.channels * height * width]:
        return False
    while tensor != head.source:
        node = head.graph.producers.get(tensor)
        if node is None or len(head.graph.readings[tensor]) > 1:
            return False
        if node.op_type not in _FLATTENING and not _keeps_all(writer, node):
            return False
        if node.op_type == "QuantizeLinear" and any(cuts(writer, node)):
            return False
        tensor = node.input[0]
    return True


def _keeps_all(writer: Writer, node: onnx.NodeProto) -> bool:
    """Whether it is a Max with the least number, which changes nothing."""
    if node.op_type != "Max":
        return False
    bounds = [writer.known(name) for name in node.input[1:]]
    return all(bound is not None and (bound <= np.finfo(np.float16).min).all() for bound in bounds)


def summed(head: Head, weights: np.ndarray) -> np.ndarray:
    """Weights of a layer that reads the map as rows, added up over its places: [outputs, channels].

    Of the 411 MB of VGG's a forty-ninth is left, and no gradient at the map itself has to be made.
    """
    height, width = head.size
    added: np.ndarray = weights.reshape(len(weights), head.channels, height * width).sum(axis=2)
    return added
