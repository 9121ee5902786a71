from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from convoynet.exporter.archs import get
from convoynet.exporter.archs.dilated import MARGIN, DilatedVGG16, context_module, front_end
from convoynet.exporter.archs.dilated_resnet import DenseUpsampling, PyramidPooling
from convoynet.exporter.archs.fcn8s import FCN8s
from convoynet.exporter.archs.from_torchvision import damp_residuals
from convoynet.exporter.archs.segmentation import Segmenter
from convoynet.exporter.archs.unet import UNet
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import operators, run, session_of
from tests.exporter.small_nets import PREPROCESS, DilatedTrunk, pixels, settled

NAMES = [f"{family}_resnet{depth}" for family in ("fcn", "deeplabv3") for depth in (50, 101)]
SMALL = {"deeplabv3_resnet50": 48}
"""On a narrow trunk with two blocks of each stage, the second of which is dilated as those after it."""
LARGE = {
    "fcn_resnet50": 48,
    "fcn_resnet101": 136,
    "pspnet_resnet50": 48,
    "deeplabv3_resnet101": 136,
    "dilated_vgg16": 192,
    "dilated_vgg16_context": 200,
}
LARGE_CLASSIFIERS = {"drn_d_22": 64, "drn_c_26": 64, "drn_c_58": 64, "drn_d_105": 64}


class NarrowDeepLab(Segmenter):
    """DeepLabV3's head of atrous convolutions on a trunk an eighth as wide as ResNet-50."""

    def __init__(self, classes: int) -> None:
        nn.Module.__init__(self)
        self.backbone = DilatedTrunk()
        damp_residuals(self.backbone)
        self.classifier = DeepLabHead(DilatedTrunk.CHANNELS, classes)


def preprocess_of(name: str, side: int) -> Preprocess:
    usual = get(name).preprocess
    return Preprocess(size=(side, side), resize=side, mean=usual.mean, std=usual.std)


def settled_network(name: str, side: int) -> tuple[nn.Module, NDArray[np.float32]]:
    arch = get(name)
    torch.manual_seed(0)
    model = NarrowDeepLab(arch.num_classes) if name in SMALL else arch.build(arch.num_classes)
    preprocess = preprocess_of(name, side)
    inputs = preprocess.normalize(made_images(5, preprocess.size, 3, 0))
    estimate_statistics(model, inputs)
    return model, inputs


@cache
def network(name: str, side: int) -> tuple[nn.Module, NDArray[np.float32], onnx.ModelProto]:
    model, inputs = settled_network(name, side)
    graph = onnx_from_torch(model, preprocess_of(name, side), uint8_input=False, task=get(name).task)
    return model, inputs, graph


