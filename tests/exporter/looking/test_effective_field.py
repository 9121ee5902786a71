import json
import re
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter.commands.inspect_command import inspect
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.inspecting.connections import connections
from convoynet.exporter.inspecting.inspection import axes_of
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch
from convoynet.exporter.looking.effective_field import EffectiveField, effective_field
from convoynet.exporter.looking.opened import Opened, open_graph
from convoynet.exporter.progress import Quiet
from tests.exporter.looking.conftest import PREPROCESS, SIZE, Net, opened

GREY = Preprocess((31, 31), (31, 31), (0.0,), (1.0,))


def found(network: Opened, layer: str, images: np.ndarray) -> EffectiveField:
    return effective_field(network, network.layer(layer), images, "pictures", Quiet())


def ones(*kernels: int, dilation: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(1, 1, k, padding=dilation * (k // 2), dilation=dilation, bias=False) for k in kernels]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("kernels", [(3,), (3, 3), (3, 3, 3, 3, 3), (5, 3, 7)])
def test_the_field_of_ones_is_repeated_convolution(kernels: tuple[int, ...]) -> None:
    network = opened(ones(*kernels), preprocess=GREY)
    images = np.random.default_rng(0).integers(0, 256, (3, 31, 31, 1), np.uint8)
    field = found(network, str(len(kernels) - 1), images)
    line = reduce(np.convolve, [np.ones(k) for k in kernels])
    expected = np.zeros((31, 31))
    reach = len(line) // 2
    expected[15 - reach : 16 + reach, 15 - reach : 16 + reach] = np.outer(line, line)
    np.testing.assert_array_equal(field.sizes, expected)
    assert field.field is not None
    assert field.field.size == (len(line), len(line))
    assert field.pixels == (np.outer(line, line) >= 0.0455 * (line.max() ** 2)).sum()
    assert field.share_of_field == field.pixels / len(line) ** 2
    assert field.share_of_image == field.pixels / 31**2


def along(network: nn.Module, layer: str, size: tuple[int, int], place: tuple[int, int]) -> list[list[int]]:
    trace = trace_from_torch("net", network, (1, *size))
    counts = connections(trace, axes_of(trace, size), trace.modules[layer], place)
    assert counts is not None
    return [each.tolist() for each in counts]


def test_five_layers_of_three_taps_have_the_connections_of_the_paper() -> None:
    down, across = along(ones(3, 3, 3, 3, 3), "4", (21, 15), (10, 7))
    told = [5, 13, 24, 31, 36, 37, 36, 31, 24, 13, 5]
    assert down == [0] * 5 + told + [0] * 5
    assert across == [0] * 2 + told + [0] * 2
    # Activations and sums join nothing that was not joined.
    with_activations = nn.Sequential(*(part for layer in ones(3, 3, 3, 3, 3) for part in (layer, nn.ReLU())))
    assert along(with_activations, "9", (21, 15), (10, 7))[0] == down


def counted(layers: list[tuple[int, int, int, int]], size: int, place: int) -> list[int]:
    """The connections of a chain by walking every way: (kernel, stride, padding, dilation) of each layer."""
    sizes = [size]
    for k, s, p, d in layers:
        sizes.append((sizes[-1] + 2 * p - d * (k - 1) - 1) // s + 1)

    def walk(depth: int, cell: int) -> list[list[tuple[int, int, int]]]:
        if depth == 0:
            return [[]]
        k, s, p, d = layers[depth - 1]
        before = [cell * s - p + d * tap for tap in range(k)]
        return [
            [*way, (depth, one, cell)] for one in before if 0 <= one < sizes[depth - 1] for way in walk(depth - 1, one)
        ]

    ways = walk(len(layers), place)
    return [len({edge for way in ways if way[0][1] == pixel for edge in way}) for pixel in range(size)]


@pytest.mark.parametrize(
    "layers",
    [
        [(3, 2, 1, 1), (3, 1, 1, 1), (2, 2, 0, 1)],
        [(5, 1, 0, 1), (1, 1, 0, 1), (3, 1, 2, 2)],
        [(3, 1, 1, 1), (3, 1, 2, 2), (3, 1, 4, 4)],
    ],
)
def test_the_connections_of_a_chain_are_those_on_its_ways(layers: list[tuple[int, int, int, int]]) -> None:
    network = nn.Sequential(*(nn.Conv2d(1, 1, k, s, p, d) for k, s, p, d in layers))
    down, across = along(network, str(len(layers) - 1), (17, 16), (2, 3))
    assert down == counted(layers, 17, 2)
    assert across == counted(layers, 16, 3)


def test_branches_and_gates_add_their_connections() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 5, padding=2)
            self.last = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.last(x + self.one(x) + self.two(x))
            return made

    assert along(Branched(), "last", (9, 9), (4, 4))[0] == [0, 0, 1, 2, 2, 2, 1, 0, 0]
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Upsample(scale_factor=2))
    assert along(pooled, "1", (8, 8), (0, 0))[0] == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("uint8", [False, True])
def test_a_graph_has_the_field_of_the_network(network: Opened, pixels: np.ndarray, tmp_path: Path, uint8: bool) -> None:
    expected = found(network, "last.1", pixels)
    file = tmp_path / "net.onnx"
    file.write_bytes(onnx_from_torch(network.network, PREPROCESS, uint8_input=uint8).SerializeToString())
    graph = open_graph("graph", file, None, (PREPROCESS, []))
    last = graph.last_map()
    assert (last.channels, last.size) == (8, network.layer("last.1").size)
    made = effective_field(graph, last, pixels, "pictures", Quiet())
    # Of pixels of 0 to 255 the gradient is smaller by as much everywhere.
    np.testing.assert_allclose(made.sizes / made.sizes.max(), expected.sizes / expected.sizes.max(), atol=1e-5)
    assert (made.field, made.pixels) == (expected.field, expected.pixels)
    assert [counts.tolist() for counts in made.connections or []] == [
        counts.tolist() for counts in expected.connections or []
    ]


def test_what_cannot_be_looked_at_is_one_line(network: Opened, pixels: np.ndarray) -> None:
    for name, told in (
        ("lats.1", "net has no layer 'lats.1': did you mean last.1"),
        ("zzz", "net has no layer 'zzz': `convoy inspect` lists them"),
        ("", "no layer ''"),
        ("relu:2", "relu:2 of net is a further use of relu, and the first alone is looked into: say relu"),
        ("head", "head of net has no map of channels over places (it returns 4 for an image): choose a layer that has "
         "one, such as last"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=re.escape(told)):
            network.layer(name)
    flat = opened(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 4)), "flat")
    with pytest.raises(BadInput, match="flat has no feature map"):
        flat.last_map()
    boxes = opened(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1)))
    assert boxes.last_map().name == "0"
    with pytest.raises(BadInput, match="2 of net has no map of channels over places"):
        boxes.layer("2")
    off = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.constant_(off[0].get_parameter("bias"), -1e6)
    with pytest.raises(BadInput, match="no gradient arrives at the image from the middle of 1: all its 2"):
        found(opened(off), "1", pixels)


