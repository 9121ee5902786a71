"""Every pass by itself: what it does where it applies, and that it leaves alone what it would change."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.data.images import made_images
from convoynet.exporter.graph.onnx_clean import PASSES, clean
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import operators, run, session_of, signal_to_noise_db
from tests.exporter.small_nets import PREPROCESS, logits_of, pixels, settled, small_net
from tests.exporter.studies.small_families import small

Floats = NDArray[np.float32]
SHAPE = (8, 6, 6)
RANDOM = np.random.default_rng(0)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]] | None = None,
    outputs: Sequence[str] = ("y",),
    shape: Sequence[int] = SHAPE,
) -> onnx.ModelProto:
    """A graph from "x", float32 [batch, *shape], to `outputs`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)  # of the outputs
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def results(model: onnx.ModelProto, inputs: Floats) -> list[Floats]:
    """The outputs without ONNX Runtime's own rewriting, which would hide what a pass does wrong or leaves undone."""
    session = session_of(model, optimized=None)
    return list(session.run(None, {session.get_inputs()[0].name: inputs}))


def after(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The graph behind one pass, which has computed the same at 1, 2 and 5 images."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    PASSES[name](changed)
    onnx.checker.check_model(changed, full_check=True)
    assert [value.name for value in changed.graph.output] == [value.name for value in model.graph.output]
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    inputs = np.random.default_rng(1).normal(size=(5, *shape)).astype(np.float32)
    for batch in (1, 2, 5):
        pairs = zip(results(model, inputs[:batch]), results(changed, inputs[:batch]), strict=True)
        for before, behind in pairs:
            assert np.abs(before).max() > 1e-3
            np.testing.assert_allclose(behind, before, rtol=0, atol=3e-6 * float(np.abs(before).max()))
    return changed


def untouched(model: onnx.ModelProto, name: str) -> bool:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    PASSES[name](changed)
    return changed == model


def numbers(*shape: int) -> Floats:
    return RANDOM.normal(size=shape).astype(np.float32)


# ---- all passes


class Normed(nn.Module):
    """Local response normalisation that matters: with the usual alpha of 1e-4 a wrong one would not be noticed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.LocalResponseNorm(size, alpha=0.9, beta=0.75, k=2.0)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.narrow = nn.LocalResponseNorm(3, alpha=2.5, beta=0.6, k=0.7)
        self.head = nn.Linear(16 * 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.wide(torch.relu(self.first(x * 3))), 2)
        x = torch.max_pool2d(self.narrow(torch.relu(self.again(x * 3))), 2)
        logits: Tensor = self.head(torch.flatten(x, 1))
        return logits


@pytest.fixture(scope="module")
def normed() -> nn.Module:
    torch.manual_seed(0)
    return Normed(5).eval()


class Untidy(nn.Module):
    """Something for every pass that torch's own optimiser leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 16, 3)
        self.rest = nn.Sequential(
            nn.ReLU(), nn.LocalResponseNorm(5, alpha=0.9, k=2.0), nn.AvgPool2d(1), nn.BatchNorm2d(16),
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rest(self.first(self.before(x))).mean((2, 3)))
        return logits


def test_a_caller_sees_every_pass_and_can_measure_it() -> None:
    torch.manual_seed(0)
    images = pixels(5)
    model = settled(Untidy(), PREPROCESS.normalize(pixels(16)))
    expected = logits_of(model, images)
    seen = []

    def measure(name: str, graph: onnx.ModelProto) -> None:
        onnx.checker.check_model(graph, full_check=True)
        (computed,) = results(graph, PREPROCESS.normalize(images))
        np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
        counted = operators(graph)
        seen.append((name, *(counted[item] for item in ("AveragePool", "LRN", "BatchNormalization", "ReduceMean"))))

    onnx_from_torch(model, PREPROCESS, uint8_input=True, on_pass=measure)
    assert seen == [
        ("exported", 2, 0, 3, 1),
        ("layer names", 2, 0, 3, 1),
        ("no-ops", 1, 0, 3, 1),  # the pool that is left is part of the response norm
        ("response norms", 0, 1, 3, 1),
        ("batch norms", 0, 1, 1, 1),  # one stands between two activations
        ("global pools", 0, 1, 1, 0),
    ]


def test_a_second_clean_up_finds_nothing_to_do() -> None:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False)
    before = graph.SerializeToString(deterministic=True)
    clean(graph)
    assert graph.SerializeToString(deterministic=True) == before


# ---- no-ops

