"""PyTorch networks to ONNX: one file, one input, one output, a dynamic batch, and nothing else."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from exporter.errors import BadInput
from exporter.images import Preprocess
from exporter.onnx_graph import Graph, attribute, replace, shapes

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
BATCH_AXIS = "batch"
# The exporter silently writes 18 for anything older; 25 is the newest that TensorRT 11 reads.
OPSETS = range(18, 26)

# A protobuf message cannot be larger; the margin is for everything but the weights.
_MAX_BYTES = 2**31 - 2**22
_MAX_REASON = 200


def onnx_from_torch(
    model: torch.nn.Module,
    preprocess: Preprocess,
    *,
    uint8_input: bool,
    opset: int = 20,
    outputs: Sequence[str] = (OUTPUT_NAME,),
) -> onnx.ModelProto:
    """Export a network with `torch.export`, BatchNorm folded into the convolutions before it.

    Args:
        model: a module from float32 [batch, C, H, W] to logits [batch, classes] or [batch, classes, H, W], or to a
            tuple of as many tensors as `outputs` has names, each with the batch first. It is exported in evaluation
            mode and keeps its own mode.
        preprocess: gives C, H and W and, for `uint8_input`, the normalisation.
        uint8_input: the graph takes pixels, uint8 [batch, H, W, C], and normalises them itself; otherwise it takes
            float32 [batch, C, H, W].
        opset: version of the ONNX operators, 18 to 25.
        outputs: names of the graph's outputs, in the order of the module's.

    Returns:
        A checked model with the input "input", these outputs and the dynamic axis "batch". It holds its
        weights itself and no trace of the machine that made it.

    Raises:
        BadInput: the opset is unknown, the network cannot be traced or has several outputs, or it is too large for
            one ONNX file (2 GB).
    """
    if opset not in OPSETS:
        raise BadInput(f"opset {opset}: use {OPSETS.start} to {OPSETS.stop - 1}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        raise BadInput(
            f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds less than 2: use fewer classes"
        )
    exported = _export(model, preprocess, opset, outputs)
    if len(exported.graph.output) != len(outputs):
        wanted = "the logits alone" if tuple(outputs) == (OUTPUT_NAME,) else ", ".join(outputs)
        raise BadInput(f"the network returns {len(exported.graph.output)} tensors: it must return {wanted}")
    _strip(exported)
    _remove_no_ops(exported)
    _pool_globally(exported)
    if uint8_input:
        _take_pixels(exported, preprocess)
    _drop_stale_shapes(exported)
    onnx.checker.check_model(exported)
    return exported


def _export(model: torch.nn.Module, preprocess: Preprocess, opset: int, outputs: Sequence[str]) -> onnx.ModelProto:
    training = model.training
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    # Two images: in older versions of torch an example of one makes the axis static.
    example = torch.zeros(2, preprocess.channels, *preprocess.size, device=device)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                model.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim(BATCH_AXIS, min=1)},),
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:_MAX_REASON]
        raise BadInput(f"the network cannot be exported to ONNX: {reason}") from error
    finally:
        model.train(training)
    if program is None:
        raise BadInput("the network cannot be exported to ONNX: the exporter returned nothing")
    return program.model_proto


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings and log lines, which are about its own workings, from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces and other notes: they name files of the machine that exports, and differ between runs."""
    graph = model.graph
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def _remove_no_ops(model: onnx.ModelProto) -> None:
    """Remove nodes that return what they are given, and those that nothing reads."""
    graph = Graph(model)
    removed = []
    for node in graph:
        source, target = (node.input[0] if node.input else ""), node.output[0]
        if not _is_no_op(node) or (target in graph.outputs and source not in graph.producers):
            continue
        if target in graph.outputs:
            producer = graph.producers[source]
            producer.output[list(producer.output).index(source)] = target
            source, target = target, source
        graph.rewire(target, source)
        graph.refresh()
        removed.append(node)
    graph.remove(removed)
    while unread := [n for n in graph if not any(o in graph.readings or o in graph.outputs for o in n.output)]:
        graph.remove(unread)


def _is_no_op(node: onnx.NodeProto) -> bool:
    if node.op_type in {"Identity", "Dropout"}:
        return True
    if node.op_type not in {"AveragePool", "MaxPool"} or len(node.output) > 1:
        return False
    ones = {*attribute(node, "kernel_shape", []), *attribute(node, "strides", [1])} == {1}
    return ones and not any(attribute(node, "pads", []))


def _pool_globally(model: onnx.ModelProto) -> None:
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


def _take_pixels(model: onnx.ModelProto, preprocess: Preprocess) -> None:
    """Put the normalisation in front of the graph: uint8 NHWC in, one multiply and one add per channel.

    The cast comes before the transpose because TensorRT takes UINT8 for a network's input and for a cast alone.
    In the graph and not in a torch wrapper: with a permuted input `torch.export` makes every activation
    channels-last and writes as_strided, a dozen nodes, for each flattening.
    """
    mean = np.asarray(preprocess.mean, np.float64)
    std = np.asarray(preprocess.std, np.float64)
    graph = Graph(model)
    normalized = "normalized"
    graph.rewire(INPUT_NAME, normalized)
    for name, values in (("pixel_scale", 1 / (255 * std)), ("pixel_shift", -mean / std)):
        per_channel = values.astype(np.float32).reshape(1, -1, 1, 1)
        model.graph.initializer.append(numpy_helper.from_array(per_channel, name))
    steps = [
        helper.make_node("Cast", [INPUT_NAME], ["pixels"], name="pixels", to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["channels_first"], name="channels_first", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["channels_first", "pixel_scale"], ["scaled"], name="scaled"),
        helper.make_node("Add", ["scaled", "pixel_shift"], [normalized], name=normalized),
    ]
    replace(model.graph.node, [*steps, *model.graph.node])
    shape: list[str | int | None] = [BATCH_AXIS, *preprocess.size, preprocess.channels]
    replace(model.graph.input, [helper.make_tensor_value_info(INPUT_NAME, onnx.TensorProto.UINT8, shape)])


def _drop_stale_shapes(model: onnx.ModelProto) -> None:
    made = {name for node in model.graph.node for name in node.output}
    replace(model.graph.value_info, [value for value in model.graph.value_info if value.name in made])
