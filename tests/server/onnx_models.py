"""Tiny ONNX model repositories with answers that can be worked out by hand, and a real server over one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from convoynet.protos.inference import model_config_pb2 as pb
from tests.server.process import ServeProcess

LINEAR_WEIGHTS = np.array([[1, 0, -1], [0, 2, 0], [0.5, 0, 0], [0, 0, 3]], np.float32)
COLORS = ("red", "green", "blue")


def write_linear(repository: Path, name: str = "linear", *, max_batch: int = 8) -> Path:
    """logits = input @ LINEAR_WEIGHTS: FP32 [4] -> FP32 [3], classes zero, one, two; no image input.

    `max_batch` 0 makes a model without a batch axis.
    """
    rows = ["batch"] if max_batch else []
    weights = numpy_helper.from_array(LINEAR_WEIGHTS, "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weights"], ["logits"])],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [*rows, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*rows, 3])],
        [weights],
    )
    config = _config(name, max_batch, 3)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[4])
    return _write(repository, config, graph, ["zero", "one", "two"])


def write_colors(
    repository: Path, name: str = "colors", *, max_batch: int = 8, explains: bool = False, maps: Sequence[str] = ()
) -> Path:
    """Which colour an image has: UINT8 NHWC [8,8,3] -> mean of each channel / 25.5, with preprocess and softmax.

    One that `explains` has the output "explanation" too, [8,8]: how bright each pixel is, or how bright in the colour
    that the optional input "explain_class" names, which config.pbtxt states before the image. Outputs called as `maps`
    are [3,4,4]: the mean of each channel over squares of 2 x 2 pixels.
    """
    nodes = [
        helper.make_node("Cast", ["input"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "unit"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "axes"),
        numpy_helper.from_array(np.array(25.5, np.float32), "unit"),
    ]
    config = _config(name, max_batch, 3)
    if explains:
        config.input.add(name="explain_class", data_type=pb.TYPE_INT64, dims=[1], optional=True)
    config.input.add(name="input", data_type=pb.TYPE_UINT8, format=pb.ModelInput.FORMAT_NHWC, dims=[8, 8, 3])
    inputs = [helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", 8, 8, 3])]
    if explains:
        nodes += [
            helper.make_node("Equal", ["explain_class", "colours"], ["one"]),
            helper.make_node("Cast", ["one"], ["share"], to=TensorProto.FLOAT),
            helper.make_node("Less", ["explain_class", "nothing"], ["all"]),
            helper.make_node("Where", ["all", "third", "share"], ["shares"]),
            helper.make_node("Reshape", ["shares", "everywhere"], ["weights"]),
            helper.make_node("Mul", ["pixels", "weights"], ["weighed"]),
            helper.make_node("ReduceSum", ["weighed", "channels"], ["explanation"], keepdims=0),
        ]
        outputs.append(helper.make_tensor_value_info("explanation", TensorProto.FLOAT, ["batch", 8, 8]))
        inputs.append(helper.make_tensor_value_info("explain_class", TensorProto.INT64, ["asked", 1]))
        constants += [
            numpy_helper.from_array(np.array(values, dtype), key)
            for key, values, dtype in (
                ("explain_class", [[-1]], np.int64), ("channels", [3], np.int64), ("nothing", 0, np.int64),
                ("colours", [0, 1, 2], np.int64), ("everywhere", [-1, 1, 1, 3], np.int64), ("third", 1 / 3, np.float32),
            )
        ]  # fmt: skip
        config.output.add(name="explanation", data_type=pb.TYPE_FP32, dims=[8, 8])
        config.parameters["values.explain_class"].string_value = "-1 to 2"
        config.parameters["seldom_outputs"].string_value = "explanation"
    if maps:
        nodes.append(helper.make_node("Transpose", ["pixels"], ["channels_first"], perm=[0, 3, 1, 2]))
    for each in maps:
        squares = {"kernel_shape": [2, 2], "strides": [2, 2]}
        nodes.append(helper.make_node("AveragePool", ["channels_first"], [each], **squares))
        outputs.append(helper.make_tensor_value_info(each, TensorProto.FLOAT, ["batch", 3, 4, 4]))
        config.output.add(name=each, data_type=pb.TYPE_FP32, dims=[3, 4, 4])
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    preprocess = {"color": "RGB", "resize": 8, "size": [8, 8], "interpolation": "bilinear"}
    config.parameters["preprocess"].string_value = json.dumps(preprocess)
    config.parameters["activation"].string_value = "softmax"
    return _write(repository, config, graph, COLORS)


def write_photos(repository: Path, name: str = "resnet50") -> Path:
    """Which colour a photograph has, with an ImageNet network's input: FP32 NCHW [3,224,224], softmax."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["input", "axes"], ["logits"], keepdims=0)],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    config = _config(name, 4, 3)
    config.input.add(name="input", data_type=pb.TYPE_FP32, format=pb.ModelInput.FORMAT_NCHW, dims=[3, 224, 224])
    preprocess = {"color": "RGB", "resize": 256, "size": [224, 224], "interpolation": "bilinear"}
    preprocess |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config.parameters["preprocess"].string_value = json.dumps(preprocess)
    config.parameters["activation"].string_value = "softmax"
    return _write(repository, config, graph, COLORS)


