"""He et al. 2015, appendix A: conv4 shared by proposals and classification, conv5 on what is pooled of each."""

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models.detection import FasterRCNN

from convoynet.exporter.archs.detection import Limits, StaticFasterRCNN, settle
from convoynet.exporter.archs.faster_rcnn_c4 import build_c4, parts
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import OUTPUTS, onnx_from_torch
from tests.exporter.detection_nets import finds, found_in, images, matched, preprocess_of
from tests.exporter.onnx_runs import session_of

CLASSES, SIDE = 11, 96
LIMITS = Limits(level_proposals=100, proposals=24, detections=24, candidates=240)


def test_conv4_is_shared_and_conv5_sees_14_by_14_places_of_each_proposal() -> None:
    with torch.device("meta"):
        model = build_c4("resnet101", 91)
        seen = {}

        def keep(name: str, layer: torch.nn.Module) -> None:
            layer.register_forward_hook(lambda _, given, output: seen.update({name: (given[0], output)}))

        keep("proposals", model.rpn.head)
        keep("conv5", model.roi_heads.box_head[0])
        keep("average", model.roi_heads.box_head)
        keep("scores", model.roi_heads.box_predictor.cls_score)
        model(torch.empty(1, 3, 800, 800))
    assert [tuple(level.shape) for level in seen["proposals"][0]] == [(1, 1024, 50, 50)]
    assert [tuple(tensor.shape) for tensor in seen["conv5"]] == [(300, 1024, 14, 14), (300, 2048, 7, 7)]
    assert tuple(seen["average"][1].shape) == (300, 2048)
    assert tuple(seen["scores"][1].shape) == (300, 91)


def detecting(inputs: NDArray[np.float32]) -> StaticFasterRCNN:
    """One of ResNet-18 whose random weights find something in these images."""
    torch.manual_seed(0)
    model = build_c4("resnet18", CLASSES, LIMITS)
    estimate_statistics(model, inputs)
    settle(model, torch.from_numpy(inputs))
    return model


@torch.no_grad()
def test_it_finds_what_torchvisions_faster_rcnn_of_these_parts_finds() -> None:
    inputs = images(3, SIDE)
    model = detecting(inputs)
    wanted = finds(FasterRCNN(**parts("resnet18", CLASSES), **LIMITS.options), model, inputs)
    found = found_in([output.numpy() for output in model(torch.from_numpy(inputs))])
    assert all(len(image.scores) >= 10 and len(image.labels.unique()) >= 3 for image in wanted)
    assert matched(wanted, found) >= 0.99
    assert matched(found, wanted) >= 0.99
    assert matched(wanted[1:], wanted[:-1]) < 0.1


@pytest.mark.slow
@torch.no_grad()
def test_its_graph_finds_the_same() -> None:
    inputs = images(4, SIDE)
    model = detecting(inputs)
    graph = onnx_from_torch(model, preprocess_of(SIDE), uint8_input=False, task="detection")
    onnx.checker.check_model(graph, full_check=True)
    session = session_of(graph)
    wanted = found_in([output.numpy() for output in model.eval()(torch.from_numpy(inputs))])
    outputs = [np.asarray(output) for output in session.run(list(OUTPUTS["detection"]), {"input": inputs})]
    assert matched(wanted, found_in(outputs)) >= 0.99


def test_it_needs_a_background_and_something_else() -> None:
    with pytest.raises(BadInput, match="1 class: a detector needs 2 or more"):
        build_c4("resnet18", 1)
