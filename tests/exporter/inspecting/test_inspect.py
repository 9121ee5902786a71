import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.commands.inspect_command import inspect
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.inspecting.inspection import Inspection, Layer, inspection
from convoynet.exporter.inspecting.trace_from_onnx import is_two_of_four, trace_from_onnx
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.given_files import from_torch
from tests.exporter.small_nets import PREPROCESS, SmallNet, pixels, small_net

FAMILIES = (
    "lenet5", "alexnet", "alexnet-2012", "vgg11-lrn", "vgg13_bn", "nin", "googlenet", "inception_v3", "resnet50",
    "resnet20", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "xception",
)  # fmt: skip


def network(name: str) -> nn.Module:
    arch = archs.get(name)
    with torch.device("meta"):
        return arch.build(arch.num_classes)


def inspected(name: str, size: tuple[int, int] | None = None, *, fully_convolutional: bool = False) -> Inspection:
    trace = trace_from_torch(name, network(name), archs.get(name).input_size)
    return inspection(trace, size, fully_convolutional=fully_convolutional)


def layer(found: Inspection, name: str) -> Layer:
    (match,) = (item for item in found.layers if item.name == name)
    return match


def field(found: Inspection, name: str) -> tuple[float, float | None, float]:
    """Size, stride and centre of a layer with the same field in both directions."""
    height, width = layer(found, name).field or pytest.fail("no field")
    assert height == width
    return float(height.size), None if height.stride is None else float(height.stride), float(height.centre)


@pytest.mark.parametrize(
    ("name", "classifier", "pool5"), [("vgg13", 348, 156), ("vgg16", 404, 212), ("vgg19", 460, 268)]
)
def test_vgg_sees_what_the_literature_says(name: str, classifier: int, pool5: int) -> None:
    last_pool = [item.name for item in inspected(name).layers if item.type == "MaxPool2d"][-1]
    assert field(inspected(name), last_pool) == (pool5, 32, 15.5)
    assert field(inspected(name), "classifier.0") == (classifier, None, 111.5)
    assert field(inspected(name, fully_convolutional=True), "classifier.0") == (classifier, 32, 111.5)


# Araujo et al. 2019, the table of google-research/receptive_field; the centres there follow TensorFlow's padding.
@pytest.mark.parametrize(
    ("name", "at", "size", "stride"),
    [
        ("alexnet", "features.12", 195, 32),
        ("inception_v3", "Mixed_7c.concat:3", 1311, 32),
        ("mobilenetv1_100", "blocks.4.1.conv_pw", 315, 32),
        ("resnet18", "layer4.1.add", 435, 32),
    ],
)
def test_published_fields(name: str, at: str, size: int, stride: int) -> None:
    assert field(inspected(name), at)[:2] == (size, stride)


def test_resnet50_has_the_published_field_where_the_stride_is() -> None:
    # torchvision strides in the first block of a stage, the published 483 is of a net that strides in the last.
    assert field(inspected("resnet50"), "layer4.2.add")[:2] == (427, 32)
    model: Any = network("resnet50")
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv2.stride = stage[0].downsample[0].stride = (1, 1)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[-1].conv2.stride, stage[-1].downsample = (2, 2), nn.MaxPool2d(1, 2)
    found = inspection(trace_from_torch("moved", model, (3, 224, 224)), fully_convolutional=False)
    assert field(found, "layer4.2.add")[:2] == (483, 32)


def test_a_bottleneck_needs_a_seventeenth_of_the_weights() -> None:
    def weights(name: str, block: str) -> int:
        return sum(item.parameters for item in inspected(name).layers if item.name.startswith(f"{block}.conv"))

    assert weights("resnet50", "layer1.1") == 69_632  # 256 -> 64 -> 64 -> 256
    assert weights("resnet34", "layer3.1") == 1_179_648  # two of 3x3, 256 channels


