from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.compression.separable import separate
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Separable
from tests.exporter.small_nets import small_net

EXAMPLE = torch.zeros(1, 3, 32, 32)
CANDIDATES = ["wide.0", "again.0", "right.0"]


def test_replaces_all_standard_convolutions() -> None:
    network = small_net()
    separated, done = separate(network, EXAMPLE, Separable())
    assert sorted(row["layer"] for row in done["layers"]) == sorted(CANDIDATES)
    costs = [row["macs"]["before"] for row in done["layers"]]
    assert all(first >= second for first, second in pairwise(costs))
    for name in CANDIDATES:
        pair = separated.get_submodule(name)
        assert isinstance(pair, nn.Sequential)
        depthwise, pointwise = pair
        assert depthwise.groups == depthwise.in_channels
        assert pointwise.kernel_size == (1, 1)
    assert isinstance(network.get_submodule("wide.0"), nn.Conv2d)
    assert isinstance(separated.get_submodule("wide.1"), nn.BatchNorm2d)
    counted = archs.count(separated, (3, 32, 32))
    assert done["macs"]["after"] == counted.macs
    assert done["parameters"]["after"] == counted.parameters
    saved = sum(row["macs"]["before"] - row["macs"]["after"] for row in done["layers"])
    assert done["macs"]["before"] - done["macs"]["after"] == saved
    with torch.no_grad():
        assert separated(torch.randn(2, 3, 32, 32)).shape == (2, 20)


def test_the_costliest_first_until_the_ratio_is_reached() -> None:
    _, done = separate(small_net(), EXAMPLE, Separable(ratio=0.4))
    # again and right cost 32x32 channels each, wide half of it: one is 40 %.
    assert [row["layer"] for row in done["layers"]] == ["again.0"]


def test_a_convolution_that_is_separable_stays_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2))
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oi,ikl->oikl", torch.randn(12, 8), torch.randn(8, 3, 5)))
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    separated, done = separate(network, torch.zeros(1, 8, 20, 20), Separable())
    x = torch.randn(2, 8, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(separated(x), network(x), rtol=1e-4, atol=1e-5)
    assert done["layers"][0]["relative_error"] < 1e-6


def test_it_starts_from_the_best_filter_of_each_input_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, 3, padding=1, bias=False)
    network = nn.Sequential(layer)
    separated, done = separate(network, torch.zeros(1, 6, 8, 8), Separable())
    pair = separated.get_submodule("0")
    assert isinstance(pair, nn.Sequential)
    depthwise, pointwise = (part.weight.detach() for part in pair)
    made = torch.einsum("oi,ikl->oikl", pointwise[..., 0, 0], depthwise[:, 0])
    weight, rest = layer.weight.detach(), 0.0
    for channel in range(6):
        values = torch.linalg.svdvals(weight[:, channel].flatten(1))
        rest += float((values[1:] ** 2).sum())
    assert float((weight - made).square().sum()) == pytest.approx(rest, rel=1e-4)
    assert done["layers"][0]["relative_error"] == pytest.approx((rest / float(weight.square().sum())) ** 0.5)


def test_a_network_with_nothing_to_replace() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    with pytest.raises(BadInput, match="no convolution larger than 1x1"):
        separate(network, EXAMPLE, Separable())


class ReadsItsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).flatten(1) * self.second.weight.mean()


def test_code_that_reads_a_replaced_layer_is_told() -> None:
    with pytest.raises(BadInput, match="reads the layers that were replaced"):
        separate(ReadsItsLayer(), EXAMPLE, Separable())