def write_segmenter(repository: Path, name: str = "segmenter", *, cell: int = 1, **preprocess: object) -> Path:
    """FP32 NCHW [3,40,40] -> logits, the channels themselves, and classes, which is brightest: red is the background.

    `cell` is the side of the input's squares that share a cell of the outputs; `preprocess` overrides its fields.
    """
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["input"], ["logits"], kernel_shape=[cell, cell], strides=[cell, cell]),
            helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
            helper.make_node("Cast", ["best"], ["classes"], to=TensorProto.UINT8),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 40, 40])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 40 // cell, 40 // cell]),
            helper.make_tensor_value_info("classes", TensorProto.UINT8, ["batch", 40 // cell, 40 // cell]),
        ],
    )
    config = _config(name, 4, 3)
    config.output[0].dims[:] = [3, 40 // cell, 40 // cell]
    config.output.add(name="classes", data_type=pb.TYPE_UINT8, dims=[40 // cell, 40 // cell])
    _add_padded_image(config, "segmentation", preprocess)
    return _write(repository, config, graph, ["__background__", "grass", "sky"])


def write_detector(repository: Path, name: str = "detector") -> Path:
    """FP32 NCHW [3,40,40] -> the box around all that is green, "frog" at 0.9, and around all that is blue, at 0.6."""
    nodes = [
        helper.make_node("Slice", ["input", "one", "three", "one"], ["channels"]),
        helper.make_node("Greater", ["channels", "half"], ["bright"]),
        helper.make_node("Cast", ["bright"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask", "two"], ["columns"], keepdims=0),
        helper.make_node("ReduceMax", ["mask", "three"], ["rows"], keepdims=0),
    ]
    for corner, (across, last) in {
        "x1": ("columns", 0),
        "y1": ("rows", 0),
        "x2": ("columns", 1),
        "y2": ("rows", 1),
    }.items():
        nodes += [
            helper.make_node("ArgMax", [across], [f"{corner}_at"], axis=2, keepdims=1, select_last_index=last),
            # A box ends behind its last pixel.
            helper.make_node("Add", [f"{corner}_at", "one" if last else "zero"], [corner]),
        ]
    nodes += [
        helper.make_node("Concat", ["x1", "y1", "x2", "y2"], ["corners"], axis=2),
        helper.make_node("Cast", ["corners"], ["corners_float"], to=TensorProto.FLOAT),
        helper.make_node("Pad", ["corners_float", "two_more_boxes"], ["boxes"]),
        helper.make_node("ReduceMax", ["columns", "two"], ["present"], keepdims=0),
        helper.make_node("Mul", ["present", "certain"], ["both_scores"]),
        helper.make_node("Pad", ["both_scores", "two_more"], ["scores"]),
        helper.make_node("Sub", ["present", "present"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["integer_zeros"], to=TensorProto.INT64),
        helper.make_node("Add", ["integer_zeros", "frog_and_bird"], ["both_labels"]),
        helper.make_node("Pad", ["both_labels", "two_more"], ["labels"]),
        helper.make_node("ReduceSum", ["integer_zeros", "one"], ["none"], keepdims=1),
        helper.make_node("Add", ["none", "two"], ["count"]),
    ]
    constants = {
        **{name: np.array([number]) for number, name in enumerate(("zero", "one", "two", "three"))},
        "half": np.array(0.5, np.float32),
        "certain": np.array([0.9, 0.6], np.float32),
        "frog_and_bird": np.array([1, 2]),
        "two_more_boxes": np.array([0, 0, 0, 0, 2, 0]),
        "two_more": np.array([0, 0, 0, 2]),
    }
    shapes = {"boxes": [4, 4], "scores": [4], "labels": [4], "count": [1]}
    types = {"boxes": "FP32", "scores": "FP32", "labels": "INT64", "count": "INT64"}
    onnx_types = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 40, 40])],
        [helper.make_tensor_value_info(n, onnx_types[types[n]], ["batch", *shape]) for n, shape in shapes.items()],
        [numpy_helper.from_array(value, each) for each, value in constants.items()],
    )
    config = _config(name, 4, 1)
    del config.output[:]
    for each, shape in shapes.items():
        config.output.add(name=each, data_type=pb.DataType.Value(f"TYPE_{types[each]}"), dims=shape)
    config.output[1].label_filename = "labels.txt"
    _add_padded_image(config, "detection", {})
    return _write(repository, config, graph, ["__background__", "frog", "bird"])


def _add_padded_image(config: pb.ModelConfig, task: str, overrides: dict[str, object]) -> None:
    """An input [3,40,40] that all of the image fits into; the grey that it is padded with is 0 to the network."""
    config.input.add(name="input", data_type=pb.TYPE_FP32, format=pb.ModelInput.FORMAT_NCHW, dims=[3, 40, 40])
    preprocess = {"color": "RGB", "resize": 40, "size": [40, 40], "interpolation": "bilinear"}
    preprocess |= {"mean": [0.5] * 3, "std": [0.5] * 3, "fit": "pad", "fill": [128] * 3, **overrides}
    config.parameters["preprocess"].string_value = json.dumps(preprocess)
    config.parameters["task"].string_value = task


def write_slow(repository: Path, name: str = "slow", *, size: int = 512, loops: int = 400) -> Path:
    """FP32 [1] -> FP32 [1]: the input, after `loops` products of size x size matrices that leave it as it is."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state_in", "square"], ["state_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [size, size]),
        ],
    )
    identity = np.eye(size, dtype=np.float32)
    graph = helper.make_graph(
        [
            # Nothing, but no runtime knows that before it sees the input: none computes the products ahead.
            helper.make_node("Abs", ["input"], ["size"]),
            helper.make_node("ReduceMax", ["size"], ["most"], keepdims=0),
            helper.make_node("Min", ["most", "zero"], ["nothing"]),
            helper.make_node("Add", ["square", "nothing"], ["first"]),
            helper.make_node("Loop", ["loops", "", "first"], ["state"], body=body),
            helper.make_node("ReduceMax", ["state"], ["one"], keepdims=0),
            helper.make_node("Mul", ["input", "one"], ["logits"]),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(identity, "square"),
            numpy_helper.from_array(np.array(loops), "loops"),
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
        ],
    )
    config = _config(name, 1, 1)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[1])
    return _write(repository, config, graph, ["only"])


def write_doubling(repository: Path, name: str = "doubling") -> Path:
    """FP32 [n] -> doubled FP32 [n] for whatever n, and total FP32 [1], the row's sum."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["input", "input"], ["doubled"]),
            helper.make_node("ReduceSum", ["input", "one"], ["total"], keepdims=1),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "n"])],
        [
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["batch", "n"]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch", 1]),
        ],
        [numpy_helper.from_array(np.array([1]), "one")],
    )
    config = _config(name, 8, 1)
    del config.output[:]
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[-1])
    config.output.add(name="doubled", data_type=pb.TYPE_FP32, dims=[-1])
    config.output.add(name="total", data_type=pb.TYPE_FP32, dims=[1])
    return _write(repository, config, graph, [])


