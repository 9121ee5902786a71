import json
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from convoynet.exporter import archs, assets
from convoynet.exporter.archs import facts, table, weights
from convoynet.exporter.archs.registry import register
from convoynet.exporter.archs.resnet import BasicBlock, CifarResNet
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from tests.exporter.published_counts import MULTIPLY_ADDS, PARAMETERS

# One of each family, small where there is a choice; the others are built by the slow tests.
REPRESENTATIVES = {
    "alexnet", "alexnet-2012", "bninception", "densenet121", "drn_c_26", "drn_d_22", "efficientnet_b0", "googlenet",
    "googlenet-2014", "inception_v3", "inception_v4", "lenet5", "lenet5-softmax", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenetv1_100", "nin", "nin-cifar", "resnet18", "resnet20", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11", "vgg11-lrn", "vgg11_bn", "vgg16-c", "vgg16-cifar",
    "wide_resnet50_2", "xception", "zfnet",
}  # fmt: skip
CLASSIFIERS = [name for name in archs.names() if archs.get(name).task == "classification"]
EVERY_CLASSIFIER = [
    pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in CLASSIFIERS
]


def build_resnet20() -> CifarResNet:
    model = archs.get("resnet20").build(10)
    assert isinstance(model, CifarResNet)
    return model


def build_on_meta(arch: archs.Arch, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return arch.build(num_classes).eval()


@cache
def row(name: str) -> dict[str, Any]:
    """Counting takes a second for some networks."""
    return table.row(name)


@pytest.mark.parametrize("name", archs.names())
class TestEveryArch:
    def test_describes_itself(self, name: str) -> None:
        arch = archs.get(name)
        assert arch.name == name
        assert arch.paper
        assert arch.source in ("own", "torchvision", "timm")
        assert len(arch.labels()) == arch.num_classes
        assert bool(arch.published_name) == (arch.published is not None)

    def test_has_the_published_number_of_parameters(self, name: str) -> None:
        parameters, source = PARAMETERS[name]
        assert row(name)["parameters"] == parameters, source

    def test_is_listed_as_it_is(self, name: str) -> None:
        listed = {network["name"]: network for network in json.loads(assets.ZOO.read_text())}
        assert listed.get(name) == row(name), "run python -m convoynet.exporter.archs.table"


def test_the_list_has_every_network_that_a_module_registers_and_no_other() -> None:
    listed = {network["name"]: network["module"] for network in json.loads(assets.ZOO.read_text())}
    assert listed == table.networks()
    assert list(listed) == archs.names()
    assert set(facts.recorded()) == set(listed)


def test_a_network_that_is_registered_and_not_recorded_is_found() -> None:
    code = (
        "from convoynet.exporter import archs\n"
        "archs.register('of-a-plugin')(lambda: 'described')\n"
        "assert archs.get('of-a-plugin') == 'described'\n"
        "assert 'of-a-plugin' in archs.names() and 'lenet5' in archs.names()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if archs.get(name).source == "torchvision"])
def test_counts_equal_torchvisions_documentation(name: str) -> None:
    meta = get_model_weights(name).DEFAULT.meta
    # Of Inception v3 they count the auxiliary classifier too.
    assert row(name)["parameters"] == meta["num_params"] - (3_326_696 if name == "inception_v3" else 0)
    # Their billions have three decimals.
    assert row(name)["macs"] / 1e9 == pytest.approx(meta["_ops"], rel=0.01, abs=0.0005)


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_counts_equal_other_published_ones(name: str) -> None:
    multiply_adds, source = MULTIPLY_ADDS[name]
    assert row(name)["macs"] == pytest.approx(multiply_adds, rel=0.01), source


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 1202])
def test_cifar_resnets_have_the_layers_of_section_4_2(depth: int) -> None:
    n = (depth - 2) // 6
    pairs = [(3, 16, 1024, 1)]
    for inputs, outputs, pixels in ((16, 16, 1024), (16, 32, 256), (32, 64, 64)):
        pairs += [(inputs, outputs, pixels, 1), (outputs, outputs, pixels, 2 * n - 1)]
    convolutions = [(9 * inputs * outputs, outputs, pixels, times) for inputs, outputs, pixels, times in pairs]
    parameters = sum((kernels + 2 * outputs) * times for kernels, outputs, _, times in convolutions) + 64 * 10 + 10
    macs = sum(kernels * pixels * times for kernels, _, pixels, times in convolutions) + 64 * 10
    assert (row(f"resnet{depth}")["parameters"], row(f"resnet{depth}")["macs"]) == (parameters, macs)


