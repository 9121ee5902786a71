import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from convoynet.exporter.commands.inspect_command import inspect
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.looking.found import Found, unit_rows
from convoynet.exporter.looking.opened import Opened, open_graph
from convoynet.exporter.looking.page import Pictures, html
from convoynet.exporter.looking.pictures import shown
from convoynet.exporter.looking.preferred import preferred
from convoynet.exporter.looking.projection import projections
from convoynet.exporter.looking.tail import Tail
from convoynet.exporter.looking.units import Excited, Units, units_of
from convoynet.exporter.progress import Quiet
from tests.exporter.looking.conftest import PREPROCESS, SIZE, Net, opened


@pytest.fixture(scope="module")
def planted() -> Opened:
    """Unit 1 of `last` is dead, unit 3 does what unit 2 does, and the head does not read unit 4."""
    torch.manual_seed(1)
    net = Net()
    weight, bias = net.last[0].get_parameter("weight"), net.last[0].get_parameter("bias")
    with torch.no_grad():
        weight *= 3
        weight[1], bias[1] = 0, -1
        weight[3], bias[3] = 2 * weight[2], 2 * bias[2]
        net.head.weight *= 20
        net.head.weight[:, 4] = 0
    return opened(net)


def looked(network: Opened, layer: str, pictures: Path, ablated: int = 6) -> Units:
    files = list_images(pictures)
    return units_of(network, network.layer(layer), (pictures, files, "pictures"), ablated, Quiet())


@pytest.fixture(scope="module")
def found(planted: Opened, pictures: Path) -> Units:
    return looked(planted, "last", pictures)


def maps(network: Opened, layer: str, pixels: np.ndarray) -> Tensor:
    with torch.no_grad():
        return network.maps(network.layer(layer), network.inputs(pixels))


def test_the_pictures_of_a_unit_are_those_with_the_largest_values(
    planted: Opened, found: Units, pixels: np.ndarray
) -> None:
    made = maps(planted, "last", pixels)
    for unit in found.units:
        mine = made[:, unit.index]
        assert unit.mean == pytest.approx(float(mine.mean()), abs=1e-6)
        assert unit.active == int((mine.flatten(1).amax(1) > 0).sum())
        assert sorted((one.value for one in unit.top), reverse=True) == [one.value for one in unit.top]
        for one in unit.top:
            assert one.value == pytest.approx(float(mine[one.picture].max()), abs=1e-6)
            assert float(mine[(one.picture, *one.place)]) == pytest.approx(one.value, abs=1e-6)


def test_dead_duplicate_and_undecisive_units_are_named(found: Units) -> None:
    assert found.dead == [1]
    assert [(a, b) for a, b, _ in found.duplicates] == [(2, 3)]
    assert found.duplicates[0][2] == pytest.approx(1)
    assert found.units[2].twin == (3, pytest.approx(1))
    assert 4 in found.undecisive
    assert 1 not in found.undecisive
    assert found.units[4].lost == pytest.approx(0, abs=1e-6)
    assert any(unit.changed for unit in found.units)
    told = dict(unit_rows(found))
    assert told["dead"] == "1 of 8, the same everywhere on every picture: 1"
    assert told["duplicates"] == "1 pair whose maps correlate by 0.95 or more: 2 and 3 (1.000)"


@pytest.mark.parametrize("layer", ["stem", "relu", "block", "pool", "last.0", "last"])
def test_the_network_behind_a_layer_says_what_the_whole_says(network: Opened, pixels: np.ndarray, layer: str) -> None:
    """A shortcut leads around `block`, and is added in place."""
    tail = Tail(network, network.layer(layer), network.inputs(pixels))
    with torch.no_grad():
        expected = network.network(network.inputs(pixels)).softmax(1)
    torch.testing.assert_close(tail.shares, expected)
    rows = torch.tensor([4, 1])
    for _ in range(2):  # nothing that is kept has changed
        torch.testing.assert_close(tail.shares_with(tail.maps[rows], rows), expected[rows])
    changed = tail.maps[rows]
    changed[:, 0] = 0

    def without(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] = 0
        return output

    # `relu` is called twice, and the layer is its first call.
    calls = []
    handle = network.layer(layer).module.register_forward_hook(
        lambda *given: calls.append(0) or (without(*given) if len(calls) == 1 else None)
    )
    with torch.no_grad():
        ablated = network.network(network.inputs(pixels[rows.numpy()])).softmax(1)
    handle.remove()
    torch.testing.assert_close(tail.shares_with(changed, rows), ablated)
    assert "forward" not in vars(network.layer(layer).module)