def write_pairs(repository: Path, name: str = "pairs") -> Path:
    """FP32 [4] -> FP32 [4]: the input and one; the engine fails on a batch with an odd number of rows."""
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["input", "eight"], ["pairs"]),
            helper.make_node("Add", ["pairs", "ones"], ["sums"]),
            helper.make_node("Reshape", ["sums", "four"], ["logits"]),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 4])],
        [
            numpy_helper.from_array(np.array([-1, 8]), "eight"),
            numpy_helper.from_array(np.array([-1, 4]), "four"),
            numpy_helper.from_array(np.ones(8, np.float32), "ones"),
        ],
    )
    config = _config(name, 8, 4)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[4])
    config.model_warmup.add(name="two", batch_size=2)
    return _write(repository, config, graph, ["zero"] * 4)


def write_texts(repository: Path, name: str = "texts") -> Path:
    """BYTES [2] -> BYTES [2]: the input."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["logits"])],
        name,
        [helper.make_tensor_value_info("input", TensorProto.STRING, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.STRING, ["batch", 2])],
    )
    config = _config(name, 8, 2)
    config.output[0].data_type = pb.TYPE_STRING
    config.input.add(name="input", data_type=pb.TYPE_STRING, dims=[2])
    return _write(repository, config, graph, ["zero", "one"])


def write_quantized(repository: Path, name: str = "quantized", *, numbers: int, scale: int) -> Path:
    """FP32 [4] -> FP32 [4]: the positive part in steps of 0.03, quantized to `numbers` with a scale of type `scale`."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input"], ["cast"], to=scale),
            helper.make_node("Relu", ["cast"], ["positive"]),
            helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["quantized"]),
            helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["back"]),
            helper.make_node("Cast", ["back"], ["logits"], to=TensorProto.FLOAT),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor("scale", scale, [], [0.03]), helper.make_tensor("zero", numbers, [], [0])],
    )
    config = _config(name, 8, 4)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[4])
    return _write(repository, config, graph, ["zero"] * 4)