def test_lenet5_has_the_connections_of_the_paper() -> None:
    found = inspected("lenet5")
    connections = {item.name: item.connections for item in found.layers if item.connections is not None}
    assert connections == {
        "c1": 122_304, "s2": 5_880, "c3": 151_600, "s4": 2_000, "c5": 48_120, "f6": 10_164, "output": 840,
    }  # fmt: skip
    assert found.macs == archs.count(network("lenet5"), (1, 32, 32)).macs
    assert layer(found, "s2").parameters == 12
    assert layer(found, "c3").parameters == 1_516
    assert field(found, "c5") == (32, 4, 15.5)


def check_totals(name: str) -> None:
    count = archs.count(network(name), archs.get(name).input_size)
    found = inspected(name)
    assert (found.parameters, found.macs, found.unused_parameters) == (count.parameters, count.macs, 0)
    if archs.get(name).task == "detection":
        return  # behind the proposals, positions are those of boxes
    assert all(item.field for item in found.layers)
    # Read as convolutions and at its own size, a classifier costs the same: its map has one position.
    assert inspected(name, fully_convolutional=True).macs == count.macs


@pytest.mark.parametrize("name", FAMILIES)
def test_totals_are_those_of_count(name: str) -> None:
    check_totals(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*archs.names()} - {*FAMILIES}))
def test_totals_are_those_of_count_for_all(name: str) -> None:
    check_totals(name)


