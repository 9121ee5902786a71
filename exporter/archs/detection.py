"""Faster R-CNN: S. Ren et al. 2015, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks".

Trunk, pyramid, heads and the names of all tensors are torchvision's; what picks boxes out of them is written here
with shapes that never depend on the image, so that the network batches and that an ONNX graph of it has no loops,
no branches and no operator whose output has an unknown size. Fewer boxes than there is room for are padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from convoynet.exporter.archs.boxes import (
    Detections,
    best_pairs,
    clip,
    decode,
    detections,
    grid_anchors,
    large,
    pick,
    require_classes,
    require_strides,
)
from convoynet.exporter.archs.from_torchvision import damp_residuals, follow_frozen, state_dict
from convoynet.exporter.archs.nms import suppress
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.archs.roi_align import pyramid_roi_align
from convoynet.exporter.data.images import Preprocess

PAPER = "Ren et al. 2015, Faster R-CNN, arXiv:1506.01497, on a feature pyramid (Lin et al. 2017, arXiv:1612.03144)"
# As torchvision's batches of images of different sizes: the mean colour is the zero that they are padded with.
PREPROCESS = Preprocess(size=(800, 800), resize=800, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit="pad")

_MIN_PROPOSAL, _MIN_DETECTION = 1e-3, 1e-2  # pixels; torchvision's


@dataclass(frozen=True)
class Limits:
    """How many boxes each step lets through; all but the last are torchvision's defaults.

    Attributes:
        level_proposals: Of each pyramid level, before suppression.
        proposals: Of an image, after it.
        detections: Of an image, in the end.
        min_score: Detections need more than this.
        min_objectness: Proposals need this, as a probability.
        candidates: Pairs of a proposal and a class that the last suppression looks at, the highest scores first.
            The result is that of torchvision wherever no more than these are above `min_score` or at least
            `detections` of them stay.
    """

    level_proposals: int = 1000
    proposals: int = 1000
    detections: int = 100
    min_score: float = 0.05
    min_objectness: float = 0.0
    candidates: int = 1000

    @property
    def options(self) -> dict[str, float]:
        """As torchvision's builders call them."""
        return {
            "rpn_pre_nms_top_n_test": self.level_proposals,
            "rpn_post_nms_top_n_test": self.proposals,
            "rpn_score_thresh": self.min_objectness,
            "box_detections_per_img": self.detections,
            "box_score_thresh": self.min_score,
        }


