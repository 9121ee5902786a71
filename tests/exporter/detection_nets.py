"""Detectors with real detections although their weights are random, and what torchvision finds with them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou

from convoynet.exporter.archs.detection import PREPROCESS, Limits, StaticFasterRCNN, build_faster_rcnn, settle
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import Preprocess, load_images, made_images

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagenet_photos"


@dataclass(frozen=True)
class Found:
    """Detections of one image, without padding."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def preprocess_of(side: int) -> Preprocess:
    return Preprocess(size=(side, side), resize=side, mean=PREPROCESS.mean, std=PREPROCESS.std)


def images(count: int, side: int) -> NDArray[np.float32]:
    """Photos where there are any, and otherwise images made here."""
    preprocess = preprocess_of(side)
    if not PHOTOS.is_dir():
        return preprocess.normalize(made_images(count, preprocess.size, 3, 0))
    paths = list_images(PHOTOS)
    return preprocess.normalize(load_images(paths[:: len(paths) // count][:count], preprocess))


def narrow(classes: int, limits: Limits) -> StaticFasterRCNN:
    """With a residual block for each stage of the trunk, and an eighth of the pyramid's channels."""
    widths = [64, 128, 256, 512]
    stages = {f"layer{index + 1}": str(index) for index in range(len(widths))}
    trunk = ResNet(BasicBlock, [1] * len(widths))
    network = FasterRCNN(BackboneWithFPN(trunk, stages, widths, 32), classes, **limits.options)
    return StaticFasterRCNN(network, limits)


def detector(trunk: str | None, classes: int, limits: Limits, inputs: NDArray[np.float32]) -> StaticFasterRCNN:
    """Random weights, scaled so that scores spread and boxes move: equal scores would prove nothing.

    Without the name of a trunk it is a narrow one.
    """
    torch.manual_seed(0)
    model = narrow(classes, limits) if trunk is None else build_faster_rcnn(trunk, classes, limits)
    estimate_statistics(model, inputs)
    with torch.no_grad():
        settle(model, torch.from_numpy(inputs))
    return model


def torchvision_finds(model: StaticFasterRCNN, inputs: NDArray[np.float32]) -> list[Found]:
    """What torchvision's own network finds with the same weights."""
    classes = model.roi_heads.box_predictor.cls_score.out_features
    return finds(FasterRCNN(model.backbone, classes, **model.limits.options), model, inputs)


@torch.no_grad()
def finds(theirs: nn.Module, model: nn.Module, inputs: NDArray[np.float32]) -> list[Found]:
    """What torchvision's network finds with the weights of `model`; its transform has nothing left to do."""
    theirs.load_state_dict(model.state_dict())
    side = inputs.shape[-1]
    theirs.transform = GeneralizedRCNNTransform(side, side, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], size_divisible=1)
    found = theirs.eval()(list(torch.from_numpy(inputs)))
    return [Found(image["boxes"], image["scores"], image["labels"]) for image in found]


def found_in(outputs: list[NDArray[np.generic]]) -> list[Found]:
    """What a graph's boxes, scores, labels and count say."""
    boxes, scores, labels, counts = (torch.from_numpy(np.asarray(output)) for output in outputs)
    return [Found(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts.flatten().tolist())]


def matched(wanted: list[Found], offered: list[Found], overlap: float = 0.9, tolerance: float = 1e-3) -> float:
    """The share of `wanted` with a partner of the same label, with this IoU and score or closer; none serves twice."""
    hits = 0
    for want, offer in zip(wanted, offered, strict=True):
        free = torch.ones(len(offer.scores), dtype=torch.bool)
        shared = _overlap(want.boxes, offer.boxes)
        for index in range(len(want.scores)):
            close = (offer.scores - want.scores[index]).abs() <= tolerance
            fits = free & close & (offer.labels == want.labels[index]) & (shared[index] >= overlap)
            if fits.any():
                free[(shared[index] * fits).argmax()] = False
                hits += 1
    return hits / sum(len(want.scores) for want in wanted)


def _overlap(wanted: Tensor, offered: Tensor) -> Tensor:
    """IoU of each pair; boxes that a border cuts to less than a pixel are the same where their corners are."""
    near = (wanted[:, None] - offered[None]).abs().amax(-1) <= 0.1
    tiny = [(boxes[:, 2:] - boxes[:, :2]).prod(1) < 1 for boxes in (wanted, offered)]
    return torch.where(near & tiny[0][:, None] & tiny[1][None], 1.0, box_iou(wanted, offered).nan_to_num(0.0))
