"""PyTorch networks to ONNX: one file, one input, a dynamic batch, the outputs of its task, and nothing else."""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from types import MappingProxyType

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxscript.optimizer import fold_constants

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_clean import OnPass, clean
from convoynet.exporter.graph.onnx_graph import Graph, replace, shapes
from convoynet.exporter.outputs_asked import EXPLANATION

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
CLASSES_NAME = "classes"
# What the module of an architecture returns, in this order, for each task.
OUTPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "classification": (OUTPUT_NAME,),
        "segmentation": (OUTPUT_NAME,),
        "detection": ("boxes", "scores", "labels", "count"),
    }
)
BATCH_AXIS = "batch"


def compared(names: Iterable[str]) -> tuple[str, ...]:
    """The outputs of a graph that a network has too: all but the class map and the explanation, which are made here."""
    return tuple(name for name in names if name not in (CLASSES_NAME, EXPLANATION))


# The exporter silently writes 18 for anything older; 25 is the newest that TensorRT 11 reads.
OPSETS = range(18, 26)

# A protobuf message cannot be larger; the margin is for everything but the weights.
_MAX_BYTES = 2**31 - 2**22
# What the exporter says beyond the reason: how to report a bug, and pages of its own state.
_ADVICE = re.compile(
    r"\n## |\nThe error above occurred|\nWhile executing|\nOriginal traceback|Traceback \(most|\nFor more info|\n⬆|"
    r"See the stack trace"
)
_WAYS_OUT = (
    (
        r"data-dependent|GuardOnDataDependent|Could not guard|Could not extract specialized integer|bool\(\).*symbolic",
        "its way hangs on the values of the image, as in `if x.max() > 1` or x.item(), and a graph has one way: "
        "compute both and choose with torch.where, or leave that part to the code before and behind the network",
    ),
    (
        r"adaptive_max_pool",
        "AdaptiveMaxPool2d to a size that does not divide the map has no ONNX operator: use nn.MaxPool2d with a fixed "
        "kernel and stride, or a size that divides it",
    ),
    (
        r"aten[.:]+fake_quantize",
        "it quantizes by itself, as torch.ao's training leaves it: export the float network, and ask for --int8 here",
    ),
    (
        r"Error when translating node .*?target=torch\.ops\.([\w.]+?)\.\w+\]",
        "the operator {0} has no form in ONNX: compute it by others, such as nn.LeakyReLU in the place of nn.RReLU, or "
        "leave it to the code before and behind the network",
    ),
)
_MOST_UINT8_CLASSES = 256


def onnx_from_torch(  # noqa: PLR0913  what is exported, and how each side of it is called
    model: torch.nn.Module,
    preprocess: Preprocess,
    *,
    uint8_input: bool,
    opset: int = 20,
    task: str = "classification",
    others: Sequence[str] = (),
    on_pass: OnPass | None = None,
) -> onnx.ModelProto:
    """Export a network with `torch.export`, BatchNorm folded into the convolutions before it.

    Args:
        model: a module from float32 [batch, C, H, W] to logits, [batch, classes] or for segmentation [batch, classes,
            h, w], or for detection to boxes, scores, labels and count, each with the batch first. It is exported in
            evaluation mode and keeps its own mode.
        preprocess: gives C, H and W and, for `uint8_input`, the normalisation.
        uint8_input: the graph takes pixels, uint8 [batch, H, W, C], and normalises them itself; otherwise it takes
            float32 [batch, C, H, W].
        opset: version of the ONNX operators, 18 to 25.
        task: a key of `OUTPUTS`. For segmentation the graph gets a second output: at each place the class with the
            largest logit, [batch, h, w], uint8, or int32 where there are more than 256 classes.
        others: names of the outputs behind those of the task.
        on_pass: called with "exported" and the graph as torch made it, then after each pass of the clean-up with its
            name and the graph, which takes float32 even for `uint8_input`. See `onnx_clean.clean`.

    Returns:
        A checked model with the input "input", the outputs of its task and the dynamic axis "batch". It holds its
        weights itself and no trace of the machine that made it.

    Raises:
        BadInput: the opset or the task is unknown, the network cannot be traced or has other outputs than its task,
            or it is too large for one ONNX file (2 GB).
    """
    _require_exportable(model, opset, task)
    outputs = (*OUTPUTS[task], *others)
    exported = _export(model, preprocess, opset, outputs)
    _require_any_batch(exported)
    _require_no_bfloat16(exported)
    _strip(exported)
    _name_axes(exported)
    if on_pass is not None:
        on_pass("exported", exported)
    clean(exported, on_pass)
    if uint8_input:
        take_pixels(exported, preprocess)
    set_apart(exported, (OUTPUT_NAME, *others))
    if task == "segmentation":
        add_classes(exported)
    onnx.checker.check_model(exported)
    return exported


