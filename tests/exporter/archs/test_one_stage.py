"""SSD, RetinaNet and FCOS against torchvision's own, with random weights that find boxes.

The smallest by default, of few pixels; the others with `-m slow`.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.image_list import ImageList

from convoynet.exporter.archs import get
from convoynet.exporter.archs.boxes import best_pairs, earlier
from convoynet.exporter.archs.one_stage import OneStage, build, settle
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import OUTPUTS, onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.detection_nets import Found, finds, found_in, images, matched, preprocess_of
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import operators, session_of

CLASSES, CANDIDATES = 7, 500
DETECTIONS = 60
DATA_DEPENDENT = {"NonZero", "If", "Loop", "Scan", "NonMaxSuppression", "Unique", "Compress"}
# Pixels of a side, and the layers of one level that stay float under INT8.
SIDES = {
    "ssdlite320_mobilenet_v3_large": 128,
    "ssd300_vgg16": 300,
    "retinanet_resnet50_fpn": 128,
    "retinanet_resnet50_fpn_v2": 128,
    "fcos_resnet50_fpn": 128,
}
HEADS = {
    "ssdlite320_mobilenet_v3_large": ("classification_head.module_list.0.1", "regression_head.module_list.0.1"),
    "ssd300_vgg16": ("classification_head.module_list.0", "regression_head.module_list.0"),
    "retinanet_resnet50_fpn": ("classification_head.cls_logits", "regression_head.bbox_reg"),
    "retinanet_resnet50_fpn_v2": ("classification_head.cls_logits", "regression_head.bbox_reg"),
    "fcos_resnet50_fpn": ("classification_head.cls_logits", "regression_head.bbox_ctrness"),
}
SMALLEST = "ssdlite320_mobilenet_v3_large"


@dataclass(frozen=True)
class Detector:
    """One network, what torchvision finds with it, and its graph."""

    name: str
    model: OneStage
    preprocess: Preprocess
    inputs: NDArray[np.float32]
    wanted: list[Found]
    graph: onnx.ModelProto


def options(**others: float) -> dict[str, float]:
    return {"detections_per_img": DETECTIONS, "topk_candidates": 100, **others}


def theirs(name: str, **others: float) -> nn.Module:
    network: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **options(**others))
    return network


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == SMALLEST else pytest.mark.slow) for name in SIDES]
)
def detector(request: pytest.FixtureRequest) -> Detector:
    name = request.param
    preprocess, inputs = preprocess_of(SIDES[name]), images(6, SIDES[name])
    torch.manual_seed(0)
    model = build(name, CLASSES, CANDIDATES, **options())
    estimate_statistics(model, inputs)
    with torch.no_grad():
        settle(model, torch.from_numpy(inputs))
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # the same graph in three quarters of the time; test_zoo traces MobileNetV3 in place
    graph = onnx_from_torch(model, preprocess, uint8_input=False, task="detection")
    return Detector(name, model, preprocess, inputs, finds(theirs(name), model, inputs), graph)


def run_graph(graph: onnx.ModelProto, batch: NDArray[np.float32]) -> list[Found]:
    session = session_of(graph)
    return found_in(list(session.run(list(OUTPUTS["detection"]), {"input": batch})))


def test_onnx_finds_what_torchvision_finds_at_any_batch_size(detector: Detector) -> None:
    for batch in (1, 5):
        found = run_graph(detector.graph, detector.inputs[:batch])
        assert matched(detector.wanted[:batch], found) >= 0.99
        assert matched(found, detector.wanted[:batch]) >= 0.99


def test_the_comparison_can_tell_detections_apart(detector: Detector) -> None:
    wanted = detector.wanted
    assert all(len(image.scores) >= 20 for image in wanted)
    assert all(len(image.labels.unique()) >= 3 for image in wanted)
    assert torch.cat([-image.scores.diff() for image in wanted]).median() > 1e-4
    assert matched(wanted[1:], wanted[:-1]) < 0.1


def test_the_graph_is_static_but_for_the_batch(detector: Detector) -> None:
    onnx.checker.check_model(detector.graph, full_check=True)
    assert not operators(detector.graph).keys() & DATA_DEPENDENT
    shapes = [
        [dim.dim_param or dim.dim_value for dim in out.type.tensor_type.shape.dim]
        for out in detector.graph.graph.output
    ]
    assert shapes == [["batch", DETECTIONS, 4], ["batch", DETECTIONS], ["batch", DETECTIONS], ["batch", 1]]


@torch.no_grad()
def test_fewer_detections_than_there_is_room_for_are_padded(detector: Detector) -> None:
    """The threshold lies in the widest gap of the scores, so that no rounding carries anything across."""
    first = detector.wanted[0].scores
    scores = torch.cat([image.scores for image in detector.wanted]).sort().values
    scores = scores[(scores >= first[-1]) & (scores <= first[0])]
    widest = int(scores.diff().argmax())
    threshold = float(scores[widest : widest + 2].mean())
    strict = build(detector.name, CLASSES, CANDIDATES, **options(score_thresh=threshold)).eval()
    outputs = [output.numpy() for output in loaded(strict, detector)(torch.from_numpy(detector.inputs))]
    expected = finds(theirs(detector.name, score_thresh=threshold), strict, detector.inputs)
    assert matched(expected, found_in(outputs)) >= 0.99
    assert matched(found_in(outputs), expected) >= 0.99
    assert 0 < outputs[3][0] < DETECTIONS
    for image, used in enumerate(outputs[3].ravel()):
        assert not any(output[image, used:].any() for output in outputs[:3])


def loaded(model: OneStage, detector: Detector) -> OneStage:
    model.load_state_dict(detector.model.state_dict())
    return model


def test_heads_stay_float_and_int8_finds_much_of_it(detector: Detector) -> None:
    """Random weights amplify noise: of SSDLite 0.44 and 0.30 match, 0.06 of another image's; of SSD300 0.9 and 0.4."""
    ranges = calibrate(detector.graph, [images(16, SIDES[detector.name])], "minmax")
    wanted = run_graph(detector.graph, detector.inputs)
    others = matched(wanted[1:], wanted[:-1], overlap=0.5, tolerance=1.0)
    for target in ("cpu", "gpu"):
        quantized = quantize(detector.graph, ranges, target)
        stored = {tensor.name for tensor in quantized.graph.initializer}
        assert {f"head.{layer}.weight" for layer in HEADS[detector.name]} <= stored  # float, under their own names
        assert sum(name.endswith(".integers") for name in stored) > 20
        found = run_graph(quantized, detector.inputs)
        assert matched(wanted, found, overlap=0.5, tolerance=1.0) > others + 0.1
        assert matched(found, wanted, overlap=0.5, tolerance=1.0) > others + 0.1


