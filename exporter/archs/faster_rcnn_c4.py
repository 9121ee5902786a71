"""Faster R-CNN as K. He et al. 2015 have it: "Deep Residual Learning for Image Recognition", appendix A.

There is no pyramid. The layers up to conv4 (stride 16) see the image once, for the region proposals and for the
classification; of each proposal 14x14 places of their 1024 channels go through conv5 and its average, where the network
of the first paper has VGG's fully connected layers.

Where the paper says nothing, or what no runtime does fast: a proposal is read by RoIAlign (He et al. 2017, Mask R-CNN,
whose C4 this is as well) with one sample of each of its 14x14 cells, in the place of a maximum, and an anchor has one
score in the place of two.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from convoynet.exporter.archs.boxes import require_classes
from convoynet.exporter.archs.detection import Limits, StaticFasterRCNN, fasterrcnn_resnet101_fpn
from convoynet.exporter.archs.from_torchvision import damp_residuals
from convoynet.exporter.archs.registry import Arch, register

PAPER = "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385, appendix A"
LIMITS = Limits(proposals=300)

_BINS, _SAMPLES = 14, 1
# Ren et al. 2017 (the first paper's later version), section 4.2: for COCO a scale of 64 beside the other three.
_SCALES, _RATIOS = (64, 128, 256, 512), (0.5, 1.0, 2.0)
_PROPOSING = 512  # channels of the layer that the proposals' two share, as theirs on VGG


class Shared(nn.Module):
    """A ResNet up to conv4, whose conv5 is left to the head.

    Args:
        trunk: torchvision's name.
    """

    def __init__(self, trunk: str) -> None:
        super().__init__()
        network = get_model(trunk, weights=None)
        damp_residuals(network)
        self.body = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.body.add_module(name, getattr(network, name))
        self.conv5 = [network.layer4]  # in a list: its tensors are the head's
        self.out_channels = network.fc.in_features // 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """N x 3 x H x W -> N x 1024 x H/16 x W/16 by its name."""
        return {"conv4": self.body(x)}


def parts(trunk: str, num_classes: int) -> dict[str, nn.Module]:
    """What torchvision's FasterRCNN is made of, by the names of its arguments."""
    backbone = Shared(trunk)
    (conv5,) = backbone.conv5
    head = RPNHead(backbone.out_channels, len(_SCALES) * len(_RATIOS))
    anchors = head.cls_logits.out_channels
    head.conv = nn.Sequential(nn.Conv2d(backbone.out_channels, _PROPOSING, 3, padding=1), nn.ReLU())
    head.cls_logits, head.bbox_pred = nn.Conv2d(_PROPOSING, anchors, 1), nn.Conv2d(_PROPOSING, anchors * 4, 1)
    return {
        "backbone": backbone,
        "rpn_anchor_generator": AnchorGenerator((_SCALES,), (_RATIOS,)),
        "rpn_head": head,
        "box_roi_pool": MultiScaleRoIAlign(["conv4"], _BINS, _SAMPLES),
        "box_head": nn.Sequential(conv5, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(backbone.out_channels * 2, num_classes),
    }


def build_c4(trunk: str, num_classes: int, limits: Limits = LIMITS) -> StaticFasterRCNN:
    """A detector on torchvision's `trunk`, such as "resnet101", randomly initialised.

    Raises:
        BadInput: Fewer than two classes: the first is the background.
    """
    require_classes(num_classes)
    return StaticFasterRCNN(FasterRCNN(**parts(trunk, num_classes), **limits.options), limits)


@register("fasterrcnn_resnet101_c4")
def fasterrcnn_resnet101_c4() -> Arch:
    """ResNet-101 for the 91 labels of COCO; the authors' weights are Caffe's."""
    arch = fasterrcnn_resnet101_fpn()
    return replace(
        arch, name="fasterrcnn_resnet101_c4", paper=PAPER, source="own", build=partial(build_c4, "resnet101")
    )