def write_large_sums(repository: Path, name: str = "sums") -> Path:
    """FP32 [64] -> FP32 [4]: sums of the products of 8-bit numbers that are as large as they can be.

    Pairs of these products need 17 bits; the rows of the weights are 127, 100, -127 and 1.
    """
    weights = np.repeat(np.array([[127, 100, -127, 1]], np.int8), 64, axis=0)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["bytes"]),
            helper.make_node("DequantizeLinear", ["bytes", "one", "zero"], ["rows"]),
            helper.make_node("DequantizeLinear", ["weights", "one", "none"], ["columns"]),
            helper.make_node("MatMul", ["rows", "columns"], ["products"]),
            helper.make_node("QuantizeLinear", ["products", "step", "none"], ["steps"]),
            helper.make_node("DequantizeLinear", ["steps", "step", "none"], ["logits"]),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("step", TensorProto.FLOAT, [], [64 * 255.0]),
            helper.make_tensor("zero", TensorProto.UINT8, [], [0]),
            helper.make_tensor("none", TensorProto.INT8, [], [0]),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    config = _config(name, 8, 4)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[64])
    return _write(repository, config, graph, ["a", "b", "c", "d"])


def write_signed_sums(repository: Path, name: str = "signed") -> Path:
    """INT8 [1, 8, 8] -> INT8 [4, 1, 1]: one QLinearConv, as other exporters write it, of signed numbers alone."""
    weights = np.zeros((4, 1, 8, 8), np.int8)
    weights[:] = np.array([127, 100, -127, 1])[:, None, None, None]
    names = ["input", "one", "none", "weights", "one", "none", "step", "none"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", names, ["logits"])],
        name,
        [helper.make_tensor_value_info("input", TensorProto.INT8, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.INT8, ["batch", 4, 1, 1])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("step", TensorProto.FLOAT, [], [64 * 127.0]),
            helper.make_tensor("none", TensorProto.INT8, [], [0]),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    config = _config(name, 8, 4)
    config.output[0].data_type = pb.TYPE_INT8
    config.output[0].dims[:] = [4, 1, 1]
    config.input.add(name="input", data_type=pb.TYPE_INT8, dims=[1, 8, 8])
    return _write(repository, config, graph, ["a", "b", "c", "d"])


def _config(name: str, max_batch: int, classes: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend="onnxruntime", platform="onnxruntime_onnx", max_batch_size=max_batch)
    config.output.add(name="logits", data_type=pb.TYPE_FP32, dims=[classes], label_filename="labels.txt")
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    if max_batch:
        config.dynamic_batching.SetInParent()
    return config


def _write(
    repository: Path, config: pb.ModelConfig, graph: onnx.GraphProto, labels: tuple[str, ...] | list[str]
) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    folder = repository / config.name
    (folder / "1").mkdir(parents=True)
    onnx.save(model, folder / "1" / "model.onnx")
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    return folder


@dataclass(frozen=True)
class LiveServer:
    """A Convoy that serves in a process of its own."""

    url: str
    http_url: str
    process: subprocess.Popen[bytes]


@contextmanager
def serve(repository: Path, *flags: str) -> Iterator[LiveServer]:
    """`convoy serve` over the repository until the block ends."""
    with ServeProcess(repository, *flags) as server:
        yield LiveServer(server.url, server.http, server.process)
