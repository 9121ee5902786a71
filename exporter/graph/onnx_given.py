"""ONNX files of other exporters, read as networks that take images, and brought to the form that ours have."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph, all_nodes, bodies_of, see_through
from convoynet.exporter.graph.onnx_graph import replace as set_items
from convoynet.exporter.graph.onnx_read import read_model, reading, tensors

# A protobuf message cannot be larger; the margin is for everything but the weights.
_MAX_BYTES = 2**31 - 2**22
_CHANNELS = (1, 3)
_HALF = TensorProto.FLOAT16
_INPUTS = (TensorProto.FLOAT, _HALF, TensorProto.UINT8)
_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
    | {"QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm", "DynamicQuantizeMatMul"}
)


@dataclass(frozen=True)
class GivenGraph:
    """A graph that takes images, in the form that later steps expect: no functions, constants stored, inputs alone.

    Attributes:
        path: the file.
        model: the graph.
        input: name of the one input.
        kind: its element type.
        channels_last: whether it takes [batch, H, W, C].
        batch: how many images it takes at a time; None for any number.
        channels: of an image, 1 or 3; None where the file leaves it open.
        size: (height, width); None along an axis that the file leaves open.
        quantized: the first operator that says that it is quantized already; empty where it is not.
        stated: the element type of the input as the file has it.
        widened: whether its float16 numbers became float32.
    """

    path: Path
    model: onnx.ModelProto
    input: str
    kind: int
    channels_last: bool
    batch: int | None
    channels: int | None
    size: tuple[int | None, int | None]
    stated: int
    quantized: str = ""
    widened: bool = False

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes uint8 pixels and normalises them itself."""
        return self.kind == TensorProto.UINT8

    @property
    def outputs(self) -> list[str]:
        """The names of its outputs."""
        return [value.name for value in self.model.graph.output]

    @property
    def opset(self) -> int:
        """Its operator set."""
        return opset_of(self.model)

    @property
    def made_by(self) -> str:
        """What the file says of who wrote it."""
        producer = " ".join(filter(None, (self.model.producer_name, self.model.producer_version)))
        return f"opset {self.opset}{f', by {producer}' if producer else ''}"


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 0)


def read_given(path: Path) -> GivenGraph:
    """Read a file, with the weights that lie in others beside it.

    Raises:
        BadInput: it is no valid ONNX model, takes something else than images, or is too large to be published as one
            file.
    """
    light = read_model(path, weights=False)
    size = sum(_bytes(tensor) for tensor in tensors(light.graph))
    if size > _MAX_BYTES:
        raise BadInput(
            f"{path}: its weights take {size / 2**30:.1f} GiB, and one ONNX file holds less than 2; `convoy serve "
            f"{path}` serves it as it is"
        )
    model = read_model(path)
    with reading(str(path), model):
        return _looked_at(path, plain(model))


def _bytes(tensor: TensorProto) -> int:
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(np.prod(tensor.dims, dtype=np.int64)) * kind.itemsize


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without functions, Constant and Identity nodes, or weights among its inputs; changes it."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    set_items(model.graph.input, [value for value in model.graph.input if value.name not in stored])
    see_through(model)
    # Older formats want a weight among the inputs.
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True), 4)
    return model


def _looked_at(path: Path, model: onnx.ModelProto) -> GivenGraph:
    """See what a graph takes, and that these are images."""
    way_out = f"`convoy serve {path}` serves it as it is"
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        named = ", ".join(f"{value.name} {_shape_text(value)}" for value in inputs) or "none"
        raise BadInput(f"{path} has {len(inputs)} inputs ({named}), and an export is for one, the images; {way_out}")
    (value,) = inputs
    what = f"{path}: its input {value.name} {_shape_text(value)}"
    kind, dims = value.type.tensor_type.elem_type, [_size(dim) for dim in value.type.tensor_type.shape.dim]
    if len(dims) != 4:
        raise BadInput(f"{what} is no batch of images, [N, C, H, W] or [N, H, W, C]; {way_out}")
    if kind not in _INPUTS:
        raise BadInput(f"{what} is {_kind(kind)}, and images are float32, float16 or uint8; {way_out}")
    channels_last = dims[1] not in _CHANNELS and dims[3] in _CHANNELS
    channels = dims[3 if channels_last else 1]
    if channels is not None and channels not in _CHANNELS:
        raise BadInput(f"{what} has no axis of 3 channels, or 1 in grey; {way_out}")
    quantized = next((node.op_type for node in all_nodes(model.graph) if node.op_type in _QUANTIZED), "")
    side = 1 if channels_last else 2
    given = GivenGraph(
        path, model, value.name, kind, channels_last, dims[0], channels, (dims[side], dims[side + 1]), kind, quantized
    )
    return given if quantized else _widened(given)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None


def _shape_text(value: onnx.ValueInfoProto) -> str:
    if not value.type.tensor_type.HasField("shape"):
        return "of unknown shape"
    sizes = [_size(dim) for dim in value.type.tensor_type.shape.dim]
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def _kind(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower()


def _widened(given: GivenGraph) -> GivenGraph:
    """A graph of half precision in float32, as networks in PyTorch are exported."""
    model = onnx.ModelProto()
    model.CopyFrom(given.model)
    values = [*model.graph.input, *model.graph.output]
    kinds = {tensor.data_type for tensor in tensors(model.graph)}
    if _HALF not in kinds | {value.type.tensor_type.elem_type for value in values}:
        return given
    _widen(model.graph)
    return replace(given, model=model, kind=TensorProto.FLOAT if given.kind == _HALF else given.kind, widened=True)


def _widen(graph: onnx.GraphProto) -> None:
    for tensor in tensors(graph):
        if tensor.data_type == _HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    _widen_values(graph)


def _widen_values(graph: onnx.GraphProto) -> None:
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for item in node.attribute:
            if item.name in ("to", "dtype") and item.i == _HALF:
                item.i = TensorProto.FLOAT
        for body in bodies_of(node):
            _widen_values(body)


def for_any_batch(given: GivenGraph) -> onnx.ModelProto:
    """The graph with its batch axis open; whether it computes the same then has to be tried.

    Shapes that hold the number of images take it from what they shape.
    """
    model = onnx.ModelProto()
    model.CopyFrom(given.model)
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].dim_param = "batch"
    del model.graph.value_info[:]
    graph = Graph(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or not graph.is_constant(node.input[1]) or graph.is_constant(node.input[0]):
            continue
        shape = graph.constant(node.input[1]).copy()
        if shape.size and shape[0] == (given.batch or 1):
            shape[0] = 0
            name = f"{node.input[1]}.any_batch.{index}"
            model.graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name
    return model
