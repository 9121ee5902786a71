import pytest
import torch
from torch import nn

from convoynet.exporter.compression.sparsity import sparsify
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Sparsify
from tests.exporter.small_nets import SmallNet, small_net


def unstructured(ratio: float) -> Sparsify:
    return Sparsify(pattern="unstructured", ratio=ratio)


def test_of_every_four_input_channels_the_two_largest_stay() -> None:
    network = nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        network[0].weight[:] = torch.tensor(
            [[1.0, -4.0, 3.0, 2.0, 0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 2.0, 9.0, -8.0, -9.5, 1.0]]
        )[..., None, None]
    sparse, masks, done = sparsify(network, Sparsify())
    assert isinstance(sparse, nn.Sequential)
    assert sparse[0].weight.flatten(1).tolist() == [
        [0.0, -4.0, 3.0, 0.0, 0.5, 0.5, 0.0, 0.0],  # of equals the first ones
        [0.0, 0.0, 1.0, 2.0, 9.0, 0.0, -9.5, 0.0],
    ]
    assert list(masks) == ["0.weight"]
    assert masks["0.weight"].flatten(1)[0].tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
    assert done["dense"] == [{"layer": "1", "reason": "2 input channels"}]


def test_two_of_four_in_every_layer_that_fits() -> None:
    network = small_net()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sparse, masks, done = sparsify(network, Sparsify())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert {row["layer"] for row in done["dense"]} == {"stem.0", "depthwise.0"}
    assert masks.keys() == {f"{name}.0.weight" for name in ("wide", "project", "again", "left", "right", "mix")} | {
        "head.weight"
    }
    for name, mask in masks.items():
        weight = sparse.get_parameter(name)
        blocks = (weight.movedim(1, -1) != 0).unflatten(-1, (-1, 4)).sum(-1)  # type: ignore[no-untyped-call]
        assert (blocks == 2).all(), name
        assert torch.equal(weight, before[name] * mask)
    assert done["zeros"] == sum(row["weights"] for row in done["layers"]) // 2


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_unstructured_takes_the_smallest_of_each_layer(ratio: float) -> None:
    sparse, masks, done = sparsify(small_net(), unstructured(ratio))
    dense = small_net().state_dict()
    for row in done["layers"]:
        name = f"{row['layer']}.weight"
        weight = sparse.get_parameter(name)
        assert row["zeros"] == round(ratio * weight.numel()) == int((masks[name] == 0).sum())
        gone = dense[name][masks[name] == 0].abs().max()
        assert gone <= weight[weight != 0].abs().min()
    assert not done["dense"]


def test_the_masks_are_enough_to_make_the_zeros_again() -> None:
    sparse, masks, _ = sparsify(small_net(), Sparsify())
    moved = SmallNet()
    with torch.no_grad():
        for name, mask in masks.items():
            moved.get_parameter(name).mul_(mask)
            assert torch.equal(moved.get_parameter(name) == 0, sparse.get_parameter(name) == 0)


def test_a_network_without_a_layer_that_fits() -> None:
    with pytest.raises(BadInput, match='no layer fits pattern "2:4"'):
        sparsify(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6)), Sparsify())
    with pytest.raises(BadInput, match="no layer fits"):
        sparsify(nn.Sequential(nn.ReLU()), unstructured(0.5))
