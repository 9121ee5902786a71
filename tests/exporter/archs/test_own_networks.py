"""The networks that no library has, against their papers."""

import re
from types import UnionType

import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs.alexnet import AlexNet2012, response_norm
from convoynet.exporter.archs.bninception import BLOCKS, BNInception, from_published
from convoynet.exporter.archs.densenet import with_new_names
from convoynet.exporter.archs.vgg import CifarVGG


def shapes_after(
    model: nn.Module, kinds: type[nn.Module] | UnionType, size: tuple[int, int, int]
) -> list[tuple[int, ...]]:
    """The shape of one image's output of each layer of a kind, in the order of the forward pass."""
    found: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape[1:])))
    model.eval()(torch.empty(1, *size, device="meta"))
    return found


def test_response_norm_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 7, 3, 3, dtype=torch.float64) * 100  # large, so that alpha matters
    expected = torch.empty_like(a)
    for i in range(7):  # section 3.3: the sum runs over max(0, i - n/2) to min(N - 1, i + n/2)
        total = sum(a[:, j] ** 2 for j in range(max(0, i - 2), min(6, i + 2) + 1))
        expected[:, i] = a[:, i] / (2 + 1e-4 * total) ** 0.75
    torch.testing.assert_close(response_norm()(a), expected)


def test_alexnet_2012_has_the_layers_of_figure_2() -> None:
    with torch.device("meta"):
        model = AlexNet2012(1000)
    neurons = [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]
    assert shapes_after(model, nn.Conv2d, (3, 227, 227)) == neurons
    assert shapes_after(model, nn.MaxPool2d, (3, 227, 227)) == [(96, 27, 27), (256, 13, 13), (256, 6, 6)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # "48 x 5 x 5", "256 x 3 x 3", "192 x 3 x 3", "192 x 3 x 3": what the kernels of layers 2 to 5 see
    assert [module.in_channels // module.groups for module in convolutions] == [3, 48, 256, 192, 192]


def test_alexnet_2012_keeps_the_halves_apart() -> None:
    torch.manual_seed(0)
    layer = AlexNet2012(10).features[4]
    x = torch.randn(1, 96, 5, 5)
    other = x.clone()
    other[:, 48:] = 0
    assert torch.equal(layer(x)[:, :128], layer(other)[:, :128])
    assert not torch.equal(layer(x)[:, 128:], layer(other)[:, 128:])


@pytest.mark.parametrize(("name", "norms"), [("vgg11-lrn", 1), ("vgg16-c", 0)])
def test_vgg_variants_differ_from_torchvisions_where_the_table_says(name: str, norms: int) -> None:
    with torch.device("meta"):
        model = archs.get(name).build(1000)
        same = archs.get(name[:5]).build(1000)
    assert sum(isinstance(module, nn.LocalResponseNorm) for module in model.modules()) == norms
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert kernels == ({(3, 3)} if name == "vgg11-lrn" else {(3, 3), (1, 1)})
    assert shapes_after(model, nn.Conv2d, (3, 224, 224)) == shapes_after(same, nn.Conv2d, (3, 224, 224))
    assert str(model.get_submodule("classifier")) == str(same.get_submodule("classifier"))


def test_cifar_vgg_ends_in_one_pixel_and_one_layer() -> None:
    with torch.device("meta"):
        model = CifarVGG(10)
    assert shapes_after(model, nn.MaxPool2d, (3, 32, 32))[-1] == (512, 1, 1)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [nn.Linear]


@pytest.mark.parametrize(
    ("name", "pooled"),
    [("nin", [(96, 27, 27), (256, 13, 13), (384, 6, 6)]), ("nin-cifar", [(96, 16, 16), (192, 8, 8)])],
)
def test_nin_pools_round_up_and_the_last_maps_are_the_classes(name: str, pooled: list[tuple[int, ...]]) -> None:
    arch = archs.get(name)
    with torch.device("meta"):
        features = arch.build(arch.num_classes).get_submodule("features")
    assert shapes_after(features, nn.MaxPool2d | nn.AvgPool2d, arch.input_size) == pooled
    with torch.device("meta"):
        features = arch.build(arch.num_classes).get_submodule("features")
    assert shapes_after(features, nn.Conv2d, arch.input_size)[-1] == (arch.num_classes, *pooled[-1][1:])


def test_bninception_blocks_have_the_sizes_of_the_released_network() -> None:
    with torch.device("meta"):
        model = BNInception(1000)
    found: list[tuple[int, ...]] = []
    for block in model.inception.values():
        block.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape[1:])))
    model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    widths = [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    pixels = [28, 28, 14, 14, 14, 14, 14, 7, 7, 7]
    assert dict(zip(BLOCKS, found, strict=True)) == {
        name: (width, side, side) for name, width, side in zip(BLOCKS, widths, pixels, strict=True)
    }


def as_published(model: BNInception) -> dict[str, Tensor]:
    """The weights of `model` as the released file has them: flat names, BGR, and Caffe's first dimension."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        old = re.sub(r"^inception\.(..)\.conv_", r"inception_\1_", name)
        old = old.replace(".conv.", ".").replace(".bn.", "_bn.")
        tensors[old] = tensor.unsqueeze(0) if "_bn." in old else tensor
    tensors["conv1_7x7_s2.weight"] = tensors["conv1_7x7_s2.weight"][:, [2, 1, 0]]
    return tensors


def test_bninception_reads_the_names_and_the_colours_of_the_released_file() -> None:
    torch.manual_seed(0)
    model = BNInception(10)
    published = as_published(model)
    assert {"inception_3a_double_3x3_reduce.weight", "inception_5b_pool_proj_bn.running_var"} <= published.keys()
    converted = from_published(published)
    expected = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())


def test_bninception_subtracts_caffes_means() -> None:
    preprocess = archs.get("bninception").preprocess
    pixels = torch.tensor([[[[130, 120, 110]]]], dtype=torch.uint8).numpy()  # RGB
    assert preprocess.normalize(pixels).ravel() == pytest.approx([130 - 128, 120 - 117, 110 - 104], abs=1e-4)


def test_densenet_renames_the_tensors_of_its_published_files() -> None:
    with torch.device("meta"):
        tensors = archs.get("densenet121").build(1000).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): t for name, t in tensors.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert with_new_names(old).keys() == tensors.keys()
    assert with_new_names(tensors).keys() == tensors.keys()
