"""Explanations as nodes of the graph, held against PyTorch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_fp16
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running.openvino import core, properties
from convoynet.server.engines.onnx_part import cut_out
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import session_of
from tests.exporter.small_nets import PREPROCESS, pixels, settled

Array = NDArray[np.float32]
CHANNELS, CLASSES, SIDE = 6, 7, 5
ROUNDING = 1e-4


class Net(nn.Module):
    """A map of features, [N, CHANNELS, SIDE, SIDE], and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, 3), nn.ReLU()
        )
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.trunk(x))
        return result


class Pools(nn.Module):
    """Means and maxima side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1).flatten(1)


class Gated(nn.Module):
    """A row that its own sigmoid weighs, and a connection past a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layer = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        row = x.mean((2, 3))
        row = row * torch.sigmoid(self.gate(row))
        return row + torch.tanh(self.layer(row))


class Distances(nn.Module):
    """Minus the squared distances to codes, as LeNet-5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(CLASSES, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return -(x.mean((2, 3)).unsqueeze(1) - self.codes).pow(2).sum(2)


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


WHOLE = CHANNELS * SIDE**2
HEADS: dict[str, Callable[[], nn.Module]] = {
    "a pool and a layer": lambda: pooled(nn.Dropout(), nn.Linear(CHANNELS, CLASSES)),
    "a layer of the whole map": lambda: flat(nn.Linear(WHOLE, CLASSES)),
    "layers, as VGG's": lambda: flat(nn.Linear(WHOLE, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, CLASSES)),
    "layers, as MobileNetV3's": lambda: pooled(nn.Linear(CHANNELS, 9), nn.Hardswish(), nn.Linear(9, CLASSES)),
    "convolutions behind the pool": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, 9, 1), nn.ReLU6(), nn.Conv2d(9, CLASSES, 1), nn.Flatten()
    ),
    "a convolution of the whole map": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 8, SIDE, groups=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8, CLASSES)
    ),
    "maps of classes, as NIN's": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "two pools": lambda: nn.Sequential(Pools(), nn.Linear(2 * CHANNELS, CLASSES)),
    "a norm": lambda: pooled(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 9), nn.Hardsigmoid(), nn.Linear(9, CLASSES)),
    "a gate and a sum": lambda: nn.Sequential(Gated(), nn.Linear(CHANNELS, CLASSES, bias=False)),
    "distances": Distances,
    "a softmax": lambda: pooled(nn.Linear(CHANNELS, CLASSES), nn.Softmax(1)),
}
PARSED = ("layers, as MobileNetV3's", "maps of classes, as NIN's")
"""Heads that TensorRT-RTX reads in every run, between them with all operators that are not in every explanation."""


@cache
def exported(name: str) -> tuple[Net, onnx.ModelProto]:
    """A network with a head, and its graph."""
    torch.manual_seed(0)
    model = Net(HEADS[name]())
    settled(model, PREPROCESS.normalize(pixels(8)))
    return model, onnx_from_torch(model, PREPROCESS, uint8_input=False)


def torch_maps(
    model: nn.Module,
    layer: nn.Module,
    inputs: Array,
    scores: nn.Module | None = None,
    classes: NDArray[np.int64] | None = None,
) -> Array:
    """Grad-CAM by hooks: of the outputs, or of what `scores` reads; of the winners, or of these classes."""
    seen: dict[str, Tensor] = {}
    hooks = [layer.register_forward_hook(lambda module, given, made: seen.update(features=made))]
    if scores is not None:
        hooks.append(scores.register_forward_hook(lambda module, given, made: seen.update(scores=given[0])))
    logits = model(torch.from_numpy(inputs))
    for hook in hooks:
        hook.remove()
    wanted = logits.argmax(1) if classes is None else torch.from_numpy(classes)
    chosen = seen.get("scores", logits)[torch.arange(len(inputs)), wanted]
    (gradient,) = torch.autograd.grad(chosen.sum(), seen["features"])
    maps: Array = (gradient.mean((2, 3), keepdim=True) * seen["features"]).sum(1).relu().detach().numpy()
    return maps


class Runner:
    """A graph in ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = session_of(model)

    def __call__(self, inputs: NDArray[np.generic], classes: NDArray[np.int64] | None = None) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        given = {"input": inputs} | ({} if classes is None else {"explain_class": classes[:, None]})
        return dict(zip(names, self.session.run(names, given), strict=True))


def ran(
    model: onnx.ModelProto, inputs: NDArray[np.generic], classes: NDArray[np.int64] | None = None
) -> dict[str, Array]:
    return Runner(model)(inputs, classes)


def in_openvino(model: onnx.ModelProto) -> Callable[[Array], dict[str, Array]]:
    compiled = core().compile_model(core().read_model(model.SerializeToString()), "CPU", dict(properties(1)))

    def run(inputs: Array) -> dict[str, Array]:
        made = compiled({"input": inputs})
        # A tensor that is moved alone has all the names that it had on its way.
        return {name: made[name].copy() for name in (output.name for output in model.graph.output)}

    return run


