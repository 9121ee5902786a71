"""Detectors that score a fixed set of boxes and need no proposals: SSD, RetinaNet and FCOS.

Layers and the names of all tensors are torchvision's, so that its weights fit; what picks boxes is written here with
fixed shapes (`boxes`).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from convoynet.exporter.archs import boxes as box
from convoynet.exporter.archs.from_torchvision import damp_residuals, follow_frozen, state_dict
from convoynet.exporter.archs.nms import suppress
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

SSD_PAPER = "Liu et al. 2016, SSD: Single Shot MultiBox Detector, arXiv:1512.02325"
SSDLITE_PAPER = "Sandler et al. 2018, MobileNetV2, arXiv:1801.04381, section 6.2; on MobileNetV3 (arXiv:1905.02244)"
RETINANET_PAPER = "Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002"
ATSS_PAPER = "Zhang et al. 2020, Adaptive Training Sample Selection, arXiv:1912.02424: RetinaNet with its improvements"
FCOS_PAPER = "Tian et al. 2019, FCOS: Fully Convolutional One-Stage Object Detection, arXiv:1904.01355"

# Pairs of a box and a class that the suppression looks at, the highest scores first. The result is torchvision's
# wherever no more than these are above the smallest score, or at least as many stay as there is room for.
CANDIDATES = 2000
_Network: TypeAlias = SSD | RetinaNet | FCOS
_LEAST_SSD300 = 268  # pixels a side: below, its last level has no place left


@dataclass(frozen=True)
class Settled:
    """What the outputs of a head's last layer become under random weights.

    Attributes:
        spread: Their standard deviation over all places.
        mean: Of each channel; one number, or as many as the channels of one anchor.
    """

    spread: float
    mean: float | Sequence[float] = 0.0


class OneStage(nn.Module):
    """torchvision's network with a forward of fixed shapes, for inference alone.

    Args:
        network: SSD, RetinaNet or FCOS, whose thresholds and numbers of boxes hold here.
        candidates: See CANDIDATES.
    """

    def __init__(self, network: _Network, candidates: int) -> None:
        super().__init__()
        self.backbone: nn.Module = network.backbone
        self.head: Any = network.head
        self._candidates = candidates
        self._min_score: float = network.score_thresh
        self._overlap: float = network.nms_thresh
        self._most: int = network.topk_candidates
        self._count: int = network.detections_per_img

    def forward(self, x: Tensor) -> box.Detections:
        """Detect in normalised images, float32 [N, 3, H, W]."""
        size = (x.shape[2], x.shape[3])
        self._require(size)
        features = list(self.backbone(x).values())
        anchors = [self._anchors(level, size, feature) for level, feature in enumerate(features)]
        scores, labels, codes, sources = self._best(self.head(features), anchors)
        found = box.clip(self._decode(codes, sources), size)
        kept = suppress(found, self._alive(scores, labels), self._overlap, labels)
        return box.detections(found, scores, labels, kept, self._count)

    def _best(self, outputs: dict[str, Tensor], anchors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and labels of the candidates, [N, K] by falling score, their codes and anchors, [N, K, 4]."""
        parts, start = [], 0
        ranks, codes = self._ranks(outputs), outputs["bbox_regression"]
        for some, count in self._lots(anchors):
            end = start + len(some)
            best, index, labels = box.best_pairs(ranks[:, start:end], count)
            picked = nn.functional.embedding(index, some)
            parts.append((best, labels, box.pick(codes[:, start:end], index), picked))
            start = end
        best, labels, codes, picked = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        if len(parts) > 1:
            best, order = best.topk(min(self._candidates, best.shape[1]), 1)
            labels = labels.gather(1, order)
            codes, picked = box.pick(codes, order), box.pick(picked, order)
        return self._scores(best), labels + self._first_label, codes, picked

    _first_label = 0

    @abstractmethod
    def _require(self, size: tuple[int, int]) -> None:
        """Raise BadInput for an input of (height, width) that does not fit."""

    @abstractmethod
    def _anchors(self, level: int, size: tuple[int, int], feature: Tensor) -> Tensor:
        """The boxes of one level, [A, 4] in pixels."""

    @abstractmethod
    def _lots(self, anchors: list[Tensor]) -> list[tuple[Tensor, int]]:
        """The anchors in the lots of which the best are taken, and how many of each."""

    @abstractmethod
    def _ranks(self, outputs: dict[str, Tensor]) -> Tensor:
        """What falls as the scores do, [N, A, classes]."""

    def _scores(self, ranks: Tensor) -> Tensor:
        """The scores of what `ranks` gave, 0..1."""
        return ranks

    def _alive(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Which candidates [N, K] take part."""
        return scores > self._min_score

    def _decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes [N, K, 4] from codes and anchors of that shape."""
        return box.decode(codes, anchors, self.head.regression_head.box_coder.weights)

    @abstractmethod
    def _settled(self) -> list[tuple[nn.Conv2d, Settled]]:
        """The last layers of the heads, and what `settle` makes of them."""


class StaticSSD(OneStage):
    """SSD300 and SSDLite: the most boxes of each class, of all levels together."""

    _first_label = 1  # the background has no candidates

    def __init__(self, network: _Network, candidates: int, least: int = 1) -> None:
        super().__init__(network, candidates)
        self._least = least
        self._weights = network.box_coder.weights
        generator = network.anchor_generator
        self._steps = generator.steps
        self._shapes = [pairs.clamp(0, 1).tolist() for pairs in generator._wh_pairs]

    def _require(self, size: tuple[int, int]) -> None:
        if min(size) < self._least:
            raise BadInput(f"an input of {size[0]}x{size[1]}: SSD300 needs {self._least} pixels a side or more")

    def _anchors(self, level: int, size: tuple[int, int], feature: Tensor) -> Tensor:
        height, width = size
        rows, columns = feature.shape[-2:]
        # The number of steps in a side, which need not be the number of places (section 2.2).
        down, across = (side / self._steps[level] for side in size) if self._steps else (rows, columns)
        ys, xs = np.meshgrid((np.arange(rows) + 0.5) / down, (np.arange(columns) + 0.5) / across, indexing="ij")
        centres = np.stack([xs, ys], -1).reshape(-1, 1, 2)
        halves = np.asarray(self._shapes[level]) / 2
        both = np.concatenate([centres - halves, centres + halves], -1).reshape(-1, 4)
        return torch.tensor((both * (width, height, width, height)).astype(np.float32), device=feature.device)

    def _lots(self, anchors: list[Tensor]) -> list[tuple[Tensor, int]]:
        return [(torch.cat(anchors), self._candidates)]

    def _ranks(self, outputs: dict[str, Tensor]) -> Tensor:
        return torch.softmax(outputs["cls_logits"], -1)[..., 1:]

    def _alive(self, scores: Tensor, labels: Tensor) -> Tensor:
        return super()._alive(scores, labels) & (box.earlier(labels) < self._most)

    def _decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        return box.decode(codes, anchors, self._weights)

    def _settled(self) -> list[tuple[nn.Conv2d, Settled]]:
        head = self.head.classification_head
        background = [4.0, *(0.0,) * (head.num_columns - 1)]
        scores = [(layer, Settled(2.0, background)) for layer in map(_last, head.module_list)]
        return scores + [(layer, Settled(1.0)) for layer in map(_last, self.head.regression_head.module_list)]


def _last(layer: nn.Module) -> nn.Conv2d:
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1]


