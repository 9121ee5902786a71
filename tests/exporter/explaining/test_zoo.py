"""Explanations of every classifier of the zoo, beside the gradient in PyTorch and captum's LayerGradCam."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.explaining.embedding import with_features
from convoynet.exporter.explaining.feature_map import head_of
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.explaining.reference import reference_maps
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Edge
from convoynet.exporter.graph.onnx_to_torch import TorchGraph
from tests.exporter.explaining.test_grad_cam import ROUNDING, Array, Runner, error, ran
from tests.exporter.small_nets import settled
from tests.exporter.studies.small_families import small

QUICK = {"lenet5", "resnet20", "squeezenet1_1"}
CLASSIFIERS = [name for name in archs.names() if archs.get(name).task == "classification"]
SAME_FEATURES = 1e-5
"""What the nodes of the explanation may add, of the largest value."""


def read_by(model: nn.Module, layer: nn.Module, inputs: Array) -> Array:
    """What a layer reads, the mean over the places of maps, by a hook."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, given, made: seen.append(given[0].detach()))
    with torch.no_grad():
        model(torch.from_numpy(inputs))
    hook.remove()
    read = seen[-1]
    found: Array = (read.mean((2, 3)) if read.ndim == 4 else read).numpy()
    return found


def last_layer(model: nn.Module) -> nn.Module:
    return [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)][-1]


@pytest.mark.parametrize(
    "name",
    ["small mobilenet_v3", *(pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CLASSIFIERS)],
)
def test_every_classifier_of_the_zoo(name: str) -> None:
    arch = small(name.removeprefix("small ")) if name.startswith("small ") else archs.get(name)
    torch.manual_seed(0)
    side = arch.preprocess.size[0]
    if name in QUICK or name not in CLASSIFIERS:
        side = min(side, 64)
    preprocess = replace(arch.preprocess, size=(side, side), resize=side)
    images = made_images(5, preprocess.size, preprocess.channels, 0)
    model = arch.deploy(arch.build(arch.num_classes)).eval()
    graph = onnx_from_torch(model, preprocess, uint8_input=False)
    made = with_features(explained(graph))
    for count in (1, 5):
        inputs = preprocess.normalize(images[:count])
        found = ran(made, inputs)
        assert np.array_equal(found["logits"], ran(graph, inputs)["logits"])
        wanted = reference_maps(graph, inputs, found["logits"].argmax(1))
        if wanted.any():
            assert error(found["explanation"], wanted) < ROUNDING
        if name == "lenet5":  # whose last layer is one of distances
            assert found["features"].shape == (count, 84)
        else:
            assert error(found["features"], read_by(model, last_layer(model), inputs)) < ROUNDING


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CLASSIFIERS])
def test_every_classifier_of_the_zoo_against_captum(name: str) -> None:
    """For the winner and another class, alone and in a batch, at the module whose output is the map in the graph.

    Of the features that ONNX Runtime computes the maps are the same. What PyTorch makes of the image differs from these
    by the rounding of all layers, with random weights in more than a hundred of them by more than ROUNDING.
    """
    captum = pytest.importorskip("captum.attr")
    arch = archs.get(name)
    torch.manual_seed(0)
    model = arch.build(arch.num_classes)
    preprocess = smaller(model, arch.preprocess)
    images = preprocess.normalize(made_images(5, preprocess.size, preprocess.channels, 0))
    settled(model, images)
    model.requires_grad_(False)
    for module in model.modules():  # captum takes no module that changes what it reads
        if hasattr(module, "inplace"):
            module.inplace = False
    graph = onnx_from_torch(model, preprocess, uint8_input=False)
    run = Runner(explained(graph))
    features = head_of(graph, "logits").features
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    probed.graph.output.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, None))
    network: nn.Module = model
    layer = module_that_makes(model, torch.from_numpy(images), ran(probed, images)[features])
    if layer is None:  # some networks call functions there
        network = WithModule(graph, features)
        layer = network.features
    gradients = captum.LayerGradCam(network, layer)
    for count in (1, 5):
        inputs = images[:count]
        winners, same = run(inputs)["logits"].argmax(1), ran(probed, inputs)[features]
        most = 0.0  # of the winner's map, beside which that of another class may be little: a sum that nearly cancels
        for classes in (winners, (winners + 1) % arch.num_classes):
            found = run(inputs, classes)["explanation"]
            with of(layer, same) as torchs:
                signed = captums(gradients, inputs, classes)
            most = most or float(np.abs(signed).max())
            assert np.abs(found - np.maximum(signed, 0)).max() < SAME_FEATURES * most
            apart = np.abs(found - np.maximum(captums(gradients, inputs, classes), 0)).max()
            assert apart < max(ROUNDING, 2 * error(torchs[-1], same)) * most


def captums(gradients: Any, inputs: Array, classes: Array) -> Array:
    """LayerGradCam of each image, [batch, height, width], with what is below zero."""
    given = torch.from_numpy(inputs).requires_grad_()
    found: Array = gradients.attribute(given, target=torch.from_numpy(classes)).detach().numpy()[:, 0]
    return found


@contextmanager
def of(layer: nn.Module, features: Array) -> Iterator[list[Array]]:
    """The layer makes these numbers, and hands gradients on as it does; what it would have made is in the list."""
    values = torch.from_numpy(features)
    own: list[Array] = []

    def replaced(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        own.append(made.detach().numpy())
        return made + (values - made).detach()

    hook = layer.register_forward_hook(replaced)
    try:
        yield own
    finally:
        hook.remove()


class WithModule(nn.Module):
    """A graph in which one tensor goes through a module of its own."""

    def __init__(self, graph: onnx.ModelProto, tensor: str) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.passed: Tensor | None = None

        def read(edge: Edge, value: Tensor) -> Tensor:
            if edge.tensor != tensor:
                return value
            if self.passed is None:
                self.passed = self.features(value)
            return self.passed

        self.graph = TorchGraph(graph, None, read).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.passed = None
        result: Tensor = self.graph(x)
        return result


def smaller(model: nn.Module, preprocess: Preprocess) -> Preprocess:
    """With images of 160 x 160, where they are larger and the network pools to one place or takes those."""
    pools = [module for module in model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    if max(preprocess.size) <= 160 or any(pool.output_size not in (1, (1, 1)) for pool in pools):
        return preprocess
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, preprocess.channels, 160, 160))
    except RuntimeError:
        return preprocess
    return replace(preprocess, size=(160, 160), resize=160)


def module_that_makes(model: nn.Module, inputs: Tensor, wanted: Array) -> nn.Module | None:
    made: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.shape == wanted.shape:
            made.append((module, output.detach().clone()))  # some functions change what a module has made

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    scale = 1e-3 * np.abs(wanted).max()
    return next((module for module, output in reversed(made) if np.abs(output.numpy() - wanted).max() < scale), None)
