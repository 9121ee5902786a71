"""A given ONNX graph to the one that is published: the names, input and outputs that all exported graphs have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, short_reason
from convoynet.exporter.graph.onnx_clean import OnPass, clean
from convoynet.exporter.graph.onnx_from_torch import (
    BATCH_AXIS,
    CLASSES_NAME,
    INPUT_NAME,
    add_classes,
    set_apart,
    take_pixels,
)
from convoynet.exporter.graph.onnx_given import GivenGraph, opset_of
from convoynet.exporter.graph.onnx_graph import (
    CUTS_ABOVE,
    CUTS_BELOW,
    Graph,
    all_nodes,
    attribute,
    bodies_of,
    replace,
    see_through,
)
from convoynet.exporter.outputs_asked import EXPLAIN_CLASS, EXPLANATION, FEATURES

# What graphs of ours, and later steps, call tensors of their own.
_TAKEN = (
    "pixels", "channels_first", "scaled", "normalized", "pixel_scale", "pixel_shift", f"{CLASSES_NAME}.int64",
    EXPLANATION, EXPLAIN_CLASS, FEATURES,
)  # fmt: skip
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_PIXEL = 255.0


def onnx_from_given(  # noqa: PLR0913  what is exported, and how each side of it is called
    given: GivenGraph,
    outputs: Mapping[str, tuple[str, Sequence[int]]],
    preprocess: Preprocess,
    *,
    uint8_input: bool,
    opset: int = 0,
    task: str = "classification",
    on_pass: OnPass | None = None,
) -> onnx.ModelProto:
    """Make of a given graph what `onnx_from_torch` makes of a network.

    A float graph is cleaned; one that is quantized already, or has control flow, keeps its operators.

    Args:
        given: the graph; its batch axis is open, or it takes one image at a time.
        outputs: name in the given graph -> name of ours, and the shape of one row; the first is what the task is about.
        preprocess: gives C, H and W and, for `uint8_input`, the normalisation.
        uint8_input: as for `onnx_from_torch`.
        opset: the least version of the ONNX operators; a newer graph keeps its own.
        task: as there.
        on_pass: as there.

    Raises:
        BadInput: the operators cannot be brought to that version.
    """
    model = _of_opset(given, opset)
    ours = {INPUT_NAME, CLASSES_NAME, *_TAKEN, *(name for name, _ in outputs.values())}
    named = _free_names(model, ours, [given.input, *outputs])
    raw = given.takes_pixels and uint8_input
    # What a body within reads goes by its name.
    plain = not any(bodies_of(node) for node in model.graph.node)
    _head(model, given, preprocess, raw=raw)
    _tail(model, {named[old]: told for old, told in outputs.items()})
    if plain:
        Graph(model).drop_unread()
    for item in [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]:
        item.ClearField("metadata_props")
        if not (isinstance(item, onnx.NodeProto) and {CUTS_BELOW, CUTS_ABOVE} & {*item.doc_string.split("; ")}):
            item.ClearField("doc_string")
    _state_kernels(model)
    if on_pass is not None:
        on_pass("given", model)
    if plain and not given.quantized:
        clean(model, on_pass)
    if uint8_input and not raw:
        take_pixels(model, preprocess)
    if plain:
        _cancel_transposes(model)
    set_apart(model, [name for name, _ in outputs.values()])
    if task == "segmentation":
        add_classes(model)
    for value in [*model.graph.input, *model.graph.output] if given.batch else []:
        value.type.tensor_type.shape.dim[0].dim_value = given.batch or 0
    onnx.checker.check_model(model)
    return model


def _state_kernels(model: onnx.ModelProto) -> None:
    """State the kernel's size where a convolution leaves it to its weights, as ONNX lets it."""
    sizes = {tensor.name: list(tensor.dims[2:]) for tensor in model.graph.initializer}
    for node in model.graph.node:
        left = node.op_type in {"Conv", "ConvTranspose"} and attribute(node, "kernel_shape", None) is None
        if left and (size := sizes.get(node.input[1])):
            node.attribute.append(helper.make_attribute("kernel_shape", size))


def _of_opset(given: GivenGraph, opset: int) -> onnx.ModelProto:
    model = onnx.ModelProto()
    if given.opset >= opset:
        model.CopyFrom(given.model)
        return model
    try:
        model.CopyFrom(version_converter.convert_version(given.model, opset))
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise BadInput(
            f"{given.path} has opset {given.opset}, what is asked needs {opset}, and ONNX's converter does not bring "
            f"it there ({short_reason(error)}): export it again with a newer opset, or leave out what needs it"
        ) from error
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True))
    see_through(model)  # the converter states axes by Constant nodes
    if opset_of(model) < opset:
        raise BadInput(f"{given.path} stays at opset {opset_of(model)}, and what is asked needs {opset}")
    return model