POOL: dict[str, Any] = {"kernel_shape": [1, 1]}


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])],
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Dropout", ["a"], ["y"])],
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("MaxPool", ["a"], ["y"], **POOL)],
        [helper.make_node("AveragePool", ["x"], ["a"], **POOL), helper.make_node("Relu", ["a"], ["y"])],
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Identity", ["a"], ["y"]),
            helper.make_node("Exp", ["a"], ["unread"]),
        ],
    ],
)
def test_nodes_that_do_nothing_disappear(nodes: list[onnx.NodeProto]) -> None:
    assert operators(after(model_of(nodes), "no-ops")) == {"Relu": 1}


def test_an_identity_that_two_read_disappears_and_both_get_its_input() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    assert operators(after(model_of(nodes), "no-ops")) == {"Relu": 1, "Add": 1}


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([helper.make_node("Identity", ["x"], ["y"])], ["y"]),
        ([helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Identity", ["a"], ["y"])], ["a", "y"]),
        ([helper.make_node("MaxPool", ["x"], ["y"], strides=[2, 2], **POOL)], ["y"]),
        ([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[1, 3])], ["y"]),
        ([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[1, 1])], ["y"]),
        (
            [
                helper.make_node("Dropout", ["x"], ["a", "mask"]),
                helper.make_node("Where", ["mask", "a", "x"], ["y"]),
            ],
            ["y"],
        ),
    ],
)
def test_what_does_something_or_is_an_output_stays(nodes: list[onnx.NodeProto], outputs: list[str]) -> None:
    assert untouched(model_of(nodes, outputs=outputs), "no-ops")


# ---- local response normalisation


def test_response_norms_become_one_node_each(normed: nn.Module) -> None:
    graph = onnx_from_torch(normed, PREPROCESS, uint8_input=False)
    counted = operators(graph)
    assert counted["LRN"] == 2
    assert not counted.keys() & {"Pow", "Div", "Pad", "AveragePool", "Squeeze", "Add"}
    found = [
        {item.name: helper.get_attribute_value(item) for item in node.attribute}
        for node in graph.graph.node
        if node.op_type == "LRN"
    ]
    assert [item["size"] for item in found] == [5, 3]
    assert [[item[name] for name in ("alpha", "beta", "bias")] for item in found] == [
        pytest.approx([0.9, 0.75, 2.0]),
        pytest.approx([2.5, 0.6, 0.7]),
    ]
    expected = logits_of(normed, pixels(5))
    for batch in (1, 2, 5):
        images = PREPROCESS.normalize(pixels(5)[:batch])
        np.testing.assert_allclose(run(graph, images), expected[:batch], rtol=1e-4, atol=1e-5)


def test_a_response_norm_over_an_even_number_of_channels_stays() -> None:
    torch.manual_seed(0)
    model = Normed(4).eval()
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=False)
    assert (operators(graph)["LRN"], operators(graph)["Pow"]) == (1, 1)  # the other one has three
    expected = logits_of(model, pixels(3))
    np.testing.assert_allclose(run(graph, PREPROCESS.normalize(pixels(3))), expected, rtol=1e-4, atol=1e-5)


def response_norm(*extra: onnx.NodeProto, **changes: Any) -> onnx.ModelProto:
    """The eight nodes, with some changed."""
    given: dict[str, Any] = {
        "squared": ["x", "x"], "shape": [-1, 1, *SHAPE], "pads": [0, 0, 1, 0, 0, 0, 0, 1, 0, 0], "fill": 0.0,
        "kernel": [3, 1, 1], "strides": [1, 1, 1], "alpha": np.float32(0.9), "power": ["sum", "beta"],
        "divided": ["x", "power"], "outputs": ["y"], "before": [],
    } | changes  # fmt: skip
    constants = {
        "shape": np.array(given["shape"], np.int64), "pads": np.array(given["pads"], np.int64),
        "fill": np.array(given["fill"], np.float32), "one": np.array([1], np.int64), "beta": np.array(0.75, np.float32),
        "bias": np.array(2, np.float32), "alpha": np.array(given["alpha"]),
    }  # fmt: skip
    nodes = [
        *given["before"],
        helper.make_node("Mul", given["squared"], ["square"]),
        helper.make_node("Reshape", ["square", "shape"], ["view"]),
        helper.make_node("Pad", ["view", "pads", "fill"], ["padded"]),
        helper.make_node("AveragePool", ["padded"], ["mean"], kernel_shape=given["kernel"], strides=given["strides"]),
        helper.make_node("Squeeze", ["mean", "one"], ["flat"]),
        helper.make_node("Mul", ["flat", "alpha"], ["scaled"]),
        helper.make_node("Add", ["bias", "scaled"], ["sum"]),
        helper.make_node("Pow", given["power"], ["power"]),
        helper.make_node("Div", given["divided"], ["y"]),
        *extra,
    ]
    return model_of(nodes, constants, outputs=given["outputs"])


