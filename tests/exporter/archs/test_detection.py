import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import get_model
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, batched_nms, nms

from convoynet.exporter.archs import get
from convoynet.exporter.archs.boxes import grid_anchors
from convoynet.exporter.archs.detection import Limits, StaticFasterRCNN, build_faster_rcnn, settle
from convoynet.exporter.archs.nms import ROUNDS, suppress
from convoynet.exporter.archs.roi_align import pyramid_roi_align
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import OUTPUTS, onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.tensorrt.library import find
from tests.exporter.detection_nets import (
    PHOTOS,
    Found,
    detector,
    finds,
    found_in,
    images,
    matched,
    narrow,
    preprocess_of,
    torchvision_finds,
)
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import operators, session_of

SIDE = 192
CLASSES = 11
LIMITS = Limits(level_proposals=200, proposals=100, detections=60, candidates=600)
DATA_DEPENDENT = {"NonZero", "If", "Loop", "Scan", "NonMaxSuppression", "Unique", "Compress", "RoiAlign"}


@pytest.fixture(scope="module")
def inputs() -> NDArray[np.float32]:
    return images(6, SIDE)


@pytest.fixture(scope="module")
def model(inputs: NDArray[np.float32]) -> StaticFasterRCNN:
    return detector(None, CLASSES, LIMITS, inputs)


@pytest.fixture(scope="module")
def graph(model: StaticFasterRCNN) -> onnx.ModelProto:
    return onnx_from_torch(model, preprocess_of(SIDE), uint8_input=False, task="detection")


@pytest.fixture(scope="module")
def wanted(model: StaticFasterRCNN, inputs: NDArray[np.float32]) -> list[Found]:
    return torchvision_finds(model, inputs)