def _free_names(model: onnx.ModelProto, ours: set[str], ends: Sequence[str]) -> dict[str, str]:
    """Rename what has a name of ours, and the ends of the graph; returns old name -> new name."""
    used = {name for node in all_nodes(model.graph) for name in (*node.input, *node.output)}
    used |= {tensor.name for tensor in model.graph.initializer}
    names = {name: f"{name}.given" for name in sorted({*(used & ours), *ends})}
    while taken := {new for new in names.values() if new in used}:
        names = {old: f"{new}.given" if new in taken else new for old, new in names.items()}
    _rename(model.graph, names)
    return names


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """In a graph and those within it, whose own names may not be the same as any outside."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for body in bodies_of(node):
            _rename(body, names)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _head(model: onnx.ModelProto, given: GivenGraph, preprocess: Preprocess, *, raw: bool) -> None:
    """Let the graph take what ours take: float32 [batch, C, H, W], or for `raw` pixels [batch, H, W, C]."""
    (value,) = model.graph.input
    target = value.name
    nodes: list[onnx.NodeProto] = []
    last = INPUT_NAME

    def add(operator: str, name: str, *more: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(operator, [last, *more], [f"{target}.{name}"], **attributes))
        last = f"{target}.{name}"

    if given.takes_pixels and not raw:
        model.graph.initializer.append(numpy_helper.from_array(np.array(_PIXEL, np.float32), f"{target}.most"))
        add("Mul", "scaled", f"{target}.most")
        add("Round", "rounded")
    if given.kind != TensorProto.FLOAT and not raw:
        add("Cast", "cast", to=given.kind)
    if given.channels_last != raw:
        add("Transpose", "transposed", perm=_TO_LAST if given.channels_last else _TO_FIRST)
    if nodes:
        nodes[-1].output[0] = target
        replace(model.graph.node, [*nodes, *model.graph.node])
    else:
        _rename(model.graph, {target: INPUT_NAME})
    (height, width), channels = preprocess.size, preprocess.channels
    batch = BATCH_AXIS if given.batch is None else given.batch
    shape = [batch, height, width, channels] if raw else [batch, channels, height, width]
    kind = TensorProto.UINT8 if raw else TensorProto.FLOAT
    replace(model.graph.input, [helper.make_tensor_value_info(INPUT_NAME, kind, shape)])
    # Those that stand there may be of other sizes.
    del model.graph.value_info[:]


def _tail(model: onnx.ModelProto, outputs: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Let the graph return the outputs that are asked for, as float32 rows or maps."""
    values = {value.name: value for value in model.graph.output}
    made = []
    for old, (name, row) in outputs.items():
        value = values[old]
        last, rank = value.name, len(value.type.tensor_type.shape.dim)
        nodes: list[tuple[str, list[str], dict[str, Any]]] = []
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            nodes.append(("Cast", [], {"to": TensorProto.FLOAT}))
        if rank != len(row) + 1:
            shape = f"{value.name}.shape"
            model.graph.initializer.append(numpy_helper.from_array(np.array([-1, *row], np.int64), shape))
            nodes.append(("Reshape", [shape], {}))
        nodes = nodes or [("Identity", [], {})]
        for index, (operator, more, attributes) in enumerate(nodes):
            result = name if index == len(nodes) - 1 else f"{value.name}.{index}"
            made.append(helper.make_node(operator, [last, *more], [result], name=result, **attributes))
            last = result
    model.graph.node.extend(made)
    kind = TensorProto.FLOAT
    rows = [helper.make_tensor_value_info(name, kind, [BATCH_AXIS, *row]) for name, row in outputs.values()]
    replace(model.graph.output, rows)


def _cancel_transposes(model: onnx.ModelProto) -> None:
    """Remove a transposition and the one behind it that takes it back."""
    graph = Graph(model)
    for node in list(graph):
        before = graph.producers.get(node.input[0]) if node.op_type == "Transpose" else None
        if before is None or before.op_type != "Transpose" or node.output[0] in graph.outputs:
            continue
        first, second = list(attribute(before, "perm", [])), list(attribute(node, "perm", []))
        if first and [first[axis] for axis in second] == sorted(first):
            graph.rewire(node.output[0], before.input[0])
            graph.remove([node])
    graph.drop_unread()
