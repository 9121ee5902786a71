"""Auxiliary classifiers: there while a network learns, with the names of published weights, and nowhere else."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from convoynet.exporter import archs
from convoynet.exporter.archs.auxiliary import Auxiliaries, Head, Map, with_auxiliaries
from tests.exporter.training_nets import CLASSES, TinyNet, tiny_net

WEIGHTS = {
    "googlenet-2014": ({"aux1", "aux2"}, 0.3),
    "googlenet": ({"aux1", "aux2"}, 0.3),
    "inception_v3": ({"AuxLogits"}, 0.4),
    "fcn_resnet50": ({"aux_classifier"}, 0.4),
    "deeplabv3_resnet101": ({"aux_classifier"}, 0.4),
}
SIZE = (3, 16, 16)


def linear(size: Map, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size[0], classes))


TINY = Auxiliaries({"aux": Head("first", linear), "gone": Head("nowhere", linear)}, 0.3)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_network_learns_with_its_heads_and_runs_without(name: str) -> None:
    arch = archs.get(name)
    assert arch.auxiliaries is not None
    heads, weight = WEIGHTS[name]
    assert (set(arch.auxiliaries.heads), arch.auxiliaries.weight) == (heads, weight)
    with torch.device("meta"):
        network = arch.build(7)
        around = with_auxiliaries(network, arch.auxiliaries, arch.input_size, 7, {})
        assert around is not None
        x = torch.empty(2, *arch.input_size)
        outputs = around.train()(x)
        assert set(around.heads) == heads
        assert [output.shape for output in outputs] == [network.eval()(x).shape] * (1 + len(heads))
        assert isinstance(around.eval()(x), Tensor)


@pytest.mark.parametrize(("theirs", "options"), [
    ("googlenet", {"init_weights": False}),
    ("inception_v3", {"init_weights": False}),
    ("fcn_resnet50", {"weights_backbone": None, "aux_loss": True}),
])  # fmt: skip
def test_the_heads_are_those_of_published_weights(theirs: str, options: dict[str, Any]) -> None:
    arch = archs.get(theirs)
    assert arch.auxiliaries is not None
    with torch.device("meta"):
        published = get_model(theirs, weights=None, **options).state_dict()
        around = with_auxiliaries(arch.build(arch.num_classes), arch.auxiliaries, arch.input_size, arch.num_classes, {})
    assert around is not None
    own = {name: tensor.shape for name, tensor in around.heads.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in published.items() if name.startswith(arch.training_only)}


def test_the_layers_are_shared_and_published_heads_are_taken() -> None:
    network = tiny_net(0)
    published = {
        "aux.2.weight": torch.ones(CLASSES, 8),
        "aux.2.bias": torch.zeros(CLASSES),
        "more": torch.ones(1),
    }
    around = with_auxiliaries(network, TINY, SIZE, CLASSES, published)
    assert around is not None
    assert around.network is network
    assert list(around.heads) == ["aux"]
    assert torch.equal(around.heads.state_dict()["aux.2.weight"], published["aux.2.weight"])
    misfits = with_auxiliaries(network, TINY, SIZE, CLASSES, {**published, "aux.2.weight": torch.ones(CLASSES, 9)})
    assert misfits is not None
    assert not torch.equal(misfits.heads.state_dict()["aux.2.weight"], published["aux.2.weight"])


def test_a_copy_reads_its_own_layers() -> None:
    around = with_auxiliaries(tiny_net(0), TINY, SIZE, CLASSES, {})
    assert around is not None
    other = copy.deepcopy(around).train()
    outputs = other(torch.randn(2, *SIZE))
    outputs[1].sum().backward()
    assert other.network.first[0].weight.grad is not None
    assert around.network.first[0].weight.grad is None


def test_where_no_head_fits_there_is_none() -> None:
    def deep(size: Map, classes: int) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(99), nn.Flatten(), nn.Linear(size[0], classes))

    assert with_auxiliaries(TinyNet(), Auxiliaries({"a": Head("first", deep)}, 0.3), SIZE, CLASSES, {}) is None
    assert with_auxiliaries(TinyNet(), Auxiliaries({"a": Head("nowhere", deep)}, 0.3), SIZE, CLASSES, {}) is None