class Pyramid(OneStage):
    """RetinaNet and FCOS: the most pairs of a box and a class of each level of a pyramid."""

    def __init__(self, network: _Network, candidates: int) -> None:
        super().__init__(network, candidates)
        self._shapes = [anchors.tolist() for anchors in network.anchor_generator.cell_anchors]

    def _require(self, size: tuple[int, int]) -> None:
        box.require_strides("a pyramid", size)

    def _anchors(self, level: int, size: tuple[int, int], feature: Tensor) -> Tensor:
        return box.grid_anchors(self._shapes[level], size, feature)

    def _lots(self, anchors: list[Tensor]) -> list[tuple[Tensor, int]]:
        return [(each, self._most) for each in anchors]


class StaticRetinaNet(Pyramid):
    """A sigmoid for each class, nine anchors at each place."""

    def _ranks(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"]  # the sigmoid of millions would change no order

    def _scores(self, ranks: Tensor) -> Tensor:
        return torch.sigmoid(ranks)

    def _settled(self) -> list[tuple[nn.Conv2d, Settled]]:
        scores, codes = self.head.classification_head, self.head.regression_head
        return [(scores.cls_logits, Settled(1.5, _rare(scores.num_classes))), (codes.bbox_reg, Settled(0.3))]


class StaticFCOS(Pyramid):
    """Distances to the four sides from each place, and how near its middle that is."""

    def _ranks(self, outputs: dict[str, Tensor]) -> Tensor:
        return torch.sqrt(torch.sigmoid(outputs["cls_logits"]) * torch.sigmoid(outputs["bbox_ctrness"]))

    def _decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        sides = anchors[..., 2:] - anchors[..., :2]
        centres = anchors[..., :2] + 0.5 * sides
        return torch.cat([centres - codes[..., :2] * sides, centres + codes[..., 2:] * sides], -1)

    def _settled(self) -> list[tuple[nn.Conv2d, Settled]]:
        scores, codes = self.head.classification_head, self.head.regression_head
        return [
            (scores.cls_logits, Settled(1.5, _rare(scores.num_classes))),
            (codes.bbox_reg, Settled(1.0, 3.0)),
            (codes.bbox_ctrness, Settled(1.0)),
        ]


def _rare(num_classes: int) -> list[float]:
    """Means of logits: few are detected, and the background never, as in training."""
    return [-20.0, *(-4.0,) * (num_classes - 1)]


def settle(model: nn.Module, x: Tensor) -> None:
    """Scale the heads of a randomly initialised detector so that scores spread and boxes move.

    As built, all scores are nearly equal: it would detect nothing, or anything, and agree with whatever there is.

    Args:
        model: A OneStage.
        x: Normalised images, float32 [N, 3, H, W].
    """
    assert isinstance(model, OneStage)
    settled = model._settled()
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer, _ in settled}
    hooks = [layer.register_forward_hook(lambda layer, _, output: seen[layer].append(output)) for layer in seen]
    model.head(list(model.backbone(x).values()))
    for hook in hooks:
        hook.remove()
    for layer, wanted in settled:
        values = torch.cat([output.transpose(0, 1).flatten(1) for output in seen[layer]], 1)  # channels x places
        middle = values.mean(1)
        factor = wanted.spread / (values - middle.unsqueeze(1)).std()
        means = torch.tensor(wanted.mean).reshape(-1)
        assert layer.bias is not None
        layer.weight *= factor
        layer.bias.copy_((layer.bias - middle) * factor + means.repeat(len(middle) // len(means)))


def build(name: str, num_classes: int, candidates: int = CANDIDATES, **options: float) -> OneStage:
    """Build torchvision's detector `name`, randomly initialised.

    Args:
        name: One of those that are registered here.
        num_classes: The background included.
        candidates: See CANDIDATES.
        options: Passed to torchvision's builder: score_thresh, nms_thresh, topk_candidates, detections_per_img.

    Raises:
        BadInput: Fewer than two classes.
    """
    box.require_classes(num_classes)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **options)
    damp_residuals(network.backbone)
    if name.startswith("ssd"):
        return StaticSSD(network, candidates, _LEAST_SSD300 if name == "ssd300_vgg16" else 1)
    if name.startswith("fcos"):
        return StaticFCOS(network, candidates)
    if name == "retinanet_resnet50_fpn":
        follow_frozen(network.backbone)
    return StaticRetinaNet(network, candidates)


def _arch(name: str, paper: str, preprocess: Preprocess) -> Arch:
    weights = get_model_weights(name).DEFAULT
    labels = weights.meta["categories"]
    return Arch(
        name=name,
        paper=paper,
        source="torchvision",
        num_classes=len(labels),
        preprocess=preprocess,
        preprocess_source=f"from torchvision's {weights}",
        build=partial(build, name),
        labels=partial(list, labels),
        published=partial(state_dict, weights),
        published_name=f"torchvision {weights}",
        task="detection",
        settle=settle,
    )


# As torchvision's networks resize and normalise inside: SSD to its size whatever an image's proportions are, the
# others to a shorter side of 800, of which a square input leaves the longer side.
_PADDED = Preprocess((800, 800), 800, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), fit="pad")
for _name, _paper, _preprocess in (
    ("ssd300_vgg16", SSD_PAPER, Preprocess((300, 300), (300, 300), (0.48235, 0.45882, 0.40784), (1 / 255,) * 3)),
    ("ssdlite320_mobilenet_v3_large", SSDLITE_PAPER, Preprocess((320, 320), (320, 320), (0.5,) * 3, (0.5,) * 3)),
    ("retinanet_resnet50_fpn", RETINANET_PAPER, _PADDED),
    ("retinanet_resnet50_fpn_v2", ATSS_PAPER, _PADDED),
    ("fcos_resnet50_fpn", FCOS_PAPER, _PADDED),
):
    register(_name)(partial(_arch, _name, _paper, _preprocess))