class StaticFasterRCNN(nn.Module):
    """torchvision's network with a forward of fixed shapes, for inference alone.

    Args:
        network: With a feature pyramid, built with the options of the same limits.
        limits: See there.
    """

    def __init__(self, network: FasterRCNN, limits: Limits) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = network.backbone, network.rpn, network.roi_heads
        self.limits = limits
        self._cell_anchors = [anchors.tolist() for anchors in self.rpn.anchor_generator.cell_anchors]

    def forward(self, x: Tensor) -> Detections:
        """Detect in normalised images, float32 [N, 3, H, W], H and W multiples of 32."""
        height, width = x.shape[-2:]
        require_strides("Faster R-CNN", (height, width))
        features = self.backbone(x)
        proposals, alive = self.propose(list(features.values()), (height, width))
        logits, deltas = self.roi_heads.box_predictor(self.pool(features, proposals, height))
        shape = (x.shape[0], proposals.shape[1], -1)
        scores = torch.softmax(logits, -1).reshape(shape) * alive.unsqueeze(-1)
        return self._detect(proposals, scores, deltas.reshape(shape), (height, width))

    def propose(self, features: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Section 3.1: float32 [N, P, 4], and which of them are no padding, bool [N, P]."""
        anchors, codes, logits = [], [], []
        for level, (objectness, deltas) in enumerate(zip(*self.rpn.head(features), strict=True)):
            flat = objectness.permute(0, 2, 3, 1).flatten(1)  # N x anchors
            best, index = flat.topk(min(self.limits.level_proposals, flat.shape[1]), 1)
            logits.append(best)
            codes.append(pick(_anchor_codes(deltas), index))
            places = grid_anchors(self._cell_anchors[level], size, objectness)
            anchors.append(nn.functional.embedding(index, places))
        # N x levels x K x 4, so that one suppression serves all levels. The padding of a level with few anchors has no
        # size, and falls with the boxes that are too small.
        boxes = clip(decode(_stack(codes), _stack(anchors), self.rpn.box_coder.weights), size)
        scores = _stack([best.unsqueeze(-1) for best in logits]).squeeze(-1)
        alive = large(boxes, _MIN_PROPOSAL)
        if self.limits.min_objectness:
            alive = alive & (torch.sigmoid(scores) >= self.limits.min_objectness)
        kept = suppress(boxes, alive, self.rpn.nms_thresh)
        return _best(boxes.flatten(1, 2), scores.flatten(1), kept.flatten(1), self.limits.proposals)

    def pool(self, features: dict[str, Tensor], proposals: Tensor, height: int) -> Tensor:
        """What the last layers read of each proposal [N, P, 4] in images of this height: [N * P, channels]."""
        roi_pool = self.roi_heads.box_roi_pool
        levels = [features[name] for name in roi_pool.featmap_names if name in features]
        # torchvision finds a box's level by the scale: of two levels of one scale the second has no boxes.
        levels = [level for before, level in zip([None, *levels], levels, strict=False) if not _alike(before, level)]
        stride, bins = height // levels[0].shape[-2], roi_pool.output_size[0]
        pooled = pyramid_roi_align(levels, proposals, bins, stride, roi_pool.sampling_ratio)
        result: Tensor = self.roi_heads.box_head(pooled)
        return result

    def _detect(self, proposals: Tensor, scores: Tensor, deltas: Tensor, size: tuple[int, int]) -> Detections:
        """Turn the heads' scores [N, P, classes] and codes [N, P, classes * 4] into detections."""
        best, index, labels = best_pairs(scores[..., 1:], self.limits.candidates)  # without the background
        labels = labels + 1
        codes = deltas.reshape(*scores.shape, 4).flatten(1, 2)  # N x P*classes x 4
        codes = pick(codes, index * scores.shape[-1] + labels)
        boxes = clip(decode(codes, pick(proposals, index), self.roi_heads.box_coder.weights), size)
        alive = (best > self.limits.min_score) & large(boxes, _MIN_DETECTION)
        kept = suppress(boxes, alive, self.roi_heads.nms_thresh, labels)
        return detections(boxes, best, labels, kept, self.limits.detections)


def _alike(before: Tensor | None, level: Tensor) -> bool:
    return before is not None and before.shape[-2:] == level.shape[-2:]


def _anchor_codes(deltas: Tensor) -> Tensor:
    """[N, anchors of a place * 4, rows, columns] to [N, rows * columns * anchors, 4], the order of the anchors."""
    batch, channels, rows, columns = deltas.shape
    return deltas.reshape(batch, channels // 4, 4, rows, columns).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _stack(levels: list[Tensor]) -> Tensor:
    """[N, K, M] of each level, K being different, to [N, levels, largest K, M] with zeros at the end."""
    room = max(level.shape[1] for level in levels)
    short = [(level, room - level.shape[1]) for level in levels]
    return torch.stack([nn.functional.pad(level, (0, 0, 0, gap)) if gap else level for level, gap in short], 1)


def _best(boxes: Tensor, scores: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` kept boxes with the highest scores, and which are none but padding (zeros)."""
    lowest = torch.finfo(scores.dtype).min
    ranks, order = torch.where(kept, scores, lowest).topk(min(count, scores.shape[1]), 1)
    real = ranks > lowest
    return pick(boxes, order) * real.unsqueeze(-1), real


def build_faster_rcnn(trunk: str, num_classes: int, limits: Limits | None = None) -> StaticFasterRCNN:
    """A detector on torchvision's `trunk`, such as "resnet101", randomly initialised.

    Raises:
        BadInput: Fewer than two classes: the first is the background.
    """
    require_classes(num_classes)
    limits = limits or Limits()
    # Not torchvision's frozen normalisation: this one's statistics can be estimated, and it folds away.
    backbone = resnet_fpn_backbone(backbone_name=trunk, weights=None, norm_layer=nn.BatchNorm2d)
    damp_residuals(backbone)
    return StaticFasterRCNN(FasterRCNN(backbone, num_classes, **limits.options), limits)


def build_published(name: str, num_classes: int, limits: Limits) -> StaticFasterRCNN:
    """Build torchvision's detector `name`, randomly initialised.

    Raises:
        BadInput: Fewer than two classes: the first is the background.
    """
    require_classes(num_classes)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **limits.options)
    damp_residuals(network.backbone)
    if name == "fasterrcnn_resnet50_fpn":
        follow_frozen(network.backbone)
    return StaticFasterRCNN(network, limits)


def settle(model: nn.Module, x: Tensor) -> None:
    """Scale the heads of a randomly initialised detector so that scores spread and boxes move.

    As built, all scores are nearly equal and below the threshold: it would detect nothing, and agree with anything.

    Args:
        model: A StaticFasterRCNN.
        x: Normalised images, float32 [N, 3, H, W].
    """
    assert isinstance(model, StaticFasterRCNN)
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    features = model.backbone(x)
    levels = list(features.values())
    for layer, spread, outputs in zip((head.cls_logits, head.bbox_pred), (2.0, 0.3), head(levels), strict=True):
        layer.weight *= spread / torch.cat([output.flatten() for output in outputs]).std()
    proposals, _ = model.propose(levels, (x.shape[2], x.shape[3]))
    pooled = model.pool(features, proposals, x.shape[2])
    logits, codes = predictor(pooled)
    predictor.cls_score.weight *= 2.5 / (logits - logits.mean(0)).std()
    predictor.bbox_pred.weight *= 1.0 / codes.std()
    predictor.cls_score.bias -= predictor(pooled)[0].mean(0)  # or one class would win everywhere
    predictor.cls_score.bias[0] += 2.0  # most proposals are background


@register("fasterrcnn_resnet101_fpn")
def fasterrcnn_resnet101_fpn() -> Arch:
    """ResNet-101 with a pyramid, for the 91 labels of COCO; nobody has published weights under torchvision's names."""
    arch = _published("fasterrcnn_resnet50_fpn")
    build = partial(build_faster_rcnn, "resnet101")
    return replace(arch, name="fasterrcnn_resnet101_fpn", build=build, published=None, published_name="")


# Those on MobileNetV3 propose less, as torchvision builds them.
_MOBILE = Limits(min_objectness=0.05)
_LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "fasterrcnn_resnet50_fpn": Limits(),
        "fasterrcnn_resnet50_fpn_v2": Limits(),
        "fasterrcnn_mobilenet_v3_large_fpn": _MOBILE,
        "fasterrcnn_mobilenet_v3_large_320_fpn": replace(_MOBILE, level_proposals=150, proposals=150),
    }
)


def _published(name: str) -> Arch:
    weights = get_model_weights(name).DEFAULT
    labels = weights.meta["categories"]
    side = 320 if "_320_" in name else 800
    return Arch(
        name=name,
        paper=PAPER,
        source="torchvision",
        num_classes=len(labels),
        preprocess=replace(PREPROCESS, size=(side, side), resize=side),
        preprocess_source=f"from torchvision's {weights}",
        build=partial(build_published, name, limits=_LIMITS[name]),
        labels=partial(list, labels),
        published=partial(state_dict, weights),
        published_name=f"torchvision {weights}",
        task="detection",
        settle=settle,
    )


for _name in _LIMITS:
    register(_name)(partial(_published, _name))
