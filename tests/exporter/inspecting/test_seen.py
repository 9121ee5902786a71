"""Which pixels a place can depend on, against the gradients of networks whose weights are all above zero."""

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convoynet.exporter.inspecting.inspection import axes_of
from convoynet.exporter.inspecting.seen import Ends, seen
from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch
from tests.exporter.onnx_runs import session_of

SIZE = (24, 27)


def said(network: nn.Module, place: tuple[int, int]) -> tuple[Ends, Ends] | None:
    """Of a place in what the network returns."""
    trace = trace_from_torch("net", network.eval(), (3, *SIZE))
    last = list(trace.modules.values())[-1]
    return seen(trace, axes_of(trace, SIZE), last, place)


def reached(network: nn.Module, place: tuple[int, int]) -> tuple[Ends, Ends] | None:
    """By autograd; no two ways can cancel. None where a place sees the padding alone."""
    network = network.eval().double()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 1)
    image = torch.rand(1, 3, *SIZE, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image)[0, :, place[0], place[1]].sum(), image)
    touched = gradient.abs().sum((0, 1)) > 0
    if not touched.any():
        return None
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))


def inside(found: tuple[Ends, Ends]) -> tuple[Ends, ...]:
    return tuple((max(first, 0), min(last, side - 1)) for (first, last), side in zip(found, SIZE, strict=True))


class Sum(nn.Module):
    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        return sum((way(x) for way in self.ways), torch.zeros((), dtype=x.dtype))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "back to the size": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)),
    "back by three": lambda: nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)),
    "back by four": lambda: nn.Sequential(nn.AvgPool2d(2), nn.ConvTranspose2d(3, 4, 4, 2, 1)),
    "nearest, larger": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3)),
    "nearest, smaller": lambda: nn.Upsample((12, 7)),
    "linear, larger": lambda: nn.Sequential(nn.AvgPool2d(3), nn.Upsample(scale_factor=2, mode="bilinear")),
    "linear, corners": lambda: nn.Upsample((20, 30), mode="bilinear", align_corners=True),
    "linear, smaller": lambda: nn.Upsample((9, 12), mode="bilinear"),
    "nearest, by a factor": lambda: nn.Upsample(scale_factor=0.45),
    "linear, by a factor": lambda: nn.Upsample(scale_factor=0.45, mode="bilinear"),
    "linear, by a factor of each side": lambda: nn.Upsample(scale_factor=(1.3, 1.02), mode="bilinear"),
    "parts that do not divide": lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d((5, 7))),
    "the edge again": lambda: nn.Sequential(nn.ReplicationPad2d((3, 2, 1, 4)), nn.Conv2d(3, 4, 2)),
    "reflected": lambda: nn.Sequential(nn.ReflectionPad2d((3, 2, 1, 4)), nn.Conv2d(3, 4, 2)),
    "a convolution that reflects": lambda: nn.Conv2d(3, 4, 5, padding=2, padding_mode="reflect"),
    "a shortcut": lambda: Sum(nn.Conv2d(3, 3, 3, 1, 1), nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_pixels_of_a_place_are_those_with_a_gradient(name: str) -> None:
    network = nn.Sequential(EXACT[name]())
    with torch.no_grad():
        height, width = network(torch.zeros(1, 3, *SIZE)).shape[2:]
    for place in [(0, 0), (height // 2, width // 2), (height // 3, 2), (height - 1, width - 1)]:
        found = said(network.float(), place)
        assert found is not None
        assert inside(found) == reached(network, place), place


def drawn(choose: random.Random) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv2d(3, 3, choose.choice([1, 2, 3]), choose.choice([1, 2]), choose.choice([0, 1])),
        lambda: nn.Conv2d(3, 3, (2, 3), dilation=(2, 1)),
        lambda: nn.AvgPool2d(choose.choice([2, 3]), choose.choice([1, 2]), choose.choice([0, 1]), ceil_mode=True),
        lambda: nn.ConvTranspose2d(3, 3, choose.choice([2, 3, 4]), 2, choose.choice([0, 1]), choose.choice([0, 1])),
        lambda: nn.Upsample(scale_factor=2, mode=choose.choice(["nearest", "bilinear", "bicubic"])),
        lambda: nn.Upsample((9, 13), mode=choose.choice(["nearest", "bilinear"])),
        lambda: nn.AdaptiveAvgPool2d((choose.choice([5, 6]), 5)),
        lambda: nn.ReflectionPad2d((1, 2, 2, 1)),
        lambda: nn.ZeroPad2d((-1, 2, 0, 1)),
        lambda: Sum(nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 1)),
    ]  # fmt: skip
    return nn.Sequential(*(choose.choice(kinds)() for _ in range(choose.randint(2, 4))))


@pytest.mark.parametrize("seed", range(40))
def test_no_pixel_with_a_gradient_is_left_out(seed: int) -> None:
    """More may be said: a cell that is read may be one of the padding."""
    network = nn.Sequential(drawn(random.Random(seed)))
    with torch.no_grad():
        height, width = network(torch.zeros(1, 3, *SIZE)).shape[2:]
    for place in [(0, 0), (height // 2, width // 2), (height - 1, width - 1)]:
        found = said(network.float(), place)
        assert found is not None
        for (first, last), (least, most) in zip(inside(found), reached(network, place) or (), strict=False):
            assert first <= least
            assert most <= last


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)]
)
def test_statistics_of_the_image_itself_are_of_all_places(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3))
    assert said(network, (4, 4)) is None