def test_the_modules_of_a_trace_are_in_the_order_of_their_first_calls() -> None:
    names = list(trace_from_torch("net", Net(), (3, *SIZE)).modules)
    assert names == ["stem", "relu", "block", "pool", "last.0", "last.1", "last", "head"]
    assert all(a != b for a, b in pairwise(names))


def test_the_command_tells_the_field_of_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "field.html"
    torch.manual_seed(0)
    assert inspect(["lenet5", "--erf", "s4", "--max-images", "5", "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    field = told["effective_field"]
    assert told["input_size"] == [32, 32]
    assert (field["layer"], field["theoretical_field"]) == ("s4", [16, 16])
    assert 0 < field["share_of_image"] <= 0.25
    assert sum(count > 0 for count in field["connections"]["rows"]) == 16
    content = page.read_text()
    assert "What s4 really sees" in content
    assert not re.search(r"""(src|href)=["'](?!data:)""", content)
    assert inspect(["lenet5", "--erf", "--max-images", "5"]) == 0
    assert "as many as a square of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lenet5 --erf output", "output of lenet5 has no map"),
        ("lenet5 --erf c33", "did you mean c3"),
        ("lenet5 --erf --weights absent.pt", "absent.pt: no such file"),
    ],
)
def test_the_command_refuses_in_one_line(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(line.split()) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