class InPlace(nn.Module):
    """A shortcut leads from `conv`, whose maps `relu` changes, around `next`; `shift` has no row for each image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.shift = Shift()
        self.next = nn.Conv2d(6, 6, 3, padding=1)
        self.mirrored = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        short = self.conv(x)
        x = self.next(self.relu(short) + self.shift())
        both = self.mirrored(torch.cat((x + short, (x + short).flip(3)))).relu()
        found: Tensor = self.head(20 * sum(both.chunk(2)).mean((2, 3)))
        return found


class Shift(nn.Module):
    """A module that reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(-1, 1, 6).reshape(1, 6, 1, 1))

    def forward(self) -> Tensor:
        return self.by


@pytest.mark.parametrize("layer", ["conv", "relu", "next"])
def test_what_is_changed_in_place_and_what_has_no_row_for_an_image_is_right(layer: str, pixels: np.ndarray) -> None:
    network = opened(InPlace())
    inputs = network.inputs(pixels)
    tail = Tail(network, network.layer(layer), inputs)
    rows = torch.tensor([3, 0, 2])
    changed = tail.maps[rows]
    changed[:, 1] = 0
    found = tail.shares_with(changed, rows)

    def without(_: nn.Module, __: object, output: Tensor) -> None:
        output[:, 1] = 0  # in place: all that reads the layer's maps reads these

    handle = network.layer(layer).module.register_forward_hook(without)
    with torch.no_grad():
        expected = network.network(inputs[rows]).softmax(1)
    handle.remove()
    torch.testing.assert_close(found, expected)
    assert (found - tail.shares[rows]).abs().max() > 1e-3


def test_a_gradient_takes_every_way_from_what_a_layer_changed_in_place(pixels: np.ndarray) -> None:
    network = opened(InPlace())
    net = network.network
    assert isinstance(net, InPlace)
    inputs = network.inputs(pixels)
    maps, output = network.behind(network.layer("relu"), inputs)
    assert isinstance(output, Tensor)
    (found,) = torch.autograd.grad(output[:, 1].sum(), maps)
    own = maps.detach().clone().requires_grad_()
    x = net.next(own + net.shift()) + own
    both = net.mirrored(torch.cat((x, x.flip(3)))).relu()
    (expected,) = torch.autograd.grad(net.head(20 * sum(both.chunk(2)).mean((2, 3)))[:, 1].sum(), own)
    torch.testing.assert_close(found, expected)


def test_a_network_that_answers_otherwise_each_time_has_no_units_left_out(pictures: Path) -> None:
    class Random(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(5)

    found = looked(opened(Random()), "next", pictures)
    assert found.ablated == 0
    assert any("does not answer the same of the same images in another order" in note for note in found.notes)


def test_a_graph_has_the_units_of_the_network(planted: Opened, found: Units, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(onnx_from_torch(planted.network, PREPROCESS, uint8_input=True).SerializeToString())
    graph = open_graph("graph", file, None, (PREPROCESS, []))
    made = looked(graph, graph.last_map().name, pictures)
    assert (made.dead, made.undecisive) == (found.dead, found.undecisive)
    assert [unit.changed for unit in made.units] == [unit.changed for unit in found.units]
    assert [unit.top[0].picture for unit in made.units] == [unit.top[0].picture for unit in found.units]


def test_a_network_that_is_no_classifier_and_a_layer_before_its_activation_are_noted(pictures: Path) -> None:
    made = looked(opened(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3))), "0", pictures)
    assert made.ablated == 0
    assert made.to_json()["never_decisive"] is None
    assert "0 has negative values" in made.notes[0]
    assert "no unit was left out: net is no classifier" in made.notes[1]