def error(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def agree(found: dict[str, Array], wanted: dict[str, Array], output: str, most: float) -> bool:
    """Whether two engines make the same of a quantized graph, as far as their logits are the same.

    Without VNNI sums of 8-bit products saturate in one and not in the other, and there is other evidence in each.
    """
    if error(found["logits"], wanted["logits"]) > 1e-3:
        return bool(np.corrcoef(found[output].ravel(), wanted[output].ravel())[0, 1] > 0.9)
    return error(found[output], wanted[output]) < most


@pytest.mark.parametrize("name", HEADS)
def test_each_head_has_pytorchs_gradient(name: str) -> None:
    model, graph = exported(name)
    before = graph.SerializeToString()
    made = explained(graph)
    assert graph.SerializeToString() == before
    last = model.head if name == "maps of classes, as NIN's" else None
    layer = last[1] if isinstance(last, nn.Sequential) else model.trunk
    assert isinstance(layer, nn.Module)
    softmax = model.head[-1] if name == "a softmax" and isinstance(model.head, nn.Sequential) else None
    for count in (1, 5):
        inputs = PREPROCESS.normalize(pixels(count))
        found = ran(made, inputs)
        assert found["explanation"].dtype == np.float32
        assert found["explanation"].min() >= 0
        assert error(found["explanation"], torch_maps(model, layer, inputs, softmax)) < ROUNDING
        assert np.array_equal(found["logits"], ran(graph, inputs)["logits"])
    classes = np.arange(5)
    asked = ran(made, inputs, classes)
    assert error(asked["explanation"], torch_maps(model, layer, inputs, softmax, classes)) < ROUNDING
    assert np.array_equal(asked["logits"], found["logits"])


def test_the_weights_of_a_layer_that_reads_the_whole_map_are_added_up_once() -> None:
    """Of VGG's 411 MB a forty-ninth is read again."""
    _, graph = exported("layers, as VGG's")
    made = explained(graph)
    added = {tensor.name for tensor in made.graph.initializer} - {tensor.name for tensor in graph.graph.initializer}
    assert max(np.prod(tensor.dims) for tensor in made.graph.initializer if tensor.name in added) == 9 * CHANNELS
    (largest,) = [tensor.name for tensor in graph.graph.initializer if list(tensor.dims) == [9, WHOLE]]
    readers = [node for node in made.graph.node if largest in node.input]
    assert len(readers) == 1


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a pool and a layer", "cpu"),
        ("layers, as VGG's", "cpu"),
        ("layers, as MobileNetV3's", "cpu"),
        ("layers, as MobileNetV3's", "gpu"),
        ("two pools", "cpu"),
        ("maps of classes, as NIN's", "cpu"),
    ],
)
def test_a_quantized_graph_keeps_its_nodes_and_its_answers(name: str, target: str, tmp_path: Path) -> None:
    _, graph = exported(name)
    inputs = PREPROCESS.normalize(pixels(8))
    quantized = quantize(graph, calibrate(graph, [inputs], "minmax"), target)
    made = explained(quantized)
    count = len(quantized.graph.node)
    assert list(made.graph.node)[:count] == list(quantized.graph.node)
    assert not [node.op_type for node in list(made.graph.node)[count:] if "Linear" in node.op_type]
    (file := tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    # What a server runs where nobody asks for it is the graph as it was.
    assert onnx.load_from_string(cut_out(file, ["logits"])) == quantized
    found, exact = ran(made, inputs), ran(explained(graph), inputs)
    assert np.array_equal(found["logits"], ran(quantized, inputs)["logits"])
    alike = found["logits"].argmax(1) == exact["logits"].argmax(1)
    assert alike.any()
    # A single map of an untrained network may be nothing but zeros.
    assert np.corrcoef(found["explanation"][alike].ravel(), exact["explanation"][alike].ravel())[0, 1] > 0.9
    run, plain = in_openvino(made), in_openvino(quantized)
    assert np.array_equal(run(inputs)["logits"], plain(inputs)["logits"])
    whole = run(inputs)["explanation"]
    assert agree(run(inputs), found, "explanation", 0.02)
    for size in range(1, 8):
        for infer, all_of_it in ((run, whole), (partial(ran, made), found["explanation"])):
            part = infer(inputs[:size])["explanation"]
            assert np.abs(part - all_of_it[:size]).max() <= ROUNDING * all_of_it.max()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in PARSED else pytest.mark.slow) for n in HEADS])