@pytest.mark.parametrize("name", EVERY_CLASSIFIER)
class TestForward:
    def test_gives_a_score_for_each_class(self, name: str) -> None:
        arch = archs.get(name)
        model = build_on_meta(arch, arch.num_classes)
        for batch in (1, 3):
            scores = model(torch.empty(batch, *arch.input_size, device="meta"))
            assert isinstance(scores, torch.Tensor)
            assert scores.shape == (batch, arch.num_classes)
            assert scores.dtype == torch.float32

    def test_takes_another_number_of_classes_or_says_why_not(self, name: str) -> None:
        arch = archs.get(name)
        if arch.fixed_classes:
            with pytest.raises(BadInput, match=f"{name} with 7 classes: {re.escape(arch.fixed_classes)}"):
                arch.build(7)
            return
        model = build_on_meta(arch, 7)
        assert model(torch.empty(2, *arch.input_size, device="meta")).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_an_image_as_it_does_among_others(name: str) -> None:
    arch = archs.get(name)
    torch.manual_seed(0)
    model = arch.build(arch.num_classes)
    images = arch.preprocess.normalize(made_images(3, arch.preprocess.size, arch.input_size[0], 0))
    weights.estimate_statistics(model, images)  # with those of a fresh network, 1,202 layers overflow
    inputs = torch.from_numpy(images)
    with torch.no_grad():
        together = model(inputs)
        alone = model(inputs[1:2])
    assert together.shape == (3, arch.num_classes)
    assert torch.isfinite(together).all()
    assert together.std() > 0
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4 * float(together.abs().max()))


def test_count_leaves_the_model_as_it_was() -> None:
    model = build_resnet20()
    model.layer2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    archs.count(model, (3, 32, 32))
    assert model.training
    assert not model.layer2.training
    assert model.layer3.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_count_knows_groups_and_bias_free_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4, bias=False),  # 8 x 6 x 6 outputs of 9 products
        nn.Flatten(),
        nn.Linear(288, 5),
    )
    assert archs.count(model, (4, 8, 8)) == archs.Count(8 * 9 + 288 * 5 + 5, 8 * 36 * 9 + 288 * 5)


def test_build_follows_the_seed() -> None:
    torch.manual_seed(1)
    first = build_resnet20().conv1.weight
    torch.manual_seed(1)
    assert torch.equal(first, build_resnet20().conv1.weight)
    assert not torch.equal(first, build_resnet20().conv1.weight)


def test_names_are_sorted_and_lower_case() -> None:
    assert archs.names() == sorted(archs.names())
    assert all(name == name.lower() for name in archs.names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "unknown architecture 'resnet51': did you mean .*resnet50.*`convoy archs`"),
        ("ResNet101", "did you mean resnet101"),
        ("zzz", "unknown architecture 'zzz': `convoy archs` lists them all"),
        ("trained.pt", "--arch trained.pt: a file of weights is no network: --arch NAME --weights trained.pt"),
    ],
)
def test_unknown_name_is_told_the_close_matches(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        archs.get(name)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'resnet50' is registered twice"):
        register("resnet50")(lambda: archs.get("resnet18"))


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = build_resnet20().layer2[0]
    assert isinstance(block, BasicBlock)
    x = torch.randn(1, 16, 8, 8)
    shortcut = block.shortcut(x)
    assert shortcut.shape == (1, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


def test_torchvision_preprocessing_comes_from_its_weights() -> None:
    assert archs.get("resnet50").preprocess.resize == 232  # IMAGENET1K_V2
    assert archs.get("resnet18").preprocess.resize == 256  # IMAGENET1K_V1
    assert archs.get("resnet18").preprocess.size == (224, 224)
    assert archs.get("resnet18").labels()[:2] == ["tench", "goldfish"]


def test_timm_preprocessing_comes_from_its_configuration() -> None:
    preprocess = archs.get("xception").preprocess
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == ((299, 299), 333, "bicubic")  # 299/0.8975
    assert preprocess.mean == preprocess.std == (0.5, 0.5, 0.5)


def test_zfnet_has_the_maps_of_figure_3() -> None:
    network = build_on_meta(archs.get("zfnet"), 1000)
    sides, x = [], torch.empty(1, 3, 224, 224, device="meta")
    for layer in network.get_submodule("features").children():
        x = layer(x)
        sides += [x.shape[-1]] if isinstance(layer, nn.Conv2d | nn.MaxPool2d) else []
    assert sides == [110, 55, 26, 13, 13, 13, 13, 6]
    assert x[0].numel() == 9216


@pytest.mark.parametrize(
    ("name", "size"),
    [("efficientnet_b1", 240), ("efficientnet_b7", 600), ("alexnet-2012", 227), ("inception_v4", 299)],
)
def test_networks_have_their_own_input_sizes(name: str, size: int) -> None:
    assert archs.get(name).input_size == (3, size, size)