class Branches(nn.Module):
    """Residual with a strided shortcut, and branches of different fields, one of them not square."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 5, stride=2, padding=1)
        self.tall = nn.Conv2d(2, 2, (7, 1), padding=(3, 0))
        self.wide = nn.Conv2d(2, 2, (1, 3), padding=(0, 1), dilation=(1, 1))
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((self.tall(x), self.wide(x)), 1)
        total: Tensor = self.strided(x) + self.shortcut(x)
        return total[:, :, 1:, ::2]


NETS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "dilation": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, dilation=3, padding=2), nn.Conv2d(2, 2, 3, stride=3)),
    "ceil mode": lambda: nn.Sequential(
        nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(2, ceil_mode=True)
    ),
    "uneven padding": lambda: nn.Sequential(nn.ZeroPad2d((0, 3, 1, 0)), nn.Conv2d(1, 1, 4, stride=2)),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.ConvTranspose2d(1, 1, 3, stride=1, padding=1), nn.Conv2d(1, 1, 3)
    ),
    "lrn": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.LocalResponseNorm(5), nn.Conv2d(8, 1, 3)),
    "adaptive": lambda: nn.Sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(4)),
    "global": lambda: nn.Sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)),
}


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_gradient_reaches_the_field_and_no_further(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.1, 1)  # of one sign, so that no two paths cancel
    size = (48, 64)
    found = inspection(trace_from_torch(name, model, (1, *size)), fully_convolutional=False)
    image = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    output = model(image)
    last = found.layers[-1]
    assert last.output_shape == tuple(output.shape[1:])
    height, width = last.field or pytest.fail("no field")
    rows, columns = output.shape[2:]
    for row, column in {(0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1), (0, columns // 3)}:
        (gradient,) = torch.autograd.grad(output[0, :, row, column].sum(), image, retain_graph=True)
        for seen, axis, position, limit in (
            (gradient[0, 0].any(1), height, row, size[0]),
            (gradient[0, 0].any(0), width, column, size[1]),
        ):
            centre = axis.centre + position * (axis.stride or 0)
            reach = (axis.size - 1) / 2
            expected = max(math.ceil(centre - reach), 0), min(math.floor(centre + reach), limit - 1)
            found_pixels = seen.nonzero().flatten()
            assert (int(found_pixels[0]), int(found_pixels[-1])) == expected, (row, column)


def dilated(*rates: int, sides: int = 1) -> nn.Sequential:
    """A strided layer, and 3x3 convolutions with these rates behind it."""
    layers = [nn.Conv2d(1, 1, 3, stride=2, padding=1), *(nn.Conv2d(1, 1, 3, padding=r, dilation=r) for r in rates)]
    return nn.Sequential(*layers)


# Wang et al. 2018, section 3.2 and Fig. 2: rates of 2, 2, 2 leave holes, 1, 2, 3 and 1, 2, 5 do not, 1, 2, 9 do.
@pytest.mark.parametrize(
    ("rates", "field", "unseen"),
    [((2, 2, 2), 13, 6), ((2,), 5, 2), ((4, 4), 17, 12), ((2, 3), 11, 2), ((2, 2, 2, 1), 15, 0), ((2, 4, 2), 17, 8)],
)
def test_gridding_is_the_cells_that_a_dilated_stack_never_sees(rates: tuple[int, ...], field: int, unseen: int) -> None:
    model = dilated(*rates)
    found = inspection(trace_from_torch("dilated", model, (1, 96, 64)), fully_convolutional=False).layers
    assert found[0].cells is None
    told = found[-1].to_json()
    assert (told["dilated_field"], told["dilated_unseen"]) == ([field] * 2, [unseen] * 2)
    # By where a gradient arrives, of the map where the stack begins.
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    cells = torch.rand(1, 1, 48, 48, requires_grad=True)
    model[1:](cells)[0, 0, 24, 24].backward()
    assert cells.grad is not None
    seen = cells.grad[0, 0].any(1).nonzero().flatten().tolist()
    assert (seen[-1] - seen[0] + 1, seen[-1] - seen[0] + 1 - len(seen)) == (field, unseen)


def test_a_shortcut_and_branches_see_what_any_of_them_sees() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = nn.Conv2d(1, 1, 3, padding=2, dilation=2)
            self.three = nn.Conv2d(1, 1, (3, 1), padding=(3, 0), dilation=(3, 1))
            self.down = nn.Conv2d(1, 1, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.two(x) + self.three(x)
            return torch.as_tensor(self.down(x))

    found = inspection(trace_from_torch("branched", Branched(), (1, 32, 32)), fully_convolutional=False)
    told = layer(found, "add:2").to_json()
    assert (told["dilated_field"], told["dilated_unseen"]) == ([7, 5], [2, 2])  # -3 -2 0 2 3, and -2 0 2
    assert layer(found, "down").to_json()["dilated_field"] is None  # another resolution


def test_layers_without_dilation_and_hybrid_rates_take_the_grid_away() -> None:
    def unseen(name: str, *at: str) -> list[tuple[int, int]]:
        found = inspected(name)
        stacks = [layer(found, each).cells or pytest.fail("no stack") for each in at]
        assert all(height == width for height, width in stacks)
        return [(height.unseen, height.extent) for height, _ in stacks]

    # The table of docs/inspecting.md.
    assert unseen("fcn_resnet50", "backbone.layer4.2.conv2") == [(20, 41)]
    assert unseen("drn_d_22", "layer6.1.conv2", "layer8.0") == [(24, 49), (0, 55)]
    assert unseen("hdc_resnet101", "backbone.layer4.2.conv2") == [(0, 247)]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.after = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        after: Tensor = self.after(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())
        return after


def test_a_gate_lets_every_position_see_the_whole_image() -> None:
    found = inspection(trace_from_torch("se", SqueezeExcite(), (3, 16, 16)), fully_convolutional=False)
    assert field(found, "before") == (3, 2, 0)
    assert field(found, "gate") == (17, None, 7)  # eight windows of 3, two pixels apart: -1 to 15
    assert field(found, "after") == (17, 2, 2)  # what moves with the output is about pixel 2
    # In the middle of the network the pooling is no part of the classifier.
    again = inspection(trace_from_torch("se", SqueezeExcite(), (3, 16, 16)), (32, 32), fully_convolutional=True)
    assert field(again, "gate") == (33, None, 15)
    assert layer(again, "after").output_shape == (4, 14, 14)


class Classifier(nn.Module):
    """A classifier, as matrices or as the same convolutions."""

    def __init__(self, *, convolutions: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
        if convolutions:
            self.hidden: nn.Module = nn.Conv2d(4, 9, (4, 5))
            self.output: nn.Module = nn.Conv2d(9, 7, 1)
        else:
            self.hidden, self.output = nn.Linear(4 * 4 * 5, 9), nn.Linear(9, 7)
        self.convolutions = convolutions

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        scores: Tensor = self.output(self.hidden(x if self.convolutions else x.flatten(1)).relu())
        return scores


def test_matrices_read_as_convolutions_are_the_convolutions() -> None:
    trace = trace_from_torch("matrices", Classifier(convolutions=False), (3, 16, 20))
    read = inspection(trace, (40, 33), fully_convolutional=True)
    real = inspection(
        trace_from_torch("convolutions", Classifier(convolutions=True), (3, 40, 33)), fully_convolutional=False
    )
    for name in ("hidden", "output"):
        one, other = layer(read, name), layer(real, name)
        assert (one.output_shape, one.macs, one.connections, one.parameters, one.field) == (
            other.output_shape, other.macs, other.connections, other.parameters, other.field,
        )  # fmt: skip
    assert (read.parameters, read.macs) == (real.parameters, real.macs)
    with pytest.raises(BadInput, match="12x20 is too small: nothing is left of it at hidden"):
        inspection(trace, (12, 20), fully_convolutional=True)


def test_vgg16_at_384_pixels_gives_a_map_of_six_by_six() -> None:
    found = inspected("vgg16", (384, 384), fully_convolutional=True)
    assert layer(found, "classifier.6").output_shape == (1000, 6, 6)
    assert layer(found, "classifier.0").macs == 36 * 102_760_448


class Odd(nn.Module):
    """A parameter used twice, one not at all, control flow over shapes, and an operator that mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.unused = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 4:
            x = torch.max_pool2d(self.conv(x), 2)
        scores: Tensor = self.head(x.flip(2).mean((2, 3)))
        return scores