def run_all(graph: onnx.ModelProto, inputs: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    session = session_of(graph)
    return list(session.run(None, {"input": inputs}))


def relative_error(value: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    return float(np.abs(value - truth).max() / np.abs(truth).max())


def run_all_sizes(name: str, side: int) -> None:
    """ONNX Runtime at 1, 2 and 5 is as close to the exact result as float32 PyTorch is, or to six digits."""
    model, inputs, graph = network(name, side)
    onnx.checker.check_model(graph, full_check=True)
    with torch.no_grad():
        single = model(torch.from_numpy(inputs)).numpy()
        exact = model.double()(torch.from_numpy(inputs).double()).numpy()
    model.float()
    allowed = max(2 * relative_error(single, exact), 1e-6 * 5)
    assert allowed < 5e-4
    assert single.std() > 1e-3
    for batch in (1, 2, 5):
        assert relative_error(run(graph, inputs[:batch]), exact[:batch]) <= allowed, batch


@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_onnx_runtime_computes_what_pytorch_computes(name: str, side: int) -> None:
    run_all_sizes(name, side)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [*LARGE.items(), *LARGE_CLASSIFIERS.items()])
def test_the_larger_ones_too(name: str, side: int) -> None:
    run_all_sizes(name, side)


@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_the_graph_has_logits_and_classes_at_the_input_resolution(name: str, side: int) -> None:
    _, inputs, graph = network(name, side)
    described = [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in graph.graph.output
    ]
    assert described == [
        ("logits", onnx.TensorProto.FLOAT, ["batch", 21, side, side]),
        ("classes", onnx.TensorProto.UINT8, ["batch", side, side]),
    ]
    assert not operators(graph).keys() & {"BatchNormalization", "Dropout", "NonZero", "If", "Loop"}
    logits, classes = run_all(graph, inputs)
    assert np.array_equal(logits.argmax(1), classes)
    assert len(np.unique(classes)) > 2


class SmallSegmenter(nn.Module):
    """A residual trunk at half the resolution, as FCN's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.head = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        maps = self.head(torch.relu(self.body(maps) + maps))
        return F.interpolate(maps, size=x.shape[-2:], mode="bilinear", align_corners=False)


@cache
def small(classes: int) -> onnx.ModelProto:
    torch.manual_seed(0)
    model = settled(SmallSegmenter(classes), PREPROCESS.normalize(pixels(16)))
    return onnx_from_torch(model, PREPROCESS, uint8_input=True, task="segmentation")


@pytest.mark.parametrize(("classes", "dtype"), [(21, np.uint8), (300, np.int32)])
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_int8_gives_nearly_every_pixel_its_class(classes: int, dtype: type, target: str) -> None:
    graph = small(classes)
    quantized = quantize(graph, calibrate(graph, [pixels(32)], "minmax"), target)
    exact, (logits, found) = (run_all(model, pixels(64)[32:])[-2:] for model in (graph, quantized))
    assert found.dtype == dtype
    assert np.array_equal(logits.argmax(1), found)
    counts = np.bincount(exact[1].ravel())
    assert counts.max() < 0.6 * counts.sum()  # guessing the most frequent class would not do
    assert (found == exact[1]).mean() > 0.93


@needs_tensorrt
@pytest.mark.parametrize("classes", [21, 300])
def test_tensorrt_builds_int8_with_a_map_of_classes(classes: int) -> None:
    graph = small(classes)
    quantized = quantize(graph, calibrate(graph, [pixels(32)], "minmax"), "gpu")
    assert plan(quantized.SerializeToString(), (1, 2, 4))


def test_a_classifier_is_no_segmenter() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(BadInput, match="logits of 2 dimensions: a segmentation has 4"):
        onnx_from_torch(flat, PREPROCESS, uint8_input=False, task="segmentation")


@needs_tensorrt
@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_tensorrt_builds_it(name: str, side: int) -> None:
    assert plan(network(name, side)[2].SerializeToString(), (1, 2, 5))


@pytest.mark.parametrize(
    "name",
    [
        *NAMES, "dilated_vgg16", "dilated_vgg16_context", "fcn8s_vgg16", "pspnet_resnet50", "hdc_resnet101",
        "lraspp_mobilenet_v3_large",
    ],
)  # fmt: skip
def test_the_classes_are_those_of_pascal_voc(name: str) -> None:
    arch = get(name)
    assert arch.task == "segmentation"
    assert arch.labels()[0] == "__background__"
    assert len(arch.labels()) == arch.num_classes == 21


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet101"])
def test_torchvision_weights_fit_without_the_auxiliary_head(name: str) -> None:
    """The published state dict has the names of torchvision's own network with its auxiliary head."""
    arch = get(name)
    with torch.device("meta"):
        published = get_model(name, weights=None, weights_backbone=None, aux_loss=True).state_dict()
        own = arch.build(21).state_dict()
    kept = {key: value.shape for key, value in published.items() if not key.startswith(arch.training_only)}
    assert kept == {key: value.shape for key, value in own.items()}
    assert len(kept) < len(published)
    assert arch.preprocess.resize == get_model_weights(name).DEFAULT.transforms().resize_size[0] == 520


@torch.no_grad()
def test_lraspp_equals_torchvision() -> None:
    model, inputs = settled_network("lraspp_mobilenet_v3_large", 64)
    theirs = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.from_numpy(inputs[:2])
    torch.testing.assert_close(model(x), theirs(x)["out"])


@torch.no_grad()
def test_fcn_equals_torchvision() -> None:
    model, inputs = settled_network("fcn_resnet50", 48)
    theirs = get_model("fcn_resnet50", weights=None, weights_backbone=None, num_classes=21, aux_loss=False).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.from_numpy(inputs[:2])
    torch.testing.assert_close(model(x), theirs(x)["out"])


@torch.no_grad()
def test_a_fresh_context_module_passes_its_input_on() -> None:
    """Equation 4; the truncation after each layer leaves what is not negative."""
    maps = torch.rand(2, 5, 40, 40)
    torch.testing.assert_close(context_module(5)(maps), maps)


def test_the_context_module_sees_67_by_67() -> None:
    """Table 1, last row, by where a gradient arrives."""
    module = context_module(2)
    for layer in module:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.01)
    maps = torch.rand(1, 2, 91, 91, requires_grad=True)
    module(maps)[0, 0, 45, 45].backward()
    assert maps.grad is not None
    rows = maps.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (45 - 33, 45 + 33)


def test_the_front_end_is_vgg16_with_dilations_for_strides() -> None:
    """Section 4: cut pools, dilation 2 in block 5 and 4 in fc6; without padding an image loses 186 a side."""
    with torch.device("meta"):
        layers = dict(front_end(21).named_children())
        assert front_end(21)(torch.empty(1, 3, 512 + 2 * MARGIN, 264 + 2 * MARGIN)).shape == (1, 21, 64, 33)
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    assert len(convolutions) == 16
    assert {name: layer.dilation[0] for name, layer in convolutions.items() if layer.dilation != (1, 1)} == {
        "conv5_1": 2, "conv5_2": 2, "conv5_3": 2, "fc6": 4,
    }  # fmt: skip
    assert [name for name in layers if name.startswith("pool")] == ["pool1", "pool2", "pool3"]


