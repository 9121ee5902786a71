"""Faster R-CNN: S. Ren et al. 2015, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks".

Trunk, pyramid, heads and the names of all tensors are torchvision's; what picks boxes out of them is written here
with shapes that never depend on the image, so that the network batches and that an ONNX graph of it has no loops,
no branches and no operator whose output has an unknown size. Fewer boxes than there is room for are padding.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from convoynet.exporter.archs.from_torchvision import damp_residuals
from convoynet.exporter.archs.nms import suppress
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.archs.roi_align import pyramid_roi_align
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

PAPER = "Ren et al. 2015, Faster R-CNN, arXiv:1506.01497, on a feature pyramid (Lin et al. 2017, arXiv:1612.03144)"
# As torchvision's batches of images of different sizes: the mean colour is the zero that they are padded with.
PREPROCESS = Preprocess(size=(800, 800), resize=800, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit="pad")

_STRIDE = 32  # of the coarsest level of the trunk
_BINS = 7
_LARGEST_CODE = math.log(1000 / 16)  # torchvision's: a box grows at most that much
_MIN_PROPOSAL, _MIN_DETECTION = 1e-3, 1e-2  # pixels; torchvision's


class Detections(NamedTuple):
    """The boxes of N images, D for each, by falling score; behind the first `counts` they are zeros.

    Attributes:
        boxes: float32 [N, D, 4], x1, y1, x2, y2 in pixels of the input.
        scores: float32 [N, D], 0..1.
        labels: int64 [N, D]; 0 is the background and so only padding.
        counts: int64 [N, 1], how many of the D are detections.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Limits:
    """How many boxes each step lets through; the first four are torchvision's defaults.

    Attributes:
        level_proposals: Of each pyramid level, before suppression.
        proposals: Of an image, after it.
        detections: Of an image, in the end.
        min_score: Detections need more than this.
        candidates: Pairs of a proposal and a class that the last suppression looks at, the highest scores first.
            The result is that of torchvision wherever no more than these are above `min_score` or at least
            `detections` of them stay.
    """

    level_proposals: int = 1000
    proposals: int = 1000
    detections: int = 100
    min_score: float = 0.05
    candidates: int = 1000


class StaticFasterRCNN(FasterRCNN):  # type: ignore[misc]  # torchvision has no types
    """torchvision's network with a forward of fixed shapes, for inference alone.

    Args:
        backbone: ResNet-18 to ResNet-152 with a feature pyramid.
        num_classes: The background included.
        limits: See there.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        super().__init__(
            backbone,
            num_classes,
            rpn_pre_nms_top_n_test=limits.level_proposals,
            rpn_post_nms_top_n_test=limits.proposals,
            box_detections_per_img=limits.detections,
            box_score_thresh=limits.min_score,
        )
        self.limits = limits
        # Lists and not tensors: the anchors of an input size become one constant of the graph.
        self._cell_anchors = [anchors.tolist() for anchors in self.rpn.anchor_generator.cell_anchors]

    def forward(self, x: Tensor) -> Detections:
        """Detect in normalised images, float32 [N, 3, H, W], H and W multiples of 32."""
        height, width = x.shape[-2:]
        if height % _STRIDE or width % _STRIDE:
            raise BadInput(f"an input of {height}x{width}: Faster R-CNN needs multiples of {_STRIDE}")
        features = list(self.backbone(x).values())  # strides 4, 8, 16, 32 and 64
        proposals, alive = self._propose(features, (height, width))
        pooled = pyramid_roi_align(features[:-1], proposals, _BINS)  # the coarsest is for proposals alone
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        shape = (x.shape[0], proposals.shape[1], -1)
        scores = torch.softmax(logits, -1).reshape(shape) * alive.unsqueeze(-1)
        return self._detect(proposals, scores, deltas.reshape(shape), (height, width))

    def _propose(self, features: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Section 3.1: float32 [N, P, 4], and which of them are no padding, bool [N, P]."""
        anchors, codes, logits = [], [], []
        for level, (objectness, deltas) in enumerate(zip(*self.rpn.head(features), strict=True)):
            flat = objectness.permute(0, 2, 3, 1).flatten(1)  # N x anchors
            best, index = flat.topk(min(self.limits.level_proposals, flat.shape[1]), 1)
            logits.append(best)
            codes.append(_pick(_anchor_codes(deltas), index))
            anchors.append(nn.functional.embedding(index, self._anchors(level, size, objectness)))
        # N x levels x K x 4, so that one suppression serves all levels. The padding of a level with few anchors has no
        # size, and falls with the boxes that are too small.
        boxes = _clip(_decode(_stack(codes), _stack(anchors), self.rpn.box_coder.weights), size)
        kept = suppress(boxes, _large(boxes, _MIN_PROPOSAL), self.rpn.nms_thresh)
        scores = _stack([best.unsqueeze(-1) for best in logits]).flatten(1)
        return _best(boxes.flatten(1, 2), scores, kept.flatten(1), self.limits.proposals)

    def _detect(self, proposals: Tensor, scores: Tensor, deltas: Tensor, size: tuple[int, int]) -> Detections:
        """Turn the heads' scores [N, P, classes] and codes [N, P, classes * 4] into detections."""
        classes = scores.shape[-1] - 1
        flat = scores[..., 1:].flatten(1)  # without the background: N x P*classes
        codes = deltas.reshape(*scores.shape, 4)[:, :, 1:].flatten(1, 2)  # N x P*classes x 4
        best, index = flat.topk(min(self.limits.candidates, flat.shape[1]), 1)
        labels = index % classes + 1
        sources = _pick(proposals, index // classes)
        boxes = _clip(_decode(_pick(codes, index), sources, self.roi_heads.box_coder.weights), size)
        alive = (best > self.limits.min_score) & _large(boxes, _MIN_DETECTION)
        kept = suppress(boxes, alive, self.roi_heads.nms_thresh, labels)
        ranks, order = torch.where(kept, best, -1.0).topk(min(self.limits.detections, best.shape[1]), 1)
        real = ranks > 0
        return Detections(
            boxes=_pick(boxes, order) * real.unsqueeze(-1),
            scores=ranks.clamp(min=0.0),
            labels=labels.gather(1, order) * real,
            counts=real.sum(1, keepdim=True),
        )

    def _anchors(self, level: int, size: tuple[int, int], objectness: Tensor) -> Tensor:
        """Anchors of one level, [rows * columns * shapes, 4] in pixels; spaced as torchvision spaces them."""
        rows, columns = objectness.shape[-2:]
        ys, xs = np.meshgrid(
            np.arange(rows) * (size[0] // rows), np.arange(columns) * (size[1] // columns), indexing="ij"
        )
        centres = np.stack([xs, ys, xs, ys], -1).reshape(-1, 1, 4)
        anchors = (centres + np.asarray(self._cell_anchors[level])).reshape(-1, 4).astype(np.float32)
        return torch.tensor(anchors, device=objectness.device)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, K] of `values` [N, M, 4]: [N, K, 4]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))


