from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs.googlenet import BLOCKS, AuxiliaryClassifier, GoogLeNet2014
from convoynet.exporter.inspecting.inspection import Layer, inspection
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch

# The column "ops" of Table 1, in millions. Its 34 of conv1 and 54 of 5a are not what its own channels come to.
OPERATIONS = {"3a": 128, "3b": 304, "4a": 73, "4b": 88, "4c": 100, "4d": 119, "4e": 170, "5b": 71}


def built(name: str = "googlenet-2014") -> nn.Module:
    with torch.device("meta"):
        return archs.get(name).build(1000)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    trace = trace_from_torch("googlenet-2014", built(), (3, 224, 224))
    return list(inspection(trace, fully_convolutional=False).layers)


def test_the_modules_have_the_operations_of_table_1(layers: list[Layer]) -> None:
    assert BLOCKS.keys() - OPERATIONS.keys() == {"5a"}
    for name, operations in OPERATIONS.items():
        found = sum(layer.macs for layer in layers if layer.name.startswith(f"inception.{name}."))
        assert abs(found / 1e6 - operations) < 0.7, name
    second = sum(layer.macs for layer in layers if layer.name.startswith("stem.conv2_"))
    assert round(second / 1e6) == 360


def test_the_maps_are_those_of_table_1(layers: list[Layer]) -> None:
    shapes = {layer.name: layer.output_shape for layer in layers}
    assert shapes["stem.conv1_7x7_s2"] == (64, 112, 112)
    assert shapes["stem.pool1"] == (64, 56, 56)
    assert shapes["stem.pool2"] == (192, 28, 28)
    assert shapes["inception.3b.concat"] == (480, 28, 28)
    assert shapes["inception.4e.concat"] == (832, 14, 14)
    assert shapes["inception.5b.concat"] == (1024, 7, 7)


def test_the_branch_of_5x5_has_5x5_where_torchvisions_has_3x3() -> None:
    ours: Any = built()
    theirs: Any = built("googlenet")
    assert ours.inception["3a"].conv_5x5.weight.numel() == 12_800
    assert theirs.inception3a.branch3[1].conv.weight.numel() == 4_608
    kinds = {type(module) for module in ours.modules()}
    assert nn.LocalResponseNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert nn.LocalResponseNorm not in {type(module) for module in theirs.modules()}
    assert all(layer.bias is not None for layer in ours.modules() if isinstance(layer, nn.Conv2d))
    assert "3x3 for 5x5" in archs.get("googlenet").paper


def test_the_auxiliary_classifiers_have_the_layers_of_section_5() -> None:
    """With both of them as many parameters as BVLC's file holds: 13,378,280."""
    with torch.device("meta"):
        heads = [AuxiliaryClassifier((channels, 14, 14), 1000) for channels in (512, 528)]
        assert heads[0].pool(torch.empty(1, 512, 14, 14)).shape == (1, 512, 4, 4)
        assert AuxiliaryClassifier((512, 4, 4), 10)(torch.empty(2, 512, 4, 4)).shape == (2, 10)
    counts = [sum(tensor.numel() for tensor in module.parameters()) for module in (built(), *heads)]
    assert sum(counts) == 13_378_280


@torch.no_grad()
def test_response_normalisation_is_caffes() -> None:
    """x / (1 + 1e-4 / 5 * the sum of five squares) ^ 0.75."""
    x = torch.randn(1, 64, 3, 3, dtype=torch.float64) * 100
    network: Any = GoogLeNet2014(2)
    padded = np.pad(x.numpy() ** 2, ((0, 0), (2, 2), (0, 0), (0, 0)))
    sums = sum(padded[:, shift : shift + 64] for shift in range(5))
    np.testing.assert_allclose(network.stem.norm1(x).numpy(), x.numpy() / (1 + 1e-4 / 5 * sums) ** 0.75, rtol=1e-9)
