"""Tiny ONNX model repositories with answers that can be worked out by hand, and a real server over one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from protos.inference import model_config_pb2 as pb
from server.client import Client

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


def write_colors(repository: Path, name: str = "colors", *, max_batch: int = 8) -> Path:
    """Which colour an image has: UINT8 NHWC [8,8,3] -> mean of each channel / 25.5, with preprocess and softmax."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
            helper.make_node("Div", ["means", "unit"], ["logits"]),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([1, 2]), "axes"),
            numpy_helper.from_array(np.array(25.5, np.float32), "unit"),
        ],
    )
    config = _config(name, max_batch, 3)
    config.input.add(name="input", data_type=pb.TYPE_UINT8, format=pb.ModelInput.FORMAT_NHWC, dims=[8, 8, 3])
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
            helper.make_node("Loop", ["loops", "", "square"], ["state"], body=body),
            helper.make_node("ReduceMax", ["state"], ["one"], keepdims=0),
            helper.make_node("Mul", ["input", "one"], ["logits"]),
        ],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(identity, "square"), numpy_helper.from_array(np.array(loops), "loops")],
    )
    config = _config(name, 1, 1)
    config.input.add(name="input", data_type=pb.TYPE_FP32, dims=[1])
    return _write(repository, config, graph, ["only"])


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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
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
    process: subprocess.Popen[bytes]


@contextmanager
def serve(repository: Path, *flags: str) -> Iterator[LiveServer]:
    """`convoy serve` over the repository on free ports, until the block ends; its log is shown if it fails."""
    ports = _free_ports(2)
    command = [
        *(sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())", "serve"),
        *("--model-repository", str(repository), "--grpc-port", str(ports[0]), "--metrics-port", str(ports[1])),
        *flags,
    ]
    log_file = repository.parent / f"serve-{ports[0]}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    url = f"127.0.0.1:{ports[0]}"
    try:
        with Client(url) as client:
            for _ in range(600):
                if process.poll() is not None or client.server_ready():
                    break
                # The process ends or time passes: either is a reason to look again.
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            if process.poll() is not None or not client.server_ready():
                raise RuntimeError(f"the server did not come up:\n{log_file.read_text()}")
        yield LiveServer(url, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