def _anchor_codes(deltas: Tensor) -> Tensor:
    """[N, anchors of a place * 4, rows, columns] to [N, rows * columns * anchors, 4], the order of the anchors."""
    batch, channels, rows, columns = deltas.shape
    return deltas.reshape(batch, channels // 4, 4, rows, columns).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _stack(levels: list[Tensor]) -> Tensor:
    """[N, K, M] of each level, K being different, to [N, levels, largest K, M] with zeros at the end."""
    room = max(level.shape[1] for level in levels)
    short = [(level, room - level.shape[1]) for level in levels]
    return torch.stack([nn.functional.pad(level, (0, 0, 0, gap)) if gap else level for level, gap in short], 1)


def _large(boxes: Tensor, smallest: float) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides.amin(-1) >= smallest


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return boxes.clamp(min=0.0).minimum(boxes.new_tensor([width, height, width, height]))


def _decode(codes: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Move and scale boxes [..., 4] by codes [..., 4] (eq. 2, with torchvision's weights and limit)."""
    codes = codes / codes.new_tensor(weights)
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = codes[..., :2] * sides + (boxes[..., :2] + 0.5 * sides)
    halves = 0.5 * codes[..., 2:].clamp(max=_LARGEST_CODE).exp() * sides
    return torch.cat([centres - halves, centres + halves], -1)


def _best(boxes: Tensor, scores: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` kept boxes with the highest scores, and which are none but padding (zeros)."""
    lowest = torch.finfo(scores.dtype).min
    ranks, order = torch.where(kept, scores, lowest).topk(min(count, scores.shape[1]), 1)
    real = ranks > lowest
    return _pick(boxes, order) * real.unsqueeze(-1), real


def build_faster_rcnn(trunk: str, num_classes: int, limits: Limits | None = None) -> StaticFasterRCNN:
    """A detector on torchvision's `trunk`, such as "resnet101", randomly initialised.

    Raises:
        BadInput: Fewer than two classes: the first is the background.
    """
    if num_classes < 2:
        raise BadInput(f"{num_classes} class: a detector needs 2 or more, the first being the background")
    # Not torchvision's frozen normalisation: this one's statistics can be estimated, and it folds away.
    backbone = resnet_fpn_backbone(backbone_name=trunk, weights=None, norm_layer=nn.BatchNorm2d)
    damp_residuals(backbone)
    return StaticFasterRCNN(backbone, num_classes, limits)


def settle(model: nn.Module, x: Tensor) -> None:
    """Scale the heads of a randomly initialised detector so that scores spread and boxes move.

    As built, all scores are nearly equal and below the threshold: it would detect nothing, and agree with anything.

    Args:
        model: A StaticFasterRCNN.
        x: Normalised images, float32 [N, 3, H, W].
    """
    assert isinstance(model, StaticFasterRCNN)
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    features = list(model.backbone(x).values())
    for layer, spread, outputs in zip((head.cls_logits, head.bbox_pred), (2.0, 0.3), head(features), strict=True):
        layer.weight *= spread / torch.cat([output.flatten() for output in outputs]).std()
    proposals, _ = model._propose(features, (x.shape[2], x.shape[3]))
    pooled = model.roi_heads.box_head(pyramid_roi_align(features[:-1], proposals, _BINS))
    logits, codes = predictor(pooled)
    predictor.cls_score.weight *= 2.5 / (logits - logits.mean(0)).std()
    predictor.bbox_pred.weight *= 1.0 / codes.std()
    predictor.cls_score.bias -= predictor(pooled)[0].mean(0)  # or one class would win everywhere
    predictor.cls_score.bias[0] += 2.0  # most proposals are background


@register("fasterrcnn_resnet101_fpn")
def fasterrcnn_resnet101_fpn() -> Arch:
    """ResNet-101 with a pyramid, for the 91 labels of COCO; nobody has published weights under torchvision's names."""
    labels = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return Arch(
        name="fasterrcnn_resnet101_fpn",
        paper=PAPER,
        source="torchvision",
        num_classes=len(labels),
        preprocess=PREPROCESS,
        build=partial(build_faster_rcnn, "resnet101"),
        labels=partial(list, labels),
        task="detection",
        settle=settle,
    )
