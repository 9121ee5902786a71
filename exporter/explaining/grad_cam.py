"""Grad-CAM as an output of the graph: where the evidence for a class lies in the last map of features.

R. R. Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", section
3: the gradient of the class's score at the map, averaged over the places of each channel, weighs the channels; what of
their weighted sum is above zero is the explanation. Where the head is a pool and one fully connected layer this is the
class activation map of B. Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", section 2, up to
the part below zero and the size, and its weights are a row of the layer's; the gradient is written out for other heads.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.explaining.backward import averaged, flattens, gradient, summed
from convoynet.exporter.explaining.feature_map import head_of
from convoynet.exporter.explaining.rules import matrix
from convoynet.exporter.explaining.writer import Writer, require_room
from convoynet.exporter.graph.onnx_from_torch import BATCH_AXIS, OUTPUT_NAME
from convoynet.exporter.graph.onnx_graph import attribute
from convoynet.exporter.outputs_asked import EXPLAIN_CLASS, EXPLANATION, WINNER


def explained(model: onnx.ModelProto, output: str = OUTPUT_NAME) -> onnx.ModelProto:
    """A copy of a graph with the further output "explanation", and the input "explain_class" that may be left out.

    That input, INT64 [batch, 1], has a default in the graph, as ONNX has it: an initializer of its name. Runtimes take
    requests without it, and with it the class of each image whose evidence is wanted. Below 0, as the default is, it
    is the class with the largest score; of a class that there is not every place is NaN.

    The nodes that are there stay as they are, quantized or not, and so do their results; those that are added compute
    in float32.

    Args:
        model: a graph of any precision; it is not changed.
        output: of scores or probabilities, [batch, classes]; of two classes with the same one the first wins.

    Returns:
        A checked graph. Its explanation is [batch, height, width], float32 and nowhere below zero: height and width
        are those of the last map of features, and the scale is Grad-CAM's own.

    Raises:
        BadInput: there is no map of features, or a part of the head has no gradient here; or the graph has such an
            output or input already.
    """
    require_room(model, [EXPLANATION, EXPLAIN_CLASS], EXPLANATION)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    head = head_of(made, output)
    writer = Writer(head, EXPLANATION)
    height, width = head.size
    chosen, unknown = _class(writer)
    weights = writer.add("Unsqueeze", [_weights(writer, chosen), writer.whole(1, 3)])
    # OpenVINO's maps have their channels last: this moves nothing there, and rows of places would move the whole map.
    places = writer.add("Transpose", [writer.value(head.features)], perm=[0, 2, 3, 1])
    evidence = writer.add("Relu", [writer.add("MatMul", [places, weights])])
    evidence = writer.add("Add", [evidence, writer.add("Unsqueeze", [unknown, writer.whole(2, 3)])])
    writer.add("Reshape", [evidence, writer.whole(-1, height, width)], EXPLANATION)
    fixed = head.shapes[output][0]
    shape: list[str | int | None] = [fixed or BATCH_AXIS, height, width]
    made.graph.output.append(helper.make_tensor_value_info(EXPLANATION, TensorProto.FLOAT, shape))
    # An axis of its own: the default is one for all images, and what has an axis's name is of one size everywhere.
    asked: list[str | int | None] = [fixed or "explained", 1]
    made.graph.input.append(helper.make_tensor_value_info(EXPLAIN_CLASS, TensorProto.INT64, asked))
    default = np.full((fixed or 1, 1), WINNER, np.int64)
    made.graph.initializer.append(numpy_helper.from_array(default, EXPLAIN_CLASS))
    onnx.checker.check_model(made)
    return made


def _class(writer: Writer) -> tuple[str, str]:
    """The class of each image that is explained, one that there is; and NaN where another was asked for, else 0.

    Both are [batch, 1]. In float32, which alone the oldest operators have: it has every whole number up to 16 million.
    """
    last = writer.constant(float(writer.head.classes - 1))
    asked = writer.add("Cast", [EXPLAIN_CLASS], to=TensorProto.FLOAT)
    winner = writer.add("Less", [asked, writer.constant(0.0)])
    chosen = writer.add("Where", [winner, _winner(writer), writer.add("Min", [asked, last])])
    above = writer.add("Greater", [asked, last])
    unknown = writer.add("Where", [above, writer.constant(np.nan), writer.constant(0.0)])
    return writer.add("Cast", [chosen], to=TensorProto.INT64), unknown


def _weights(writer: Writer, chosen: str) -> str:
    """The weight of each channel for the chosen class of each image, [batch, channels]."""
    head = writer.head
    last = head.graph.producers.get(head.score)
    rows = matrix(writer, last) if last is not None else None
    alone = last is not None and all(map(writer.is_stored, last.input[2:]))  # a Gemm may add what is computed
    if last is not None and alone and rows is not None and len(rows) == head.classes:
        chosen = writer.add("Reshape", [chosen, writer.whole(-1)])
        if flattens(writer, last.input[0]):
            return averaged(writer, [writer.add("Gather", [writer.constant(summed(head, rows)), chosen], axis=0)])
        return gradient(writer, {last.input[0]: _row(writer, last, chosen)})
    shape = head.shapes[head.score]
    one = writer.add("Equal", [chosen, writer.whole(*range(head.classes))])
    start = writer.add("Cast", [one], to=TensorProto.FLOAT)
    if len(shape) > len(head.shapes[head.output]):
        start = writer.add("Reshape", [start, writer.whole(-1, *(size or 1 for size in shape[1:]))])
    return gradient(writer, {head.score: start})


def _winner(writer: Writer) -> str:
    """The first of the classes with the largest score, [batch, 1], in float32.

    ArgMax is that in ONNX, but not in OpenVINO, which takes another of two that are alike by where the row is in the
    batch. A class there is in any case, so that what is not a number fails nobody else in the batch.
    """
    head = writer.head
    scores = writer.value(head.output)
    largest = writer.add("ReduceMax", [scores, writer.whole(1)], keepdims=1)
    numbers = writer.constant(np.arange(head.classes))
    largest_at = writer.add(
        "Where", [writer.add("Equal", [scores, largest]), numbers, writer.constant(float(head.classes - 1))]
    )
    return writer.add("ReduceMin", [largest_at, writer.whole(1)], keepdims=1)


def _row(writer: Writer, layer: onnx.NodeProto, chosen: str) -> str:
    """The weights of the chosen class, [batch, inputs of the layer]."""
    axis = int(not attribute(layer, "transB", 0))
    stored = writer.integers(layer.input[1], axis)
    if stored is None:
        rows = writer.row(layer.input[1], axis, chosen)
    else:  # those of the other classes are not made numbers
        integers, scales = (
            writer.add("Gather", [name, chosen], axis=at) for name, at in zip(stored, (axis, 0), strict=True)
        )
        scale = scales if axis else writer.add("Unsqueeze", [scales, writer.whole(1)])
        rows = writer.add("Mul", [writer.add("Cast", [integers], to=TensorProto.FLOAT), scale])
        if axis:
            rows = writer.add("Transpose", [rows], perm=[1, 0])
    factor = attribute(layer, "alpha", 1.0)
    return rows if factor == 1 else writer.add("Mul", [rows, writer.constant(factor)])
