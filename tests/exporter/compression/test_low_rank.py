import math
from collections.abc import Sequence
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.compression.low_rank import factorize
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import LowRank
from tests.exporter.small_nets import small_net

EXAMPLE = torch.zeros(1, 3, 32, 32)


def never(models: Sequence[onnx.ModelProto]) -> list[float]:
    raise AssertionError("nothing is to be measured")


def by(seconds: tuple[float, float]) -> Any:
    def clock(models: Sequence[onnx.ModelProto]) -> tuple[float, float]:
        assert len(models) == 2
        return seconds

    return clock


FASTER, SLOWER = by((2e-3, 1e-3)), by((1e-3, 2e-3))


def single(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x)
    return result


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(16, 24, 1, stride=2), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(16, 24, (1, 5), dilation=2)],
)
def test_all_of_the_energy_is_the_layer_itself(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    with torch.no_grad():  # of rank 4, so that all of the energy takes fewer parameters
        core = torch.randn(4, 4, *layer.kernel_size)
        layer.weight.copy_(torch.einsum("oa,abkl,bi->oikl", torch.randn(24, 4), core, torch.randn(4, 16)))
    network = single(layer)
    smaller, done = factorize(
        network, torch.zeros(1, 16, 12, 12), LowRank(energy=0.999999, gate=False), seconds=never, progress=Quiet()
    )
    (row,) = done["layers"]
    assert row["kept"]
    assert set(row["rank"]) == {4}
    assert row["relative_error"] < 1e-3
    x = torch.randn(3, 16, 12, 12)
    torch.testing.assert_close(outputs(smaller, x), outputs(network, x), rtol=1e-3, atol=1e-2)
    assert done["parameters"]["after"] == archs.count(smaller, (16, 12, 12)).parameters < done["parameters"]["before"]


class Head(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.flatten(1))
        return result


def test_the_rank_is_the_least_that_keeps_the_energy() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(2))
    values = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 60)  # squares 64, 16, 4, 1 of 85
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(values) @ right.T)
    for energy, rank in ((0.7, 1), (0.8, 2), (0.95, 3), (0.999, 4)):
        _, done = factorize(
            Head(layer), torch.zeros(1, 1, 8, 8), LowRank(energy=energy, gate=False), seconds=never, progress=Quiet()
        )
        (row,) = done["layers"]
        assert row["rank"] == [rank]
        rest = float((values[rank:] ** 2).sum() / 85) ** 0.5
        assert row["relative_error"] == pytest.approx(rest, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(512, 200), (1, 8, 8, 8)),
        (nn.Conv2d(64, 96, 1), (1, 64, 8, 8)),
        (nn.Conv2d(64, 128, 3), (1, 64, 8, 8)),
    ],
)
def test_the_ratio_is_the_share_of_parameters_that_goes(layer: nn.Module, shape: tuple[int, ...], ratio: float) -> None:
    network = Head(layer) if isinstance(layer, nn.Linear) else single(layer)
    _, done = factorize(network, torch.zeros(*shape), LowRank(ratio=ratio, gate=False), seconds=never, progress=Quiet())
    (row,) = done["layers"]
    gone = 1 - row["parameters"]["after"] / row["parameters"]["before"]
    # Ranks are rounded down, large ones to multiples of eight.
    assert ratio - 0.01 <= gone <= ratio + 0.06
    assert all(rank % 8 == 0 for rank in row["rank"] if rank >= 64)


def test_the_gate_keeps_what_is_measured_to_be_faster() -> None:
    network = small_net()
    smaller, done = factorize(network, EXAMPLE, LowRank(ratio=0.5), seconds=FASTER, progress=Quiet())
    kept = {row["layer"] for row in done["layers"] if row["kept"]}
    assert kept == {f"{name}.0" for name in ("stem", "wide", "project", "again", "left", "right", "mix")} | {"head"}
    assert isinstance(smaller.get_submodule("wide.0"), nn.Sequential)
    assert isinstance(network.get_submodule("wide.0"), nn.Conv2d)
    assert outputs(smaller, torch.randn(2, 3, 32, 32)).shape == (2, 20)


@pytest.mark.parametrize("clock", [SLOWER, by((1.0, 0.97))])
def test_the_gate_refuses_what_is_not_faster_by_a_margin(clock: Any) -> None:
    network = small_net()
    same, done = factorize(network, EXAMPLE, LowRank(ratio=0.5), seconds=clock, progress=Quiet())
    for row in done["layers"]:
        assert not row["kept"]
        assert row["reason"].startswith("not faster")
        assert row["seconds"]["before"] > 0
    assert done["parameters"]["after"] == done["parameters"]["before"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(same, x), outputs(network, x))