def test_tensorrt_rtx_reads_the_explanation(name: str, precision: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    _, graph = exported(name)
    if precision == "int8":
        graph = quantize(graph, calibrate(graph, [PREPROCESS.normalize(pixels(8))], "minmax"), "gpu")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(explained(graph).SerializeToString()), parser.get_error(0).desc()
    shapes = {network.get_output(at).name: tuple(network.get_output(at).shape) for at in range(network.num_outputs)}
    assert shapes == {"logits": (-1, CLASSES), "explanation": (-1, SIDE, SIDE)}
    assert network.get_input(0).name == "input"


@pytest.mark.slow
@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["a pool and a layer", "layers, as VGG's", "maps of classes, as NIN's"])
def test_an_engine_with_the_explanation_builds(name: str, precision: str) -> None:
    _, graph = exported(name)
    if precision == "int8":
        graph = quantize(graph, calibrate(graph, [PREPROCESS.normalize(pixels(8))], "minmax"), "gpu")
    assert len(plan(explained(graph).SerializeToString(), (1, 2, 8))) > 10_000


def test_half_precision_is_explained_in_float() -> None:
    _, graph = exported("layers, as MobileNetV3's")
    inputs = PREPROCESS.normalize(pixels(4))
    half = to_fp16(graph, {})
    found, exact = ran(explained(half), inputs), ran(explained(graph), inputs)
    assert found["explanation"].dtype == np.float32
    assert np.array_equal(found["logits"], ran(half, inputs)["logits"])
    assert error(found["explanation"], exact["explanation"]) < 0.05


def twins(*, measured: bool = False) -> onnx.ModelProto:
    """Two classes with the same score: the mean of the image, and that of the image a place further down.

    Where it is `measured` the graph computes the shape of the rows, as `x.view(x.size(0), -1)` once was exported.
    """
    kernel = np.zeros((2, 1, 3, 3), np.float32)
    kernel[0, 0, 1, 1] = kernel[1, 0, 0, 1] = 1
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["map"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["map"], ["mean"]),
        *(
            [
                helper.make_node("Shape", ["mean"], ["count"], start=0, end=1),
                helper.make_node("Concat", ["count", "rest"], ["shape"], axis=0),
                helper.make_node("Reshape", ["mean", "shape"], ["row"]),
            ]
            if measured
            else [helper.make_node("Flatten", ["mean"], ["row"])]
        ),
        helper.make_node("Gemm", ["row", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "twins",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([-1]), "rest"),
            numpy_helper.from_array(np.array([[0, 1, 0], [0, 0, 1]], np.float32), "weights"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_of_two_classes_with_one_score_the_first_is_explained_in_every_batch_and_engine() -> None:
    """OpenVINO's ArgMax takes one or the other, by where the row is in the batch."""
    images = np.zeros((8, 1, 4, 4), np.float32)
    images[:, 0, 1, 1:3] = np.arange(1, 9, dtype=np.float32)[:, None]
    for made in (explained(twins()), explained(twins(measured=True))):
        for run in (in_openvino(made), partial(ran, made)):
            for size in range(1, 9):
                assert np.allclose(run(images[:size])["explanation"], images[:size, 0] / 16)


@pytest.mark.parametrize("name", ["a pool and a layer", "layers, as VGG's", "maps of classes, as NIN's"])
def test_a_class_below_0_is_the_winner_and_one_that_there_is_not_has_no_map(name: str) -> None:
    _, graph = exported(name)
    inputs = PREPROCESS.normalize(pixels(5))
    made = explained(graph)
    (value,) = [value for value in made.graph.input if value.name == "explain_class"]
    assert [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim] == [-1, 1]
    own = ran(made, inputs)
    found = ran(made, inputs, np.array([-1, own["logits"][1].argmax(), CLASSES, -7, 2**40]))
    assert np.isnan(found["explanation"][[2, 4]]).all()
    assert np.array_equal(found["explanation"][[0, 1, 3]], own["explanation"][[0, 1, 3]])
    assert np.array_equal(found["logits"], own["logits"])


def test_what_is_not_a_number_fails_no_other_row() -> None:
    images = np.zeros((3, 1, 4, 4), np.float32)
    images[:, 0, 1, 1] = 1
    images[1] = np.nan
    made = explained(twins())
    for run in (in_openvino(made), partial(ran, made)):
        found = run(images)["explanation"]
        assert np.allclose(found[[0, 2]], images[[0, 2], 0] / 16)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)), "has no feature map"),
        (nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, CLASSES)), "has no feature map"),
        (Net(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softsign(), nn.Linear(CHANNELS, CLASSES))), "Abs"),
    ],
    ids=["no convolution", "no place is left", "an operator without a gradient here"],
)
def test_what_cannot_be_explained_is_told_in_one_line(model: nn.Module, reason: str) -> None:
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=False)
    with pytest.raises(BadInput, match=reason) as refused:
        explained(graph)
    assert "\n" not in str(refused.value)


def test_an_output_is_explained_once_and_is_one_of_classes() -> None:
    made = explained(twins())
    with pytest.raises(BadInput, match="already"):
        explained(made)
    with pytest.raises(BadInput, match=r"no output 'scores': its outputs are logits"):
        explained(twins(), "scores")