@needs_tensorrt
def test_tensorrt_builds_it(detector: Detector) -> None:
    assert plan(detector.graph.SerializeToString(), (1, 2, 5))


def test_the_best_pairs_are_those_of_the_whole_table() -> None:
    scores = torch.rand(2, 40, 5, generator=torch.Generator().manual_seed(0))
    for count in (3, 30, 150, 500):
        best, rows, columns = best_pairs(scores, count)
        wanted = scores.flatten(1).topk(min(count, 200), 1)
        assert torch.equal(best, wanted.values)
        assert torch.equal(rows * 5 + columns, wanted.indices)


def test_earlier_counts_those_of_the_same_label() -> None:
    labels = torch.tensor([[1, 2, 1, 1, 2], [3, 3, 3, 3, 3]])
    assert earlier(labels).tolist() == [[0, 0, 1, 2, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("height", "width"), [(128, 160), (320, 256)])
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "fcos_resnet50_fpn"])
def test_anchors_are_torchvisions(name: str, height: int, width: int) -> None:
    with torch.device("meta"):
        network = theirs(name)
        model = build(name, CLASSES)
    features = [torch.zeros(1, 1, height // stride, width // stride) for stride in (8, 16, 32, 64, 64, 128)]
    features = features[: 6 if name.startswith("ssd") else 5]
    expected = network.anchor_generator(ImageList(torch.empty(1, 3, height, width), [(height, width)]), features)[0]
    found = torch.cat([model._anchors(level, (height, width), each) for level, each in enumerate(features)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_weights_of_frozen_normalisation_have_no_epsilon() -> None:
    """torchvision sets it to 0 for its published weights of this network, which have no counters."""
    with torch.device("meta"):
        model = build("retinanet_resnet50_fpn", 2)
    tensors = model.state_dict()
    model.load_state_dict(tensors)
    assert epsilons(model) == {1e-5}
    frozen = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    model.load_state_dict(frozen, assign=True)  # the counters it adds have values
    assert epsilons(model) == {0.0}


def epsilons(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ssd300_vgg16", (300, 267), "an input of 300x267: SSD300 needs 268 pixels a side or more"),
        ("fcos_resnet50_fpn", (100, 128), "an input of 100x128: a pyramid needs multiples of 32"),
    ],
)
def test_what_it_cannot_do_is_refused(name: str, size: tuple[int, int], message: str) -> None:
    with torch.device("meta"):
        model = build(name, 2)
        with pytest.raises(BadInput, match=message):
            model(torch.empty(1, 3, *size))
    with pytest.raises(BadInput, match="1 class: a detector needs 2 or more"):
        build(name, 1)


def test_ssd300_takes_its_smallest_input() -> None:
    with torch.device("meta"):
        assert build("ssd300_vgg16", 2)(torch.empty(1, 3, 268, 268)).scores.shape == (1, 200)


def test_they_describe_themselves() -> None:
    for name in SIDES:
        arch = get(name)
        assert arch.task == "detection"
        assert arch.labels()[:2] == ["__background__", "person"]
        assert arch.published is not None
