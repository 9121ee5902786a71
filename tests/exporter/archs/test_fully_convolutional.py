"""Classifiers as convolutions: one position of the map is the classifier, and so is every other."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import VGG, DenseNet, ResNet, get_model
from torchvision.models.resnet import BasicBlock

from convoynet.exporter import archs
from convoynet.exporter.archs import custom, weights
from convoynet.exporter.archs.alexnet import AlexNet2012
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.archs.fully_convolutional import fully_convolutional
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from tests.exporter.onnx_runs import run as run_graph

CONVERTIBLE = (
    "alexnet", "alexnet-2012", "densenet121", "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "resnet18",
    "resnext50_32x4d", "vgg11-lrn", "vgg16", "vgg16-c", "vgg16-cifar", "vgg16_bn", "wide_resnet50_2",
)  # fmt: skip


def thin_vgg(*, batch_norm: bool = False) -> VGG:
    """torchvision's VGG with four channels, its pools and its 7x7 pooling."""
    layers: list[nn.Module] = []
    for inputs in (3, 4, 4, 4, 4):
        layers.append(nn.Conv2d(inputs, 4, 3, padding=1))
        layers += [nn.BatchNorm2d(4)] if batch_norm else []
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    network = VGG(nn.Sequential(*layers), num_classes=6)
    network.classifier = nn.Sequential(
        nn.Linear(4 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(True), nn.Linear(16, 6)
    )
    return network


def settled(network: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """In evaluation mode, with the statistics of some images."""
    estimate_statistics(network, images(2, size))
    return network.eval()


def images(count: int, size: tuple[int, int, int]) -> NDArray[np.float32]:
    pixels = made_images(count, size[1:], size[0], 0)
    return ((pixels.astype(np.float32) / 255 - 0.45) / 0.22).transpose(0, 3, 1, 2).copy()


def run(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = network(inputs)
    return result


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    assert float(wanted.std()) > 0
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def build(kind: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    if kind == "vgg":
        return settled(thin_vgg(batch_norm=True), (3, 224, 224)), (3, 224, 224)
    if kind == "resnet":
        return settled(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=6), (3, 64, 64)), (3, 64, 64)
    if kind == "densenet":
        return settled(DenseNet(8, (2, 2), 16, num_classes=6), (3, 64, 64)), (3, 64, 64)
    if kind == "vgg16-cifar":
        return settled(archs.get(kind).build(6), (3, 32, 32)), (3, 32, 32)
    return settled(get_model(kind, num_classes=6), (3, 64, 64)), (3, 64, 64)


@pytest.mark.parametrize("kind", ["vgg", "resnet", "densenet", "vgg16-cifar", "mobilenet_v3_small", "mobilenet_v2"])
def test_at_its_own_size_it_is_the_classifier(kind: str) -> None:
    network, size = build(kind)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    converted = fully_convolutional(network, size)
    inputs = torch.from_numpy(images(3, size))
    logits, maps = run(network, inputs), run(converted, inputs)
    assert maps.shape == (3, 6, 1, 1)
    assert_equal(maps[:, :, 0, 0], logits)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(isinstance(module, nn.Linear) for module in converted.modules())


def test_each_position_is_the_head_on_its_window_of_the_features() -> None:
    network, size = build("vgg")
    assert isinstance(network, VGG)
    converted = fully_convolutional(network, size)
    inputs = torch.from_numpy(images(2, (3, 384, 320)))
    maps, features = run(converted, inputs), run(network.features, inputs)
    assert maps.shape == (2, 6, 6, 4)
    for row in range(6):
        for column in range(4):
            window = features[:, :, row : row + 7, column : column + 7]
            assert_equal(maps[:, :, row, column], run(network.classifier, window.flatten(1)))


def test_each_position_of_a_resnet_averages_its_window() -> None:
    network, size = build("resnet")
    assert isinstance(network, ResNet)
    converted = fully_convolutional(network, size)
    inputs = torch.from_numpy(images(1, (3, 96, 128)))
    maps, features = run(converted, inputs), run(converted.features, inputs)  # type: ignore[arg-type]
    assert maps.shape == (1, 6, 2, 3)
    for row in range(2):
        for column in range(3):
            window = features[:, :, row : row + 2, column : column + 2]
            assert_equal(maps[:, :, row, column], run(network.fc, window.mean((2, 3))))


def test_crops_of_the_image_have_other_borders() -> None:
    """A crop is padded with zeros where the whole image has pixels: close, and not the same."""
    network, size = build("vgg")
    maps = run(fully_convolutional(network, size), inputs := torch.from_numpy(images(1, (3, 384, 384))))
    cosines = []
    for row in range(6):
        for column in range(6):
            crop = inputs[:, :, 32 * row : 32 * row + 224, 32 * column : 32 * column + 224]
            cosines.append(float(F.cosine_similarity(run(network, crop), maps[:, :, row, column])))
    assert 0.9 < min(cosines) < 1 - 1e-6


def test_a_network_with_weights_is_converted_after_they_are_loaded() -> None:
    """The tensors are shared, so VGG's 400 MB are there once."""
    network, size = build("vgg")
    converted = fully_convolutional(network, size)
    shared = {tensor.data_ptr() for tensor in network.parameters()}
    assert {tensor.data_ptr() for tensor in converted.parameters()} == shared


def test_statistics_are_estimated_at_a_size_that_the_classifier_does_not_take() -> None:
    arch = custom.resolve(ExportConfig("vgg16-cifar", fully_convolutional=True, input_size=(64, 96)))
    network = arch.build(10)
    loaded = weights.load(network, arch, "random", seed=0, images=made_images(4, (64, 96), 3, 0))
    assert loaded.source == "random, seed 0"
    means = [module.running_mean for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(mean is not None and mean.abs().max() > 0 for mean in means)
    assert run(arch.deploy(network), torch.zeros(1, 3, 64, 96)).shape == (1, 10, 2, 3)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_zoo(name: str) -> None:
    arch = custom.resolve(ExportConfig(name, fully_convolutional=True))
    assert arch.task == "segmentation"
    with torch.device("meta"):
        network = arch.build(arch.num_classes)
    converted = arch.deploy(network)
    maps = dry_run(converted, arch.input_size)
    assert isinstance(maps, Tensor)
    assert maps.shape == (1, arch.num_classes, 1, 1)
    assert archs.count(converted, arch.input_size) == archs.count(network, arch.input_size)


def test_vgg_at_384_gives_6_by_6() -> None:
    arch = custom.resolve(ExportConfig("vgg16", fully_convolutional=True, input_size=(384, 384)))
    assert (arch.input_size, arch.preprocess.resize) == ((3, 384, 384), 439)
    with torch.device("meta"):
        maps = dry_run(arch.deploy(arch.build(1000)), arch.input_size)
    assert isinstance(maps, Tensor)
    assert maps.shape == (1, 1000, 6, 6)


@pytest.mark.slow
def test_vgg16_and_alexnet_with_numbers() -> None:
    """Of the real ones, with few classes."""
    torch.manual_seed(0)
    for network, size in ((get_model("vgg16", num_classes=5), 224), (AlexNet2012(5), 227)):
        network.eval()
        inputs = torch.from_numpy(images(1, (3, size, size)))
        assert_equal(run(fully_convolutional(network, (3, size, size)), inputs).flatten(1), run(network, inputs))


def test_as_onnx() -> None:
    network, size = build("vgg")
    arch = custom.resolve(ExportConfig("vgg16", fully_convolutional=True, input_size=(288, 256)))
    converted = fully_convolutional(network, size)
    graph = onnx_from_torch(converted, arch.preprocess, uint8_input=False)
    kinds = [node.op_type for node in graph.graph.node]
    assert set(kinds) == {"Conv", "Relu", "MaxPool"}
    assert kinds.count("Conv") == 5 + 3
    inputs = images(3, (3, 288, 256))
    found = run_graph(graph, inputs)
    assert found.shape == (3, 6, 3, 2)
    assert_equal(torch.from_numpy(found), run(converted, torch.from_numpy(inputs)))


class Surprise(nn.Module):
    """Has the parts of a classifier and does something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classifier = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).amax((2, 3)))
        return logits


def test_a_network_that_does_more_than_its_layers_say_is_refused() -> None:
    with pytest.raises(BadInput, match="does more than its layers say; leave the option out"):
        fully_convolutional(Surprise(), (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lenet5", {}, "lenet5: --fully-convolutional knows heads .* has no `features` and `classifier`"),
        ("squeezenet1_1", {}, "has a Conv2d"),
        ("fcn_resnet50", {}, "fcn_resnet50 is for segmentation"),
        ("vgg11", {"input_size": (192, 384)}, "--input-size 192x384 .*: vgg11 needs 224x224 or more"),
    ],
)
def test_what_cannot_be_converted_is_said(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        custom.resolve(ExportConfig(name, fully_convolutional=True, **options))
    assert "\n" not in str(caught.value)
