"""Networks as training code has them, and networks that cannot be compared image by image."""

import re
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.archs.wrapped import bare, copy_of, settle_lazy, state_weights
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.unsteady import Earlier, why_unsteady
from convoynet.exporter.evidence.verify import outputs_of
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.running.runtime import Eager

PREPROCESS = Preprocess((8, 8), 8, (0.5,) * 3, (0.5,) * 3)
IMAGES = made_images(4, (8, 8), 3, 0)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (nn.DataParallel, ", without DataParallel"),
        (torch.compile, ", without OptimizedModule"),
        (lambda net: torch.compile(nn.DataParallel(net)), ", without OptimizedModule, without DataParallel"),
        (nn.Module.half, ", its float16 numbers as float32"),
        (nn.Module.double, ", its float64 numbers as float32"),
        (lambda net: net, ""),
    ],
)
def test_wrappers_come_off_and_numbers_become_float32(wrap: Callable[[nn.Module], nn.Module], told: str) -> None:
    network, changed = bare("nets:small", wrap(small()))
    assert type(network) is nn.Sequential
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert "".join(changed) == told


def test_torchscript_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        traced = torch.jit.trace(small(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(BadInput, match=r"nets:small returns a TorchScript module.*return the nn\.Module"):
        bare("nets:small", traced)


def test_what_has_no_values_or_cannot_be_copied_is_told() -> None:
    with pytest.raises(BadInput, match=r"meta device, which have no values"):
        bare("nets:small", small().to("meta"))
    network = small()
    network.lock = threading.Lock()
    with pytest.raises(BadInput, match=r"cannot be copied .*lock.*belong outside of it"):
        copy_of(network)


def test_lazy_layers_take_their_sizes_from_an_image() -> None:
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))
    settle_lazy("nets:lazy", network, (3, 8, 8))
    assert network[3].weight.shape == (5, 144)
    assert network.training
    assert not network[1].running_mean.any()  # in evaluation mode: nothing is learned of the black image
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(7, 5))
    with pytest.raises(BadInput, match=r"has lazy layers.*fails with one of 3x8x8.*--input-size"):
        settle_lazy("nets:lazy", lazy, (3, 8, 8))


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = small()[:3], nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).squeeze())


def test_one_image_that_is_squeezed_has_its_row() -> None:
    eager = Eager(Squeezing(), PREPROCESS)
    inputs = eager.prepare(IMAGES)
    (all_rows,), (one_row,) = eager(inputs), eager(inputs[:1])
    assert one_row.shape == (1, 2)
    np.testing.assert_allclose(one_row, all_rows[:1], rtol=1e-4, atol=1e-6)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.5))


class OverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0, keepdim=True))


def batch_statistics() -> nn.Module:
    network = small()
    network[1] = nn.BatchNorm2d(4, track_running_stats=False)
    return network


class Brightest(OverTheBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / x.max())


class Counting(OverTheBatch):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * (1 if self.calls < 3 else 2)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Brightest, "maximum over the batch"),
        (Counting, "hangs on earlier images"),
        (Dropping, "asked again.*F.dropout"),
        (OverTheBatch, "depends on the other images of its batch"),
        (batch_statistics, "track_running_stats"),
        (small, "^$"),
        (Squeezing, "^$"),
    ],
)
def test_why_a_network_cannot_be_compared(network: Callable[[], nn.Module], reason: str) -> None:
    assert re.search(reason, why_unsteady(Eager(network(), PREPROCESS), IMAGES))


def test_a_network_that_changed_since_it_was_asked_is_told() -> None:
    """Of its float64 form it would seem that it rounds."""
    eager = Eager(Counting(), PREPROCESS)
    earlier = Earlier(outputs_of(eager, IMAGES, 2), 2)
    assert "hangs on earlier images" in why_unsteady(eager, IMAGES, earlier)


def test_a_network_that_fails_on_images_is_named_and_its_type_told() -> None:
    def fail(x: Tensor) -> Tensor:
        assert x.max() < -5, "give me dark ones"
        return x

    for forward, words in ((fail, "AssertionError: give me dark ones"), (lambda x: small()(x.half()), "float32.*half")):
        network = small()
        network.forward = forward  # type: ignore[method-assign]
        with pytest.raises(BadInput, match=rf"the network fails in PyTorch on 4 images: .*{words}"):
            outputs_of(Eager(network, PREPROCESS), IMAGES)


def test_a_layer_that_is_there_twice_keeps_its_numbers() -> None:
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = layer.weight
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten(), nn.Linear(12, 4), layer, tied, layer)
    made = dry_run(network, (3, 8, 8), 2)
    assert isinstance(made, Tensor)
    assert made.is_meta
    assert not any(tensor.is_meta for tensor in network.parameters())
    assert tied.weight is layer.weight


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.max() > 1 else self.net(-x)


class Uneven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, 5).flatten(1)


class FakeQuantized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127).flatten(1)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Deciding, r"hangs on the values of the image.*torch\.where"),
        (Uneven, "AdaptiveMaxPool2d to a size.*MaxPool2d"),
        (lambda: nn.Sequential(nn.RReLU(), small()), r"aten\.rrelu.* has no form in ONNX"),
        (FakeQuantized, "quantizes by itself.*--int8"),
    ],
)
def test_what_no_graph_can_be_is_told_with_the_way_out(network: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        onnx_from_torch(network(), PREPROCESS, uint8_input=False)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, orthogonal])
def test_weights_that_are_computed_are_folded(norm: Callable[[nn.Module], nn.Module], stated: bool) -> None:
    """64 to 64 channels: above what the exporter folds by itself. ONNX has no matrix exponential."""
    torch.manual_seed(0)
    network = nn.Sequential(norm(nn.Conv2d(3, 64, 3)), norm(nn.Conv2d(64, 64, 3)), nn.Flatten(), nn.Linear(1024, 2))
    if stated:
        before = network.eval()(torch.ones(1, 3, 8, 8))
        state_weights(network)
        torch.testing.assert_close(network(torch.ones(1, 3, 8, 8)), before)
    elif norm is orthogonal:
        return
    graph = onnx_from_torch(network, PREPROCESS, uint8_input=False).graph
    assert {node.op_type for node in graph.node} <= {"Conv", "Reshape", "Flatten", "Gemm"}