def test_what_is_not_known_is_not_guessed() -> None:
    model = Odd().train()
    found = inspection(trace_from_torch("odd", model, (3, 16, 16)), fully_convolutional=False)
    assert model.training
    assert [item.parameters for item in found.layers if item.type == "Conv2d"] == [81, 0]
    assert (found.parameters, found.unused_parameters) == (81 + 5 + 8, 5)
    assert layer(found, "flip").field is None
    assert layer(found, "head").to_json()["receptive_field"] is None
    with pytest.raises(BadInput, match="cannot be read as fully convolutional"):
        inspection(trace_from_torch("odd", model, (3, 16, 16)), fully_convolutional=True)
    with pytest.raises(BadInput, match="does not take an image of 16x16"):
        trace_from_torch("odd", model, (1, 16, 16))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def graphs(model: nn.Module) -> dict[str, onnx.ModelProto]:
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=True)
    ranges = calibrate(graph, [pixels(4)], "minmax")
    return {"fp32": graph, "cpu": quantize(graph, ranges, "cpu"), "gpu": quantize(graph, ranges, "gpu")}


def weighted(found: Inspection) -> list[tuple[object, ...]]:
    return [(item.output_shape, item.macs, item.connections, item.field) for item in found.layers if item.macs]


@pytest.mark.parametrize("kind", ["fp32", "cpu", "gpu"])
def test_a_graph_says_what_the_network_says(model: nn.Module, graphs: dict[str, onnx.ModelProto], kind: str) -> None:
    expected = inspection(trace_from_torch("net", model, (3, 32, 32)), fully_convolutional=False)
    found = inspection(trace_from_onnx("net", graphs[kind]), fully_convolutional=False)
    assert [row[:2] + row[3:] for row in weighted(found)] == [row[:2] + row[3:] for row in weighted(expected)]
    larger = [
        inspection(trace, (64, 48), fully_convolutional=True)
        for trace in (trace_from_torch("net", model, (3, 32, 32)), trace_from_onnx("net", graphs[kind]))
    ]
    assert larger[0].macs == larger[1].macs
    assert larger[0].layers[-1].output_shape == larger[1].layers[-1].output_shape == (20, 17, 9)
    # Folding replaces scale and shift of each normalisation by a bias.
    channels = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    normalisation = 2 * 3  # the graph holds the scale and the shift of the pixels
    assert found.parameters == expected.parameters - channels + normalisation


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_shapes_that_a_graph_computes_are_worked_out(size: tuple[int, int], tmp_path: Path) -> None:
    """Of a shuffle of channels, with a division of what Shape says, by the old exporter with everything open."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.a(x[:, :3])
                n, c, h, w = x.shape
                x = self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
            return x.view(x.shape[0], -1, x.shape[2] * x.shape[3]).mean(2)

    model = Shuffled()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    file = from_torch(
        tmp_path / "shuffled.onnx",
        model,
        dynamo=False,
        input_names=["x"],
        dynamic=axes,
        example=torch.rand(1, 3, 32, 32),
    )
    graph = onnx.load(file)
    assert {"Shape", "Div", "Gather"} <= {node.op_type for node in graph.graph.node}
    found = inspection(trace_from_onnx("shuffled", graph, size), fully_convolutional=False)
    wanted = inspection(trace_from_torch("shuffled", model, (3, *size)), fully_convolutional=False)
    rows = [(row.output_shape, row.macs) for row in found.layers if row.macs]
    assert rows == [(row.output_shape, row.macs) for row in wanted.layers if row.macs]
    assert found.layers[-1].output_shape == wanted.layers[-1].output_shape == (8,)


def test_precision_is_what_surrounds_an_operator(graphs: dict[str, onnx.ModelProto]) -> None:
    found = {
        kind: inspection(trace_from_onnx(kind, graph), fully_convolutional=False) for kind, graph in graphs.items()
    }
    assert set(found["fp32"].macs_by_precision) == {"fp32"}
    assert set(found["cpu"].macs_by_precision) == {"int8"}
    by_type = {kind: {(item.type, item.precision) for item in one.layers} for kind, one in found.items()}
    assert {("Conv", "int8"), ("Concat", "int8")} <= by_type["cpu"] & by_type["gpu"]
    assert {("MaxPool", "int8"), ("Add", "int8")} <= by_type["cpu"]
    assert {("MaxPool", "fp32"), ("Add", "fp32")} <= by_type["gpu"]  # their inputs come from operators in float
    assert ("MaxPool", "fp32") in by_type["fp32"]
    assert not {kind for kind, _ in by_type["cpu"]} & {"QuantizeLinear", "DequantizeLinear"}


def test_zeros_are_counted_through_quantization() -> None:
    pruned = SmallNet()
    with torch.no_grad():
        wide, again = (convolution.get_parameter("0.weight") for convolution in (pruned.wide, pruned.again))
        wide[:, ::4] = wide[:, 1::4] = 0  # 32 x 16 x 3 x 3, two of any four inputs
        again[:16] = 0  # 32 x 32 x 3 x 3, half of the outputs
    graph = onnx_from_torch(pruned.eval(), PREPROCESS, uint8_input=False)
    ranges = calibrate(graph, [PREPROCESS.normalize(pixels(2))], "minmax")
    for kind in ("fp32", "cpu", "gpu"):
        ready = graph if kind == "fp32" else quantize(graph, ranges, kind)
        found = inspection(trace_from_onnx(kind, ready), fully_convolutional=False)
        # Of the weights, in order: stem, wide, project, again.
        rows = [item.to_json() for item in found.layers if item.weights]
        first, second = rows[1], rows[3]
        assert (first["sparse_2_4"], second["sparse_2_4"]) == (True, False)
        assert first["sparsity"] == pytest.approx(0.5, abs=0.02)  # rounding to INT8 makes a few more
        assert second["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 1, 0, 0, 0, 1, 0, 1]], True),
        ([[1, 1, 0, 0, 1, 1, 0, 1]], False),  # as many zeros as it takes would be 4, but 3 of the last four are set
        ([[0, 1, 1, 1, 0, 0, 0, 0]], False),  # enough zeros in all, not in each four
        ([[1, 1, 0, 0, 1, 1]], True),
        ([[0, 0, 0, 0, 1, 1, 1]], False),
        ([[0, 0, 1]], False),  # fewer than four: there is nothing to skip
    ],
)
def test_two_of_four(rows: list[list[int]], expected: bool) -> None:
    weights = np.array(rows, bool)
    assert is_two_of_four(weights, 1) is expected
    assert is_two_of_four(weights.T, 0) is expected


def graph_of(nodes: list[onnx.NodeProto], image: list[int | str], **weights: np.ndarray) -> onnx.ModelProto:
    kind = next(helper.np_dtype_to_tensor_dtype(weight.dtype) for weight in weights.values())
    element = TensorProto.FLOAT if kind == TensorProto.INT8 else kind
    return helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", element, image)],
            [helper.make_tensor_value_info("y", element, None)],
            [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("my", 1)],
    )


def test_other_precisions() -> None:
    half = graph_of(
        [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        ["n", 3, "h", "w"],
        w=np.ones((4, 3, 5, 5), np.float16),
    )
    with pytest.raises(BadInput, match="images of any size: choose one with --input-size"):
        trace_from_onnx("half", half)
    (conv,) = inspection(trace_from_onnx("half", half, (16, 15)), fully_convolutional=False).layers
    assert (conv.precision, conv.output_shape) == ("fp16", (4, 8, 8))
    height, width = conv.field or pytest.fail("no field")
    # Sixteen rows lack three of padding, the larger part behind; fifteen columns lack four.
    assert (float(height.centre), float(width.centre)) == (1, 0)

    weights_only = graph_of(
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=0),
            helper.make_node("Conv", ["x", "f"], ["y"]),
        ],
        [8, 4, 9, 9],
        w=np.array([3, 5], np.int8).reshape(2, 1, 1, 1) * np.ones((2, 4, 3, 3), np.int8),
        s=np.ones(2, np.float32),
        z=np.array([3, 0], np.int8),
    )
    (conv,) = inspection(trace_from_onnx("weights", weights_only), fully_convolutional=False).layers
    assert (conv.precision, conv.parameters, conv.macs) == ("fp32, int8 weights", 72, 49 * 72)
    assert conv.to_json()["sparsity"] == 0.5  # the first channel's zero is stored as 3


@pytest.mark.parametrize(
    ("nodes", "image", "message"),
    [
        ([helper.make_node("Add", ["x", "w"], ["y"])], [1, 4], "2 dimensions; an image has four"),
        ([helper.make_node("Secret", ["x", "w"], ["y"], domain="my")], [1, 3, 8, 8], "cannot be worked out"),
        ([helper.make_node("Secret", ["x", "w"], ["y"], domain="your")], [1, 3, 8, 8], "no valid ONNX graph"),
        ([helper.make_node("Conv", ["x", "w"], ["y"])], [1, 5, 8, 8], "the weights of Conv 'y' do not fit"),
    ],
)
def test_a_graph_of_something_else_is_refused(
    nodes: list[onnx.NodeProto], image: list[int | str], message: str
) -> None:
    graph = graph_of(nodes, image, w=np.ones((4, 3, 3, 3), np.float32))
    with pytest.raises(BadInput, match=message):
        trace_from_onnx("odd", graph)


@pytest.mark.parametrize("operator", ["Conv", "Relu"])
def test_what_branches_compute_of_the_image_is_in_the_table_or_refused(operator: str) -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node(operator, ["x", "w"] if operator == "Conv" else ["x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["chosen"], name="choice", **branches),
        helper.make_node("Conv", ["chosen", "w"], ["y"]),
    ]
    graph = graph_of(nodes, [1, 3, 8, 8], w=np.ones((3, 3, 3, 3), np.float32))
    if operator == "Conv":
        with pytest.raises(BadInput, match=r"If 'choice' has layers with weights in graphs of its own \(Conv\)"):
            trace_from_onnx("branches", graph)
    else:
        choice, conv = trace_from_onnx("branches", graph).operations
        assert (choice.type, choice.reads, conv.parameters, conv.macs) == ("If", ("x",), 81, 81 * 36)


def test_the_table_fits_and_has_a_line_of_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["googlenet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["name", "type", "output", "parameters", "MACs", "field", "stride", "centre"]
    count = archs.count(network("googlenet"), (3, 224, 224))
    (totals,) = (line for line in lines if line.startswith("googlenet at 224x224; "))
    assert f"{count.parameters:,} parameters; {count.macs:,} multiply-adds (fp32)" in totals


def test_the_table_has_a_column_for_the_grid_of_dilated_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["drn_d_22", "--input-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unseen" in lines[0].split()
    (line,) = (line for line in lines if line.startswith("layer6.1.conv2 "))
    assert "24 of 49" in line


def test_json_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        inspect(["lenet5-softmax", "--num-classes", "4", "--input-size", "32x36", "--fully-convolutional", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["input_size"], found["fully_convolutional"]) == ("lenet5-softmax", [32, 36], True)
    assert found["layers"][0] == {
        "name": "c1", "type": "Conv2d", "output_shape": [6, 28, 32], "parameters": 156, "macs": 134_400,
        "connections": 139_776, "receptive_field": [5, 5], "stride": [1, 1], "centre": [2, 2],
        "dilated_field": None, "dilated_unseen": None, "precision": "fp32", "sparsity": None, "sparse_2_4": None,
    }  # fmt: skip
    assert found["layers"][-1]["output_shape"] == [4, 1, 2]
    totals = found["totals"]
    assert totals["parameters"] == sum(item["parameters"] for item in found["layers"])
    assert totals["macs"] == sum(item["macs"] for item in found["layers"]) == totals["macs_by_precision"]["fp32"]


def test_a_folder_of_a_repository_is_its_newest_version(
    tmp_path: Path, graphs: dict[str, onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    for version, kind in (("2", "fp32"), ("10", "cpu")):
        (tmp_path / "net" / version).mkdir(parents=True)
        onnx.save(graphs[kind], tmp_path / "net" / version / "model.onnx")
    for source, precision in (("net", "int8"), ("net/2", "fp32"), ("net/2/model.onnx", "fp32")):
        assert inspect([str(tmp_path / source), "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)["totals"]["macs_by_precision"]) == {precision}
    assert inspect([str(tmp_path / "net")]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[-2:] == ["precision", "zeros"]
    assert "of the weights are zero" in table
    assert max(map(len, table.splitlines()[:-3])) <= 120


def test_what_cannot_be_inspected_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "engine" / "1").mkdir(parents=True)
    for arguments, message in (
        (["resnet5O"], "resnet50"),
        ([str(tmp_path / "missing.onnx")], "no such file"),
        ([str(tmp_path / "text.onnx")], "cannot be read as an ONNX model"),
        ([str(tmp_path / "empty.onnx")], "has no operators"),
        ([str(tmp_path / "engine")], "holds no model.onnx"),
        ([str(tmp_path / "text.onnx"), "--num-classes", "3"], "--num-classes builds a network of the zoo"),
        (["lenet5", "--input-size", "64"], "lenet5 does not take an image of 64x64"),
        (["lenet5", "--input-size", "0"], "not within 1 and"),
        (["lenet5", "--input-size", "3x"], "is not H or HxW"),
        (["resnet18", "--num-classes", "0"], "--num-classes 0 is not in 1"),
    ):
        assert inspect(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert message in err
        assert err.count("\n") == 1