def test_a_unit_likes_what_it_was_made_for() -> None:
    """Unit 0 reads red against blue, unit 1 is off on noise, unit 2 is nothing."""
    layer = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()  # type: ignore[union-attr]
        layer.weight[0, 0], layer.weight[0, 2] = 1, -1
        layer.weight[1, :], layer.bias[1] = 1, -5  # type: ignore[index]
    network = opened(nn.Sequential(layer, nn.ReLU()))
    made = preferred(network, network.layer("1"), [0, 1, 2], Quiet())
    assert made[0].shape == (*SIZE, 3)
    red, _, blue = made[0].reshape(-1, 3).mean(0)
    assert red > blue + 20
    assert maps(network, "1", made[1][None])[0, 1].max() > 0
    again = preferred(network, network.layer("1"), [0, 1, 2], Quiet())
    assert all((one == other).all() for one, other in zip(made, again, strict=True))
    other = preferred(network, network.layer("1"), [0], Quiet(), seed=1)
    assert (other[0] != made[0]).any()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_projection_is_that_of_the_paper(in_place: bool) -> None:
    """Unpooling by switches, a ReLU of what comes back, and the transposed convolution, written out."""
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
    network = opened(nn.Sequential(one, nn.ReLU(inplace=in_place), nn.MaxPool2d(2), two, nn.ReLU(inplace=in_place)))
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    with torch.no_grad():
        rectified = F.relu(one(network.inputs(pixels)))
        pooled, switches = F.max_pool2d(rectified, 2, return_indices=True)
        top = F.relu(two(pooled))
        place = divmod(int(top[0, 2].argmax()), top.shape[3])
        signal = torch.zeros_like(top)
        signal[0, 2][place] = top[0, 2][place]
        signal = F.conv_transpose2d(signal, two.weight, padding=1)
        signal = F.relu(F.max_unpool2d(signal, switches, 2))
        expected = F.conv_transpose2d(signal, one.weight, padding=1)
    made = projections(network, network.layer("4"), pixels, 2, [Excited(0, (place[0], place[1]), 0.0)])
    torch.testing.assert_close(torch.from_numpy(made.copy()).permute(0, 3, 1, 2), expected)
    assert np.abs(made).max() > 0


def test_what_has_no_way_back_is_named() -> None:
    pixels = np.zeros((1, *SIZE, 3), np.uint8)
    for gate, told in ((nn.SiLU(), "silu"), (nn.Sigmoid(), "sigmoid"), (nn.LocalResponseNorm(2), "")):
        network = opened(nn.Sequential(nn.Conv2d(3, 2, 3), gate, nn.ReLU6()))
        with pytest.raises(BadInput, match=f"no projection leads back from 2: on the way lies {told}"):
            projections(network, network.layer("2"), pixels, 0, [Excited(0, (0, 0), 0.0)])


def test_the_page_carries_the_units_and_nothing_from_elsewhere(planted: Opened, found: Units) -> None:
    ones, why = shown(planted, found, 2, Quiet())
    assert why == ""
    assert [one.unit.index for one in ones] == [unit.index for unit in found.order[:2]]
    page = html(Found(planted, units=found), Pictures(ones, why))
    assert page.count('<section class="unit">') == 2
    assert page.count("data:image/jpeg;base64,") == 8
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page


def test_the_command_tells_the_units_of_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convoynet.exporter.assets import digits

    for index, image in enumerate(digits().test[:8]):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{index}.png")
    page = tmp_path / "units.html"
    line = ["lenet5", "--units", "s4", "--images", str(tmp_path), "--max-images", "6", "--ablate", "4", "--most", "1"]
    assert inspect([*line, "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["units"]
    assert (told["layer"], len(told["units"]), told["ablated_on"]) == ("s4", 16, 4)
    assert told["images"].startswith("6 of the 8 images")
    assert {"unit", "top", "probability_lost", "most_alike"} <= told["units"][0].keys()
    # LeNet-5's units are a scaled tanh, through which no projection leads.
    assert "no projection leads back from s4: on the way lies tanh" in page.read_text()
    assert inspect([*line[:-2], "--ablate", "0"]) == 0
    said = capsys.readouterr().out
    assert "16 units over 5x5 places" in said
    assert "undecisive" not in said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lenet5 --units s44 --images {}", "did you mean s4"),
        ("lenet5 --units output --images {}", "output of lenet5 has no map"),
    ],
)
def test_the_command_refuses_in_one_line(
    line: str, told: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(line.format(pictures).split()) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