def test_the_nodes_of_a_response_norm_are_recognised() -> None:
    assert operators(after(response_norm(), "response norms")) == {"LRN": 1}
    behind = helper.make_node("Relu", ["y"], ["z"])
    assert operators(after(response_norm(behind, outputs=["y", "z"]), "response norms")) == {"LRN": 1, "Relu": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": [2, 1, 1], "pads": [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]},  # even
        {"pads": [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]},  # three, but not around the channel
        {"pads": [0, 0, 1, 1, 0, 0, 0, 1, 1, 0], "kernel": [3, 3, 1]},
        {"fill": 1.0},
        {"alpha": np.full((8, 1, 1), 0.9, np.float32)},  # one for each channel
        {"power": ["beta", "sum"]},
        {"outputs": ["y", "power"]},
        {"outputs": ["y", "square"]},
        {"before": [helper.make_node("Relu", ["x"], ["r"])], "divided": ["r", "power"]},
        {"before": [helper.make_node("Relu", ["x"], ["r"])], "squared": ["x", "r"]},
    ],
)
def test_a_chain_that_is_another_stays(changes: dict[str, Any]) -> None:
    assert untouched(response_norm(**changes), "response norms")


def test_a_chain_with_another_reader_stays() -> None:
    reader = helper.make_node("Relu", ["scaled"], ["z"])
    assert untouched(response_norm(reader, outputs=["y", "z"]), "response norms")


# ---- batch normalisation


def norm(source: str, target: str) -> onnx.NodeProto:
    inputs = [source, *(f"{target}.{name}" for name in ("scale", "shift", "mean", "variance"))]
    return helper.make_node("BatchNormalization", inputs, [target], epsilon=1e-3)


def statistics(target: str, channels: int) -> dict[str, NDArray[np.generic]]:
    values = (
        RANDOM.uniform(0.5, 1.5, channels),
        numbers(channels),
        numbers(channels),
        RANDOM.uniform(0.3, 3, channels),
    )
    names = (f"{target}.{name}" for name in ("scale", "shift", "mean", "variance"))
    return {name: value.astype(np.float32) for name, value in zip(names, values, strict=True)}


def conv(source: str, target: str, *, bias: bool = True, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, "w", "b"] if bias else [source, "w"], [target], **attributes)


WEIGHTS: dict[str, NDArray[np.generic]] = {"w": numbers(8, 8, 3, 3), "b": numbers(8)}
GROUPED: dict[str, NDArray[np.generic]] = {"w": numbers(12, 2, 3, 3), "b": numbers(12)}
PADS: dict[str, Any] = {"pads": [1, 1, 1, 1]}


def test_a_norm_behind_a_convolution_is_folded() -> None:
    for bias in (True, False):
        nodes = [conv("x", "a", bias=bias, **PADS), norm("a", "y")]
        assert operators(after(model_of(nodes, WEIGHTS | statistics("y", 8)), "batch norms")) == {"Conv": 1}
    nodes = [conv("x", "a", group=4, **PADS), norm("a", "y")]
    assert operators(after(model_of(nodes, GROUPED | statistics("y", 12)), "batch norms")) == {"Conv": 1}


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_norm_behind_a_fully_connected_layer_is_folded(transposed: int) -> None:
    weights = numbers(5, 8) if transposed else numbers(8, 5)
    constants = {"w": weights, "b": numbers(5), **statistics("y", 5)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["a"], transB=transposed), norm("a", "y")]
    assert operators(after(model_of(nodes, constants, shape=[8]), "batch norms")) == {"Gemm": 1}


def test_a_norm_before_a_convolution_without_padding_is_folded() -> None:
    for bias in (True, False):
        nodes = [norm("x", "a"), conv("a", "y", bias=bias, strides=[2, 1])]
        assert operators(after(model_of(nodes, WEIGHTS | statistics("a", 8)), "batch norms")) == {"Conv": 1}
    nodes = [norm("x", "a"), conv("a", "y", group=4)]
    assert operators(after(model_of(nodes, GROUPED | statistics("a", 8)), "batch norms")) == {"Conv": 1}


def test_norms_on_both_sides_and_in_a_row_are_folded() -> None:
    constants = WEIGHTS | statistics("a", 8) | statistics("c", 8) | statistics("y", 8)
    nodes = [norm("x", "a"), conv("a", "b0"), norm("b0", "c"), norm("c", "y")]
    assert operators(after(model_of(nodes, constants), "batch norms")) == {"Conv": 1}


def test_two_layers_that_share_weights_get_each_its_own() -> None:
    constants = WEIGHTS | statistics("c", 8) | statistics("d", 8)
    nodes = [
        conv("x", "a", **PADS), conv("x", "b0", **PADS), conv("x", "e", **PADS), norm("a", "c"), norm("b0", "d"),
        helper.make_node("Add", ["c", "d"], ["f"]), helper.make_node("Add", ["e", "f"], ["y"]),
    ]  # fmt: skip
    assert operators(after(model_of(nodes, constants), "batch norms")) == {"Conv": 3, "Add": 2}