def _require_exportable(model: torch.nn.Module, opset: int, task: str) -> None:
    if opset not in OPSETS:
        raise BadInput(f"opset {opset}: use {OPSETS.start} to {OPSETS.stop - 1}")
    if task not in OUTPUTS:
        raise BadInput(f"task {task!r}: use {' or '.join(OUTPUTS)}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        raise BadInput(
            f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds less than 2: use fewer classes"
        )


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
        raise BadInput(f"the network cannot be exported to ONNX: {_reason(error)}") from error
    finally:
        model.train(training)
    if program is None:
        raise BadInput("the network cannot be exported to ONNX: the exporter returned nothing")
    _fold_weights(program)
    exported = program.model_proto
    if (count := len(exported.graph.output)) != len(outputs):
        wanted = "the logits alone" if tuple(outputs) == (OUTPUT_NAME,) else ", ".join(outputs)
        raise BadInput(f"the network returns {count} tensors: it must return {wanted}")
    return exported


def _require_any_batch(model: onnx.ModelProto) -> None:
    """See that the number of images is not written into the graph.

    Raises:
        BadInput: it is.
    """
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            raise BadInput(
                f"the number of images is a constant in the network's code ({value.name} has exactly "
                f"{dims[0].dim_value if dims else 1}), as in `for image in x`, x.view(8, -1) or len(x) in a Python "
                "calculation: compute on the whole batch, with x.flatten(1) or x.view(x.size(0), -1)"
            )


def _require_no_bfloat16(model: onnx.ModelProto) -> None:
    types = {value.type.tensor_type.elem_type for value in model.graph.value_info}
    if onnx.TensorProto.BFLOAT16 in types:
        raise BadInput(
            "the network's code computes in bfloat16, as torch.autocast makes it, which no runtime for CPUs does: take "
            "it out of forward, and ask for the precision here (--int8, --fp16, --bf16)"
        )


def _fold_weights(program: torch.onnx.ONNXProgram) -> None:
    """Compute weights that are made of others (weight norm, spectral norm, weight standardization) once and for all.

    The exporter folds small constants alone. Nothing may become larger than the largest weight is.
    """
    shapes = [value.shape for value in program.model.graph.initializers.values()]
    largest = max((prod(shape.numpy()) for shape in shapes if shape is not None), default=0)
    with _silence():
        fold_constants(program.model, input_size_limit=largest * 8 + 1, output_size_limit=largest * 8 + 1)


def _reason(error: BaseException) -> str:
    """What stands in the way, and the way out, without the exporter's advice to itself."""
    causes = [error]
    while (deeper := causes[-1].__cause__ or causes[-1].__context__) is not None and deeper not in causes:
        causes.append(deeper)
    said = " ".join(" ".join(map(str, causes)).split())
    for pattern, way_out in _WAYS_OUT:
        if found := re.search(pattern, said):
            return way_out.format(found[1] if found.groups() else "")
    told = _ADVICE.split(str(error.__cause__ or error), maxsplit=1)[0]
    return " ".join(told.split()) or type(error).__name__


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


def _name_axes(model: onnx.ModelProto) -> None:
    """Name the axes that `x.squeeze()` drops, those of the two images that were traced.

    Without them the axis of a single image goes too: OpenVINO and TensorRT take no graph whose ranks change.
    """
    known = shapes(model)
    for node in model.graph.node:
        shape = known.get(node.input[0]) if node.op_type == "Squeeze" and len(node.input) == 1 else None
        if shape is not None:
            axes = np.array([axis for axis, size in enumerate(shape) if size == 1], np.int64)
            name = f"{node.output[0]}.axes"
            model.graph.initializer.append(numpy_helper.from_array(axes, name))
            node.input.append(name)


def take_pixels(model: onnx.ModelProto, preprocess: Preprocess) -> None:
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


def set_apart(model: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Give outputs that the graph goes on with a node of their own: an inner tensor can be quantized, an output not."""
    graph = Graph(model)
    for name in outputs:
        if graph.readings.get(name):
            inner = f"{name}.inner"
            graph.rewire(name, inner)
            made = graph.producers[name].output
            replace(made, [inner if each == name else each for each in made])
            model.graph.node.append(helper.make_node("Identity", [inner], [name], name=name))
            graph.refresh()


def add_classes(model: onnx.ModelProto) -> None:
    """Add the output `classes`: a map of labels is what is wanted of a segmentation, and much smaller than logits."""
    dims = list(model.graph.output[0].type.tensor_type.shape.dim)
    if len(dims) != 4:
        raise BadInput(f"the network returns logits of {len(dims)} dimensions: a segmentation has 4")
    data_type = onnx.TensorProto.UINT8 if dims[1].dim_value <= _MOST_UINT8_CLASSES else onnx.TensorProto.INT32
    largest = f"{CLASSES_NAME}.int64"
    model.graph.node.extend(
        [
            helper.make_node("ArgMax", [OUTPUT_NAME], [largest], name=largest, axis=1, keepdims=0),
            helper.make_node("Cast", [largest], [CLASSES_NAME], name=CLASSES_NAME, to=data_type),
        ]
    )
    shape: list[str | int | None] = [BATCH_AXIS, *(dim.dim_value for dim in dims[2:])]
    model.graph.output.append(helper.make_tensor_value_info(CLASSES_NAME, data_type, shape))
