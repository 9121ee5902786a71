import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from tests.exporter.onnx_runs import operators, run
from tests.exporter.small_nets import PREPROCESS, logits_of, pixels, settled, small_net


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def float_graph(model: nn.Module) -> onnx.ModelProto:
    return onnx_from_torch(model, PREPROCESS, uint8_input=False)


@pytest.fixture(scope="module")
def pixel_graph(model: nn.Module) -> onnx.ModelProto:
    return onnx_from_torch(model, PREPROCESS, uint8_input=True)


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_both_inputs_compute_what_pytorch_computes(
    model: nn.Module, float_graph: onnx.ModelProto, pixel_graph: onnx.ModelProto, batch: int
) -> None:
    images = pixels(batch)
    expected = logits_of(model, images)
    np.testing.assert_allclose(run(float_graph, PREPROCESS.normalize(images)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(pixel_graph, images), expected, rtol=1e-4, atol=1e-5)


def test_names_types_and_the_dynamic_batch(float_graph: onnx.ModelProto, pixel_graph: onnx.ModelProto) -> None:
    for graph, shape, data_type in (
        (float_graph.graph, ["batch", 3, 32, 32], onnx.TensorProto.FLOAT),
        (pixel_graph.graph, ["batch", 32, 32, 3], onnx.TensorProto.UINT8),
    ):
        (source,), (result,) = graph.input, graph.output
        assert (source.name, dims(source), source.type.tensor_type.elem_type) == ("input", shape, data_type)
        assert (result.name, dims(result)) == ("logits", ["batch", 20])
    assert float_graph.opset_import[0].version == 20


def test_the_graph_holds_only_what_inference_needs(float_graph: onnx.ModelProto, pixel_graph: onnx.ModelProto) -> None:
    counted = operators(float_graph)
    assert counted == {
        "Conv": 8, "Relu": 6, "Clip": 1, "Add": 2, "Concat": 1, "MaxPool": 1,
        "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1,
    }  # fmt: skip
    assert operators(pixel_graph) - counted == {"Cast": 1, "Transpose": 1, "Mul": 1, "Add": 1}
    read = {name for node in float_graph.graph.node for name in node.input}
    assert {tensor.name for tensor in float_graph.graph.initializer} <= read


def test_nothing_of_this_machine_is_in_the_file(float_graph: onnx.ModelProto) -> None:
    content = float_graph.SerializeToString()
    assert b".py" not in content
    assert b"site-packages" not in content


@pytest.mark.usefixtures("exported_anew")
def test_the_same_model_gives_the_same_bytes(model: nn.Module, float_graph: onnx.ModelProto) -> None:
    again = onnx_from_torch(model, PREPROCESS, uint8_input=False)
    assert again.SerializeToString(deterministic=True) == float_graph.SerializeToString(deterministic=True)


@pytest.mark.usefixtures("exported_anew")
def test_the_exporter_says_nothing_and_leaves_the_mode(capfd: pytest.CaptureFixture[str]) -> None:
    model = small_net().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        onnx_from_torch(model, PREPROCESS, uint8_input=False)
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert not caught


def test_a_pool_of_one_pixel_and_dropout_disappear_even_at_the_end() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.AvgPool2d(1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3600, 5),
        nn.Dropout(),
        nn.Identity(),
    ]
    graph = onnx_from_torch(nn.Sequential(*layers), PREPROCESS, uint8_input=False)
    assert operators(graph) in ({"Conv": 1, "Relu": 1, flat: 1, "Gemm": 1} for flat in ("Flatten", "Reshape"))
    assert graph.graph.output[0].name == "logits"


class MeanNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.conv(x).mean((2, 3))
        return mean


def test_a_mean_that_drops_its_axes_is_pooling_too() -> None:
    torch.manual_seed(0)
    model = MeanNet().eval()
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=True)
    assert operators(graph)["GlobalAveragePool"] == 1
    np.testing.assert_allclose(run(graph, pixels(3)), logits_of(model, pixels(3)), rtol=1e-4, atol=1e-5)


def test_lenet5_sparse_kernel_becomes_a_constant_and_greyscale_pixels_work() -> None:
    lenet = archs.get("lenet5")
    torch.manual_seed(0)
    model = lenet.build(10).eval()
    graph = onnx_from_torch(model, lenet.preprocess, uint8_input=True)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    kernels = [stored[node.input[1]] for node in graph.graph.node if node.op_type == "Conv"]  # KeyError if computed
    (c3,) = (onnx.numpy_helper.to_array(kernel) for kernel in kernels if list(kernel.dims[:2]) == [16, 6])
    assert int((c3 != 0).any(axis=(2, 3)).sum()) == 60  # Table I has 60 connections
    images = made_images(5, lenet.preprocess.size, 1, 0)
    with torch.no_grad():
        expected = model(torch.from_numpy(lenet.preprocess.normalize(images))).numpy()
    np.testing.assert_allclose(run(graph, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [18, 25])
def test_the_opset_is_the_one_asked_for(opset: int) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), PREPROCESS.normalize(pixels(4)))
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=False, opset=opset)
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]
    assert "BatchNormalization" not in operators(graph)


@pytest.mark.parametrize("opset", [17, 26])
def test_an_opset_that_the_exporter_would_change_in_silence_is_refused(opset: int) -> None:
    with pytest.raises(BadInput, match=f"opset {opset}: use 18 to 25"):
        onnx_from_torch(nn.Flatten(), PREPROCESS, uint8_input=False, opset=opset)


class Huge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2**15, 2**14, device="meta")


def test_two_gigabytes_of_weights_are_refused_before_any_work() -> None:
    with pytest.raises(BadInput, match="less than 2"):
        onnx_from_torch(Huge(), PREPROCESS, uint8_input=False)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(("model", "message"), [(TwoOutputs(), "2 tensors"), (DataDependent(), "cannot be exported")])
def test_a_network_that_is_no_classifier_is_refused_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        onnx_from_torch(model, PREPROCESS, uint8_input=False)
    assert "\n" not in str(error.value)


class Squeezing(nn.Module):
    """Drops every axis of one, as people write it, within the network and at its end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3), keepdim=True).squeeze()).squeeze()
        return made.reshape(-1, 1)


def test_squeeze_names_the_axes_that_it_drops() -> None:
    network = Squeezing().eval()
    graph = onnx_from_torch(network, PREPROCESS, uint8_input=True)
    assert all(len(node.input) == 2 for node in graph.graph.node if node.op_type == "Squeeze")
    images = pixels(3)
    expected = logits_of(network, images)
    for some in (slice(0, 1), slice(0, 3)):
        np.testing.assert_allclose(run(graph, images[some]), expected[some], rtol=1e-4, atol=1e-5)
    # One that has a fixed rank is one that it can read.
    openvino = pytest.importorskip("openvino")
    network_in = openvino.Core().read_model(graph.SerializeToString())
    compiled = openvino.Core().compile_model(network_in, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([images[:1]])[0], expected[:1], rtol=1e-4, atol=1e-4)