RELU = helper.make_node("Relu", ["a"], ["r"])


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([norm("x", "a"), conv("a", "y", **PADS)], ["y"]),  # the zeros around would be moved
        ([norm("x", "a"), conv("a", "y", auto_pad="SAME_UPPER")], ["y"]),
        ([norm("x", "a"), RELU, conv("r", "y")], ["y"]),  # DenseNet's
        ([norm("x", "a"), conv("a", "y"), helper.make_node("Relu", ["a"], ["z"])], ["y", "z"]),
        ([norm("x", "a"), conv("a", "y")], ["y", "a"]),
        ([conv("x", "c", **PADS), norm("c", "a"), helper.make_node("Add", ["a", "c"], ["y"])], ["y"]),
        ([conv("x", "c", **PADS), norm("c", "a")], ["a", "c"]),
        ([conv("x", "c"), helper.make_node("Relu", ["c"], ["r"]), norm("r", "a")], ["a"]),
        ([helper.make_node("Concat", ["x", "x"], ["c"], axis=2), norm("c", "a"), RELU], ["r"]),
        (
            [helper.make_node("Mul", ["w", "w"], ["v"]), helper.make_node("Conv", ["x", "v"], ["c"]), norm("c", "a")],
            ["a"],
        ),
    ],
)
def test_a_norm_that_cannot_move_stays(nodes: list[onnx.NodeProto], outputs: list[str]) -> None:
    assert untouched(model_of(nodes, WEIGHTS | statistics("a", 8), outputs), "batch norms")


def test_a_norm_behind_a_layer_that_does_more_stays() -> None:
    constants = {"w": numbers(8, 5), "b": numbers(5), "one": numbers(1), **statistics("y", 5)}
    for bias, alpha in (("b", 0.5), ("one", 1.0)):
        nodes = [helper.make_node("Gemm", ["x", "w", bias], ["a"], alpha=alpha), norm("a", "y")]
        assert untouched(model_of(nodes, constants, shape=[8]), "batch norms")


# ---- global pools


@pytest.mark.parametrize(("axes", "keep"), [([2, 3], 1), ([-1, -2], 1), ([3, 2], 0)])
def test_a_mean_over_the_image_is_a_pool(axes: list[int], keep: int) -> None:
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keep)
    counted = operators(after(model_of([mean], {"axes": np.array(axes, np.int64)}), "global pools"))
    assert counted == {"GlobalAveragePool": 1} | ({} if keep else {"Flatten": 1})


@pytest.mark.parametrize(("axes", "shape"), [([1], SHAPE), ([2], SHAPE), ([1, 2, 3], SHAPE), ([1, 2], (6, 6))])
def test_a_mean_over_something_else_stays(axes: list[int], shape: tuple[int, ...]) -> None:
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"])
    assert untouched(model_of([mean], {"axes": np.array(axes, np.int64)}, shape=shape), "global pools")


# ---- the zoo's response norms, and quantization


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("small googlenet-2014", 1),
        pytest.param("alexnet-2012", 2, marks=pytest.mark.slow),
        pytest.param("vgg11-lrn", 1, marks=pytest.mark.slow),
    ],
)
def test_the_networks_with_response_norms_have_it_as_a_node(name: str, norms: int) -> None:
    arch = small(name.removeprefix("small ")) if name.startswith("small ") else archs.get(name)
    torch.manual_seed(0)
    model = arch.build(10).eval()
    graph = onnx_from_torch(model, arch.preprocess, uint8_input=False)
    assert operators(graph)["LRN"] == norms
    assert not operators(graph).keys() & {"Pow", "Div", "Pad"}
    # Five times as strong as pixels: there the usual alpha of 1e-4 is felt.
    inputs = 5 * arch.preprocess.normalize(made_images(2, arch.preprocess.size, 3, 0))
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(run(graph, inputs), expected, rtol=1e-3, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_network_with_response_norms_is_quantized_around_them(normed: nn.Module, target: str) -> None:
    graph = onnx_from_torch(normed, PREPROCESS, uint8_input=True)
    quantized = quantize(graph, calibrate(graph, [pixels(32)], "minmax"), target)
    assert operators(quantized)["LRN"] == 2
    images = pixels(64)[32:]
    assert signal_to_noise_db(run(graph, images), run(quantized, images)) > 28


@needs_tensorrt
def test_tensorrt_builds_response_norms_between_int8_layers(normed: nn.Module) -> None:
    graph = onnx_from_torch(normed, PREPROCESS, uint8_input=True)
    quantized = quantize(graph, calibrate(graph, [pixels(32)], "minmax"), "gpu")
    assert len(plan(quantized.SerializeToString(), (1, 2, 4))) > 10_000
