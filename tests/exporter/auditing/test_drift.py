"""Where models look: the maps against autograd and by hand, the measures by hand, and the cases with known answers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from convoynet.exporter.auditing import drift as drifting
from convoynet.exporter.auditing.drift import correlation, drift, maps_of, overlap, shift
from convoynet.exporter.auditing.gradients import Head, feature_map, of_pixels, whole
from convoynet.exporter.auditing.subjects import Subject, audited
from convoynet.exporter.data.images import Preprocess, load_images, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from tests.exporter.small_nets import PREPROCESS, SmallNet, pixels, settled

LABELS = [str(index) for index in range(20)]


def subject(network: nn.Module, preprocess: Preprocess = PREPROCESS, uint8: bool = False) -> Subject:
    graph = onnx_from_torch(network.eval(), preprocess, uint8_input=uint8)
    return Subject("net", graph, preprocess, LABELS, batch=4)


@pytest.fixture(scope="module")
def network() -> SmallNet:
    torch.manual_seed(0)
    made = SmallNet()
    settled(made, PREPROCESS.normalize(pixels(16)))
    return made


def autograds(network: SmallNet, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Grad-CAM in PyTorch at what the head pools."""
    kept: list[torch.Tensor] = []
    hook = network.mix.register_forward_hook(lambda *made: kept.append(made[-1]))
    logits = network(torch.from_numpy(PREPROCESS.normalize(images)))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), torch.from_numpy(classes)].sum(), kept[0])
    features = torch.relu(kept[0])
    weights = gradient.sum(dim=(2, 3), keepdim=True) / (kept[0] > 0).sum(dim=(2, 3), keepdim=True)
    return torch.relu((weights * features).sum(dim=1)).detach().numpy()


@pytest.mark.parametrize("uint8", [False, True])
def test_the_map_is_autograds(network: SmallNet, uint8: bool) -> None:
    images = pixels(6)
    classes = np.array([0, 3, 19, 7, 7, 1])
    found = maps_of(subject(network, uint8=uint8), images, classes)
    expected = autograds(network, images, classes)
    assert found.shape == (6, 16, 16)
    assert expected.any(axis=(1, 2)).all()
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


def test_a_head_of_pooling_and_one_layer_gives_the_class_activation_map(network: SmallNet) -> None:
    head = Head(subject(network))
    features = np.abs(np.random.default_rng(0).normal(size=(3, 32, 5, 7))).astype(np.float32)
    classes = np.array([4, 0, 11])
    weight = network.head.weight.detach().numpy()
    expected = np.maximum(np.einsum("nkhw,nk->nhw", features, weight[classes]), 0) / 35
    np.testing.assert_allclose(head.maps(features, classes), expected, rtol=1e-4, atol=1e-5)


def test_a_model_against_itself_is_exactly_one(network: SmallNet) -> None:
    images, one = pixels(8), subject(network)
    found = drift((one, one), images, np.arange(8), np.zeros(8, int), Quiet())
    assert (found.correlation == 1).all()
    assert (found.overlap == 1).all()
    assert (found.shift == 0).all()
    assert found.value == found.moved == 0


def test_int8_looks_where_float_does_and_other_weights_do_not(models: Path, classes: Path) -> None:
    images = load_images(sorted(classes.rglob("*.png")), audited(models / "digits")[0].preprocess)
    exact, rounded = (audited(models / name)[0] for name in ("digits", "digits-int8"))
    places = np.arange(len(images))
    session = exact.session(1)
    answers = exact.logits(session, images).argmax(axis=1)
    found = drift((exact, rounded), images, places, answers, Quiet())
    assert found.median >= 0.99
    assert np.median(found.overlap) > 0.8
    rng = np.random.default_rng(0)
    other = onnx.ModelProto()
    other.CopyFrom(exact.graph)
    for tensor in other.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            noise = rng.normal(0, 0.2, list(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(noise, tensor.name))
    apart = drift((exact, Subject("noise", other, exact.preprocess, exact.labels)), images, places, answers, Quiet())
    assert abs(apart.median) < 0.35
    assert apart.moved > 0.5


def test_the_rounded_graph_computes_what_onnx_runtime_does_and_lets_the_gradient_through(
    models: Path, classes: Path
) -> None:
    rounded = audited(models / "digits-int8")[0]
    images = load_images(sorted(classes.rglob("*.png"))[:12], rounded.preprocess)
    given = torch.from_numpy(images.astype(np.float32)).requires_grad_()
    logits = of_pixels(rounded, whole(rounded), given)
    expected = rounded.logits(rounded.session(1), images)
    # A value on the edge may be rounded either way.
    assert np.median(np.abs(logits.detach().numpy() - expected)) < 0.02 * np.abs(expected).max()
    assert (logits.detach().numpy().argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), given)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    exact = audited(models / "digits")[0]
    logits = of_pixels(exact, whole(exact), given)
    (plain,) = torch.autograd.grad(logits.max(dim=1).values.sum(), given)
    # What the quantizer clips, the black around a digit, has no gradient, and rounding moves the rest.
    assert np.corrcoef(gradient.flatten(), plain.flatten())[0, 1] > 0.4