def test_equal_layers_are_measured_once() -> None:
    network = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
    calls = 0

    def clock(models: Sequence[onnx.ModelProto]) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        return 1.0, 0.5

    _, done = factorize(network, torch.zeros(1, 16, 8, 8), LowRank(ratio=0.5), seconds=clock, progress=Quiet())
    assert calls == 1
    assert sum(row["kept"] for row in done["layers"]) == 3


def test_the_gate_measures_by_itself() -> None:
    network = Head(nn.Linear(256, 256))
    _, done = factorize(network, torch.zeros(1, 1, 16, 16), LowRank(ratio=0.5), progress=Quiet())
    (row,) = done["layers"]
    assert all(0 < seconds < math.inf for seconds in row["seconds"].values())
    assert row["kept"] == (row["seconds"]["after"] <= 0.95 * row["seconds"]["before"])


def test_a_first_layer_keeps_its_colours() -> None:
    step = LowRank(ratio=0.3, gate=False)
    smaller, done = factorize(single(nn.Conv2d(3, 64, 5, stride=2, padding=2)), EXAMPLE, step, progress=Quiet())
    (row,) = done["layers"]
    pair = smaller.get_submodule("0")
    assert isinstance(pair, nn.Sequential)
    thin, back = pair
    assert thin.weight.shape == (*row["rank"], 3, 5, 5)
    assert back.kernel_size == (1, 1)
    assert outputs(smaller, torch.randn(2, 3, 32, 32)).shape == (2, 64, 16, 16)


def test_only_the_kinds_that_are_asked_for() -> None:
    step = LowRank(ratio=0.5, layers=("linear",), gate=False)
    _, done = factorize(small_net(), EXAMPLE, step, seconds=never, progress=Quiet())
    assert [row["layer"] for row in done["layers"]] == ["head"]
    with pytest.raises(BadInput, match="no layers of the kinds linear"):
        factorize(single(nn.Conv2d(3, 8, 3)), EXAMPLE, step, seconds=never, progress=Quiet())


def test_a_layer_that_would_not_get_smaller_stays() -> None:
    step = LowRank(energy=0.999, gate=True)
    _, done = factorize(Head(nn.Linear(64, 64)), torch.zeros(1, 1, 8, 8), step, seconds=never, progress=Quiet())
    (row,) = done["layers"]
    assert not row["kept"]
    assert "no fewer parameters" in row["reason"]


def test_a_ratio_leaves_ten_classes_alone() -> None:
    network, example = Head(nn.Linear(256, 10)), torch.zeros(1, 1, 16, 16)
    _, done = factorize(network, example, LowRank(ratio=0.8), seconds=never, progress=Quiet())
    (row,) = done["layers"]
    assert not row["kept"]
    assert row["reason"] == "10 outputs are too few to leave directions out"
    with torch.no_grad():
        network.layer.weight[2:] = network.layer.weight[:1]
    _, done = factorize(network, example, LowRank(energy=0.99), seconds=FASTER, progress=Quiet())
    assert [(row["kept"], row["rank"]) for row in done["layers"]] == [(True, [2])]


@pytest.mark.parametrize("kernel", [1, 3])
def test_with_images_it_keeps_what_their_outputs_need(kernel: int) -> None:
    """Inputs in a subspace: the weight has full rank, and what it does to them has not."""
    torch.manual_seed(0)
    mix = torch.randn(32, 4)

    def images(count: int) -> Tensor:
        return torch.einsum("ci,nihw->nchw", mix, torch.randn(count, 4, 10, 10)) + 1.0

    network = single(nn.Conv2d(32, 48, kernel))
    step = LowRank(ratio=0.7, gate=False)
    held_out = images(8)
    wanted = outputs(network, held_out)
    errors = []
    for given in (None, [images(8), images(5)]):
        smaller, _ = factorize(network, torch.zeros(1, 32, 10, 10), step, seconds=never, images=given, progress=Quiet())
        errors.append(float((outputs(smaller, held_out) - wanted).norm() / wanted.norm()))
    # The 3x3 one still reads its input by directions of the weight, which know nothing of the images.
    assert errors[1] < errors[0] * (0.05 if kernel == 1 else 0.95)
    with pytest.raises(BadInput, match="no images"):
        factorize(network, torch.zeros(1, 32, 10, 10), step, seconds=never, images=[], progress=Quiet())


def test_the_same_again() -> None:
    step = LowRank(ratio=0.5, gate=False)
    first, second = (
        factorize(small_net(), EXAMPLE, step, seconds=never, progress=Quiet())[0].state_dict() for _ in range(2)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