@torch.no_grad()
def test_dilation_computes_vgg16_at_every_eighth_pixel() -> None:
    """Section 4: the front end with VGG-16's weights gives VGG-16's own output, only at more places.

    The strided network, where the 4 pools of blocks 4 and 5 keep every second pixel without a maximum.
    """
    torch.manual_seed(0)
    layers = dict(front_end(3).eval().named_children())
    x = torch.randn(1, 3, 2 * MARGIN + 32, 2 * MARGIN + 32)
    dense = x
    for layer in layers.values():
        dense = layer(dense)
    strided = x
    for name, layer in layers.items():
        strided = undilated(layer, strided)
        if name in ("relu4_3", "relu5_3"):
            strided = strided[:, :, ::2, ::2]
    torch.testing.assert_close(dense[:, :, ::4, ::4], strided, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))


def undilated(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias)
    result: Tensor = layer(x)
    return result


def test_unet_has_the_sizes_of_figure_1() -> None:
    """A tile of 572x572 has 28x28 at the bottom and leaves as 388x388; both paths together have 23 convolutions."""
    with torch.device("meta"):
        model: Any = get("unet").build(2)
        sizes: list[tuple[int, ...]] = []
        for level in (*model.contracting, *model.expanding):
            level.register_forward_hook(lambda _, given, made: sizes.append((given[0].shape[-1], made.shape[-1])))
        assert model(torch.empty(1, 1, 388, 388)).shape == (1, 2, 388, 388)
    assert sizes == [
        (572, 568), (284, 280), (140, 136), (68, 64), (32, 28),
        (56, 52), (104, 100), (200, 196), (392, 388),
    ]  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23


@pytest.mark.parametrize("name", ["unet", "fcn8s_vgg16"])
@pytest.mark.parametrize("side", [108, 131])
def test_logits_lie_over_their_pixels(name: str, side: int) -> None:
    """At any size, and where a tile's margins are cropped away: the field of the first output is about the first pixel.

    The gradient of the output in the middle of the image is centred there.
    """
    torch.manual_seed(0)
    small: nn.Module
    if name == "unet":
        small = UNet(2, channels=3, widths=(1, 1, 1, 1, 1))
    else:
        small = FCN8s(2, stages=((1,), (1,), (1,), (1,), (1,)), hidden=1)
    for parameter in small.parameters():
        nn.init.constant_(parameter, 0.1)
    image = torch.rand(1, 3, side, side + 5, requires_grad=True)
    output = small.double().eval()(image.double())
    assert output.shape == (1, 2, side, side + 5)
    middle = side // 2
    output[0, 0, middle, middle].backward()
    assert image.grad is not None
    weight = image.grad.abs().sum((0, 1)).double()
    for axis in (0, 1):
        along = weight.sum(1 - axis)
        centre = float((along * torch.arange(len(along))).sum() / along.sum())
        assert abs(centre - middle) < 8, axis


@torch.no_grad()
def test_fcn8s_begins_as_an_interpolation() -> None:
    """Section 4.2: scores that are the same everywhere stay so, away from the borders."""
    model: Any = FCN8s(3, stages=((1,), (1,), (1,), (1,), (1,)), hidden=1)
    for layer, side in ((model.upscore2, 4), (model.upscore8, 16)):
        made = layer(torch.ones(1, 3, 5, 5))
        torch.testing.assert_close(
            made[:, :, side:-side, side:-side], torch.ones_like(made[:, :, side:-side, side:-side])
        )


def test_pspnet_pools_to_the_bins_of_section_3_2() -> None:
    pyramid: Any = PyramidPooling(8, 5).eval()
    sizes: list[int] = []
    for branch in pyramid.branches:
        branch[0].register_forward_hook(lambda _, __, made: sizes.append(made.shape[-1]))
    assert pyramid(torch.rand(2, 8, 12, 12)).shape == (2, 5, 12, 12)
    assert sizes == [1, 2, 3, 6]
    assert pyramid.classifier[0].in_channels == 16


def test_dense_upsampling_is_a_score_for_each_cell() -> None:
    """Section 3.1: channels of a position are the pixels that it stands for."""
    head = DenseUpsampling(3, 2)
    assert {branch.out_channels for branch in head.branches} == {2 * 16}  # type: ignore[union-attr]
    assert head(torch.rand(1, 3, 5, 5)).shape == (1, 2, 20, 20)


def test_a_size_that_unet_cannot_take_is_refused() -> None:
    with torch.device("meta"), pytest.raises(BadInput, match="107x200: this network needs 108x108 or more"):
        UNet(2)(torch.empty(1, 1, 107, 200))


@pytest.mark.parametrize("size", [(184, 192), (196, 200), (128, 128)])
def test_a_size_that_dilated_vgg16_cannot_take_is_refused(size: tuple[int, int]) -> None:
    with torch.device("meta"), pytest.raises(BadInput, match="multiples of 8, at least 192"):
        DilatedVGG16(21, context=True)(torch.empty(1, 3, *size))