def maps(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(len(rows), 2, -1)


def test_the_measures_by_hand() -> None:
    before = maps([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10, [0] * 10)
    after = maps([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 9, 0, 1, 0, 0, 0, 0], [0] * 10, [1] + [0] * 9)
    assert correlation(before, after)[0] == pytest.approx(-1)
    assert correlation(before, after)[1] == pytest.approx(np.corrcoef(before[1].ravel(), after[1].ravel())[0, 1])
    assert correlation(before, after)[2:].tolist() == [1, 0]
    assert correlation(before, 3 * before)[0] == pytest.approx(1)
    assert overlap(before, after).tolist() == [0, 0, 1, 0]
    assert overlap(before, maps([0, 0, 0, 0, 0, 0, 0, 1, 0, 9], *([[0] * 10] * 3)))[0] == pytest.approx(1 / 3)
    assert shift(before, after) == pytest.approx([np.hypot(1 / 2, 4 / 5), 3 / 5, 0, 0])


def test_maps_of_two_sizes_are_compared_at_the_larger(network: SmallNet) -> None:
    torch.manual_seed(1)
    small = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 20)
    )
    found = drift((subject(network), subject(small)), pixels(3), np.arange(3), np.zeros(3, int), Quiet())
    assert found.maps[0].shape == found.maps[1].shape == (3, 16, 16)


class Gated(nn.Module):
    """Weighs its channels by what it pools of them: the map is behind the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 20, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return torch.relu(self.last(x)).mean((2, 3))


def test_the_feature_map_is_the_last_that_everything_goes_through() -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Linear(16, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            y = torch.relu(self.second(x))
            return self.head(torch.cat([x.mean((2, 3)), y.mean((2, 3))], 1))

    for made, operator, shape in ((Gated(), "Relu", (3, 30, 30)), (TwoWays(), "Relu", (3, 30, 30))):
        one = subject(made)
        name = feature_map(one)
        (node,) = [node for node in one.graph.graph.node if name in node.output]
        assert node.op_type == operator
        assert maps_of(one, pixels(3), np.zeros(3, int)).shape == shape


def test_a_class_map_is_its_own_evidence() -> None:
    """As in NIN and SqueezeNet, whose last convolution has a channel for each class."""
    torch.manual_seed(0)
    network, images, classes = Gated(), pixels(3), np.array([2, 5, 11])
    found = maps_of(subject(network), images, classes)
    kept: list[torch.Tensor] = []
    network.last.register_forward_hook(lambda *made: kept.append(made[-1]))
    network(torch.from_numpy(PREPROCESS.normalize(images)))
    expected = torch.relu(kept[0])[torch.arange(3), torch.from_numpy(classes)].detach().numpy() / 900
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_what_has_no_feature_map_or_no_gradient_is_one_line() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20))
    with pytest.raises(BadInput, match=r"^net has no feature map: no tensor of channels over places"):
        feature_map(subject(flat))
    one = subject(Gated())
    graph = one.graph
    last = graph.graph.node[-1]
    inner = f"{last.output[0]}.inner"
    graph.graph.node.append(helper.make_node("Celu", [inner], [last.output[0]], name="odd"))
    last.output[0] = inner
    with pytest.raises(BadInput, match="net: its graph has no gradient here: operator Celu of node 'odd'"):
        Head(one)


def test_half_precision_is_looked_at_in_float32() -> None:
    one = subject(Gated())
    images, classes = made_images(2, (32, 32), 3, 0), np.zeros(2, int)
    expected = maps_of(one, images, classes)
    half = onnx.ModelProto()
    half.CopyFrom(one.graph)
    output = half.graph.output[0].name
    node = next(node for node in half.graph.node if output in node.output)
    node.output[0] = "exact"
    half.graph.node.append(helper.make_node("Cast", ["exact"], ["half"], to=TensorProto.FLOAT16))
    half.graph.node.append(helper.make_node("Cast", ["half"], [output], to=TensorProto.FLOAT))
    found = maps_of(Subject("half", half, PREPROCESS, LABELS), images, classes)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_top_of_a_map_is_a_fifth_of_its_places() -> None:
    values = np.random.default_rng(0).random((4, 8, 8)) + 0.1
    assert (drifting._top(values.reshape(4, -1)).sum(axis=1) == 13).all()


class Pooled(nn.Module):
    """Pools by a root of squares, which has no slope where a channel is dead."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 20)
        self.stem.bias.data[3:] = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.relu(self.stem(x)).square().mean((2, 3)).sqrt()
        logits: torch.Tensor = self.head(pooled)
        return logits


def compared(network: nn.Module, count: int = 6) -> drifting.Drift:
    side = subject(network)
    return drift((side, side), pixels(count), np.arange(count), np.zeros(count, np.int64), Quiet())


def test_a_gradient_that_is_no_number_is_no_evidence() -> None:
    assert compared(Pooled(0)).median == 1
    with pytest.raises(BadInput, match=r"net has no evidence for \d of 6 images: its gradient at \S+ is not finite"):
        compared(Pooled(-50))


class Lit(nn.Module):
    """Has evidence for images that are brighter than a bound, and none for others."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 20)
        nn.init.constant_(self.stem.weight, 1 / 27)
        nn.init.constant_(self.stem.bias, -bound)
        nn.init.constant_(self.head.weight, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.stem(x)).mean((2, 3)))
        return logits


def test_images_without_evidence_measure_nothing() -> None:
    dark, light = np.zeros((3, *PREPROCESS.size, 3), np.uint8), np.full((2, *PREPROCESS.size, 3), 255, np.uint8)
    images = np.concatenate([dark, light])
    some, none = subject(Lit(0.5)), subject(Lit(100))
    classes = np.zeros(5, np.int64)
    found = drift((some, some), images, np.arange(10, 15), classes, Quiet())
    assert (found.places.tolist(), found.flat, found.median) == ([13, 14], 3, 1)
    found = drift((some, none), images, np.arange(10, 15), classes, Quiet())
    assert (found.places.tolist(), found.flat, found.median) == ([13, 14], 5, 0)
    with pytest.raises(BadInput, match="neither model has any evidence for its answers to 5 images"):
        drift((none, none), images, np.arange(5), classes, Quiet())