def test_statistics_that_are_stored_are_of_none() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    assert said(network, (4, 4)) == ((4, 8), (4, 8))


def test_a_mean_over_everything_has_no_place() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean() + x.sum()

    assert said(nn.Sequential(nn.Conv2d(3, 4, 3), Centred()), (4, 4)) == ((0, 23), (0, 26))


def resized(node: onnx.NodeProto, stored: onnx.TensorProto, opset: int) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *SIZE])
    made = helper.make_tensor_value_info("made", TensorProto.FLOAT, [1, 1, "h", "w"])
    graph = helper.make_graph([node], "net", [image], [made], [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


HALF, CORNER = "half_pixel", "asymmetric"


@pytest.mark.parametrize(
    "settings",
    [
        {"coordinate_transformation_mode": CORNER, "nearest_mode": "floor"},
        {"coordinate_transformation_mode": HALF, "nearest_mode": "round_prefer_floor"},
        {"coordinate_transformation_mode": HALF, "nearest_mode": "round_prefer_ceil"},
        {"coordinate_transformation_mode": HALF, "nearest_mode": "ceil"},
        {"coordinate_transformation_mode": "align_corners", "nearest_mode": "floor"},
        {"coordinate_transformation_mode": HALF, "mode": "linear"},
        {"coordinate_transformation_mode": CORNER, "mode": "linear"},
        {"coordinate_transformation_mode": "pytorch_half_pixel", "mode": "linear"},
        {"coordinate_transformation_mode": "half_pixel_symmetric", "mode": "linear"},
    ],
)
@pytest.mark.parametrize("size", [(12, 9), (48, 40), (1, 1), 0.45, 1.3])
def test_the_places_of_onnxs_resize(settings: dict[str, str], size: tuple[int, int] | float) -> None:
    if isinstance(size, tuple):
        stored = numpy_helper.from_array(np.array([1, 1, *size]), "stored")
        node = helper.make_node("Resize", ["image", "", "", "stored"], ["made"], **settings)
    else:
        stored = numpy_helper.from_array(np.array([1, 1, size, size], np.float32), "stored")
        node = helper.make_node("Resize", ["image", "", "stored"], ["made"], **settings)
    said_as_run(resized(node, stored, 20), may_be_unknown="symmetric" in str(settings) and not isinstance(size, tuple))


@pytest.mark.parametrize("scales", [(0.375, 1 / 3), (2, 3)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_places_of_an_old_resize(mode: str, scales: tuple[float, float]) -> None:
    stored = numpy_helper.from_array(np.array([1, 1, *scales], np.float32), "stored")
    said_as_run(resized(helper.make_node("Resize", ["image", "stored"], ["made"], mode=mode), stored, 10))


def test_a_filter_as_wide_as_what_it_takes_together_is_not_known() -> None:
    stored = numpy_helper.from_array(np.array([1, 1, 6, 6]), "stored")
    node = helper.make_node("Resize", ["image", "", "", "stored"], ["made"], mode="linear", antialias=1)
    trace = trace_from_onnx("net", resized(node, stored, 20), None)
    assert seen(trace, axes_of(trace, SIZE), "made", (2, 2)) is None


def said_as_run(model: onnx.ModelProto, *, may_be_unknown: bool = False) -> None:
    """Each row and column of pixels is changed in turn, and the places that it changes have to be those that see it."""
    trace = trace_from_onnx("net", model, None)
    axes, session = axes_of(trace, SIZE), session_of(model)
    count = min(*session.run(None, {"image": np.zeros((1, 1, *SIZE), np.float32)})[0].shape[2:], 9)
    found = [seen(trace, axes, "made", (at, at)) for at in range(count)]
    if may_be_unknown and found == [None] * count:
        return
    for axis, side in enumerate(SIZE):
        for pixel in range(side):
            picture = np.zeros((1, 1, *SIZE), np.float32)
            picture[(0, 0, pixel, slice(None)) if axis == 0 else (0, 0, slice(None), pixel)] = 1
            changed = session.run(None, {"image": picture})[0][0, 0]
            for at, ends in enumerate(found):
                assert ends is not None
                first, last = ends[axis]
                assert (first <= pixel <= last) == (abs(changed[at, at]) > 1e-5), (axis, pixel, at)