def run_graph(graph: onnx.ModelProto, batch: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    session = session_of(graph)
    return list(session.run(list(OUTPUTS["detection"]), {"input": batch}))


def random_boxes(count: int, side: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side * 0.8
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * side * 0.2], 1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_finds_what_torchvision_finds(
    graph: onnx.ModelProto, inputs: NDArray[np.float32], wanted: list[Found], batch: int
) -> None:
    found = found_in(run_graph(graph, inputs[:batch]))
    assert matched(wanted[:batch], found) >= 0.99
    assert matched(found, wanted[:batch]) >= 0.99


def test_the_comparison_can_tell_detections_apart(wanted: list[Found], inputs: NDArray[np.float32]) -> None:
    """Many labels, scores that differ by more than the tolerance on the whole, and no match with another image."""
    assert all(len(image.scores) >= 20 for image in wanted)
    assert all(len(image.labels.unique()) >= 5 for image in wanted)
    gaps = torch.cat([-image.scores.diff() for image in wanted])
    assert gaps.median() > 1e-3
    assert matched(wanted, wanted) == 1.0
    assert matched(wanted[1:], wanted[:-1]) < 0.05


@torch.no_grad()
def test_another_score_threshold_and_limit_agree_too(
    model: StaticFasterRCNN, inputs: NDArray[np.float32], wanted: list[Found]
) -> None:
    """Fewer detections than there is room for, and candidates that the threshold leaves to padding."""
    limits = Limits(level_proposals=200, proposals=100, detections=60, candidates=600, min_score=clear_score(wanted))
    strict = narrow(CLASSES, limits).eval()
    strict.load_state_dict(model.state_dict())
    expected = torchvision_finds(strict, inputs)
    outputs = [output.numpy() for output in strict(torch.from_numpy(inputs))]
    assert matched(expected, found_in(outputs)) >= 0.99
    assert matched(found_in(outputs), expected) >= 0.99
    for image, used in enumerate(outputs[3].ravel()):
        assert 0 < used < 60
        assert (outputs[1][image, :used] > limits.min_score).all()
        assert not any(output[image, used:].any() for output in outputs[:3])


def clear_score(found: list[Found]) -> float:
    """A score that no rounding carries anything across, above which each image has detections, and room for more."""
    low = max(float(image.scores[-1]) for image in found)
    high = min(float(image.scores[0]) for image in found)
    scores = torch.cat([image.scores for image in found]).sort().values
    scores = scores[(scores >= low) & (scores <= high)]
    widest = int(scores.diff().argmax())
    assert scores[widest + 1] - scores[widest] > 1e-3
    return float(scores[widest : widest + 2].mean())


@torch.no_grad()
def test_an_image_without_detections_gives_padding_alone(inputs: NDArray[np.float32]) -> None:
    torch.manual_seed(0)
    empty = narrow(3, Limits(20, 10, 5, min_score=0.999, candidates=20)).eval()
    boxes, scores, labels, counts = empty(torch.from_numpy(inputs[:2, :, :64, :96]))
    assert counts.tolist() == [[0], [0]]
    assert not boxes.any()
    assert not scores.any()
    assert not labels.any()


def test_the_graph_is_static_but_for_the_batch(graph: onnx.ModelProto) -> None:
    onnx.checker.check_model(graph, full_check=True)
    assert not operators(graph).keys() & DATA_DEPENDENT
    described = [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in graph.graph.output
    ]
    assert described == [
        ("boxes", ["batch", 60, 4]), ("scores", ["batch", 60]), ("labels", ["batch", 60]), ("count", ["batch", 1]),
    ]  # fmt: skip
    assert [value.type.tensor_type.elem_type for value in graph.graph.output] == [
        onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT64,
    ]  # fmt: skip


@needs_tensorrt
def test_tensorrt_builds_it(graph: onnx.ModelProto) -> None:
    assert plan(graph.SerializeToString(), (1, 2, 5))


@pytest.fixture(scope="module")
def ranges(graph: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(graph, [images(16, SIDE)], "minmax")


def test_heads_and_boxes_stay_float(graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    """INT8: the trunk, the pyramid, the RPN's shared convolution and the two layers before the last."""
    for target in ("cpu", "gpu"):
        quantized = Graph(quantize(graph, ranges, target))
        stored = {tensor.name for tensor in quantized.model.graph.initializer}
        for layer in ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score"):
            assert f"{layer}.weight" in stored  # float, under its own name
        assert "backbone.body.layer1.0.conv1.weight" not in stored
        read = [node for node in quantized if any(quantized.producer_type(n) == "DequantizeLinear" for n in node.input)]
        layers = {"Conv", "Gemm", "QuantizeLinear", "Add", "Relu", "Resize", "MaxPool"}
        features = {"Concat", "Pad", "Shape"}  # of float values that an integer layer reads as well
        assert {node.op_type for node in read} <= layers | features
        (sampler,) = [node for node in quantized if node.op_type == "GridSample"]
        assert all(quantized.producer_type(name) != "DequantizeLinear" for name in sampler.input)
        assert sum(node.op_type == "DequantizeLinear" for node in quantized) > 35


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_int8_finds_most_of_what_float_finds(
    graph: onnx.ModelProto, ranges: dict[str, Range], inputs: NDArray[np.float32], target: str
) -> None:
    """Measured 0.58 to 0.63 on photos. Random weights amplify noise; another image's detections match to 0.01."""
    wanted = found_in(run_graph(graph, inputs))
    found = found_in(run_graph(quantize(graph, ranges, target), inputs))
    assert matched(wanted, found, overlap=0.5, tolerance=1.0) > 0.45
    assert matched(found, wanted, overlap=0.5, tolerance=1.0) > 0.45
    assert matched(wanted[1:], wanted[:-1], overlap=0.5, tolerance=1.0) < 0.1


@needs_tensorrt
def test_tensorrt_builds_it_in_int8(graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    assert plan(quantize(graph, ranges, "gpu").SerializeToString(), (1, 2, 5))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_suppression_is_greedy(threshold: float) -> None:
    boxes = random_boxes(400, 100, 0)
    scores = torch.linspace(1, 0, 400)
    kept = suppress(boxes.expand(2, -1, -1), torch.ones(2, 400, dtype=torch.bool), threshold)
    assert torch.equal(kept[0], kept[1])
    assert kept[0].nonzero().flatten().tolist() == nms(boxes, scores, threshold).tolist()


def test_suppression_by_groups_and_of_the_living() -> None:
    boxes, scores = random_boxes(400, 60, 1), torch.linspace(1, 0, 400)
    generator = torch.Generator().manual_seed(2)
    groups = torch.randint(0, 3, (400,), generator=generator)
    alive = torch.rand(400, generator=generator) < 0.7
    kept = suppress(boxes[None], alive[None], 0.4, groups[None])[0].nonzero().flatten()
    living = alive.nonzero().flatten()
    expected = living[batched_nms(boxes[living], scores[living], groups[living], 0.4)]
    assert kept.tolist() == expected.tolist()
    assert len(kept) < len(living)


@pytest.mark.parametrize("links", [ROUNDS, ROUNDS + 1, 3 * ROUNDS])
def test_a_chain_that_is_too_long_keeps_more_and_loses_nothing(links: int) -> None:
    """Each box overlaps its neighbours alone: greedy suppression keeps every second one."""
    left = torch.arange(float(links))
    boxes = torch.stack([left, torch.zeros(links), left + 1.9, torch.ones(links)], 1)
    kept = suppress(boxes[None], torch.ones(1, links, dtype=torch.bool), 0.2)[0]
    greedy = torch.zeros(links, dtype=torch.bool)
    greedy[nms(boxes, torch.linspace(1, 0, links), 0.2)] = True
    assert kept[greedy].all()
    assert torch.equal(kept[: ROUNDS + 1], greedy[: ROUNDS + 1])


def test_pooling_equals_torchvisions() -> None:
    """Boxes of every level, at the borders, without area and larger than the image's level would take."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 256 // stride, 320 // stride) for stride in (4, 8, 16, 32)]
    special = torch.tensor(
        [[0, 0, 320, 256], [318, 254, 320, 256], [319, 0, 320, 256], [0, 0, 0, 0], [7, 9, 7.001, 250], [0, 0, 112, 112]]
    )
    boxes = torch.stack(
        [torch.cat([special, random_boxes(60, 256, seed) * scale]) for seed, scale in ((0, 1), (1, 0.2))]
    )
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pool({str(i): level for i, level in enumerate(levels)}, list(boxes), [(256, 320)] * 2)
    torch.testing.assert_close(pyramid_roi_align(levels, boxes, 7, 4), expected, rtol=1e-3, atol=1e-3)


def test_anchors_are_torchvisions() -> None:
    model = build_faster_rcnn("resnet18", 3)
    features = [torch.empty(1, 1, rows, rows + 4) for rows in (56, 28, 14, 7, 4)]  # uneven strides at the end
    expected = model.rpn.anchor_generator(ImageList(torch.empty(1, 3, 224, 240), [(224, 240)]), features)[0]
    anchors = torch.cat(
        [grid_anchors(model._cell_anchors[level], (224, 240), feature) for level, feature in enumerate(features)]
    )
    assert torch.equal(anchors, expected)


def test_names_of_tensors_are_torchvisions() -> None:
    arch = get("fasterrcnn_resnet101_fpn")
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        assert build_faster_rcnn("resnet50", 91).state_dict().keys() == theirs.state_dict().keys()
    assert arch.task == "detection"
    assert arch.labels()[:2] == ["__background__", "person"]
    assert len(arch.labels()) == arch.num_classes == 91


TRUNKS = "mobilenet_v3_large_320_fpn", "mobilenet_v3_large_fpn", "resnet50_fpn", "resnet50_fpn_v2"
PUBLISHED = tuple(f"fasterrcnn_{trunk}" for trunk in TRUNKS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_find_what_torchvisions_do(name: str) -> None:
    """With all of torchvision's own numbers of boxes and thresholds; of images made here one box may be on an edge.

    Of the graph, not of the module: proposals in a corner that are smaller than a cell of MobileNet's map have the very
    same scores, and which of them suppresses the others is a matter of their order. TopK of ONNX keeps it, as
    torchvision's sort does, and PyTorch's topk does not.
    """
    least = 0.99 if PHOTOS.is_dir() else 0.97
    batch = images(4, 128)
    arch = get(name)
    torch.manual_seed(0)
    built = arch.build(CLASSES)
    estimate_statistics(built, batch)
    with torch.no_grad():
        settle(built, torch.from_numpy(batch))
    expected = finds(get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES), built, batch)
    found = found_in(run_graph(onnx_from_torch(built, preprocess_of(128), uint8_input=False, task="detection"), batch))
    assert all(len(image.scores) >= 20 and len(image.labels.unique()) >= 3 for image in expected)
    assert matched(expected, found) >= least
    assert matched(found, expected) >= least
    assert arch.labels()[:2] == ["__background__", "person"]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(BadInput, match="1 class: a detector needs 2 or more"):
        build_faster_rcnn("resnet18", 1)
    with torch.device("meta"), pytest.raises(BadInput, match=r"an input of 100x128: .* multiples of 32"):
        build_faster_rcnn("resnet18", 2)(torch.empty(1, 3, 100, 128))


@pytest.mark.slow
def test_resnet101_finds_what_torchvision_finds() -> None:
    inputs = images(8, 320)
    model = detector("resnet101", 91, Limits(proposals=300), inputs)
    graph = onnx_from_torch(model, preprocess_of(320), uint8_input=False, task="detection")
    expected = torchvision_finds(model, inputs)
    assert all(len(image.scores) >= 20 for image in expected)
    for batch in (1, 2, 5):
        found = found_in(run_graph(graph, inputs[:batch]))
        assert matched(expected[:batch], found) >= 0.99
        assert matched(found, expected[:batch]) >= 0.99
    if find() is not None:
        assert plan(graph.SerializeToString(), (1, 2, 5))
