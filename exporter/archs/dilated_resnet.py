"""Segmentation on a dilated ResNet whose heads or dilations no library has.

PSPNet: H. Zhao et al., "Pyramid Scene Parsing Network", 2017, on ResNet-50. Hybrid dilated convolution and dense
upsampling convolution: P. Wang et al., "Understanding Convolution for Semantic Segmentation", 2018, on ResNet-101. The
trunks are torchvision's, whose stem is one 7x7 convolution where both papers' authors trained three of 3x3.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.auxiliary import Auxiliaries, Head
from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.archs.segmentation import AUXILIARY, AUXILIARY_WEIGHT, Segmenter, auxiliary_head, voc_labels
from convoynet.exporter.data.images import Preprocess

PSP_PAPER = "Zhao et al. 2017, Pyramid Scene Parsing Network, arXiv:1612.01105"
HDC_PAPER = "Wang et al. 2018, Understanding Convolution for Semantic Segmentation, arXiv:1702.08502"
BINS = (1, 2, 3, 6)
# Section 3.2.2, "Dilation-bigger" of ResNet-101: res4b in groups of four blocks and a last one of three, and res5b.
DILATIONS = ((*(1, 2, 5, 9) * 5, 1, 2, 5), (5, 9, 17))
_ASPP_DILATIONS = (6, 12, 18, 24)
_STRIDE = 8
_CELL = 2  # pixels that share a score, as in the authors' released network


class PyramidPooling(nn.Module):
    """Fig. 3: averages over 1, 4, 9 and 36 parts of the map beside the map itself, and the classifier on all of them.

    Args:
        channels: Of the map.
        num_classes: Outputs.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        narrow = channels // len(BINS)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(bins),
                nn.Conv2d(channels, narrow, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(inplace=True),
            )
            for bins in BINS
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(2 * channels, 512, 3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(512, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W -> N x num_classes x H x W."""
        parts = [
            F.interpolate(branch(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
            for branch in self.branches
        ]
        maps: Tensor = self.classifier(torch.cat([x, *parts], 1))
        return maps


class PSPNet(Segmenter):
    """PSPNet on ResNet-50.

    Args:
        num_classes: The background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__("fcn_resnet50", num_classes)
        self.classifier = PyramidPooling(2048, num_classes)


class DenseUpsampling(nn.Module):
    """Section 3.1: the map's channels are the scores of the pixels that a position stands for.

    Args:
        channels: Of the map.
        num_classes: Outputs.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        outputs = num_classes * (_STRIDE // _CELL) ** 2
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, outputs, 3, padding=dilation, dilation=dilation) for dilation in _ASPP_DILATIONS
        )

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W -> N x num_classes x 4H x 4W."""
        scores = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            scores = scores + branch(x)
        return F.pixel_shuffle(scores, _STRIDE // _CELL)


class HybridDilated(Segmenter):
    """ResNet-101 with hybrid dilations, and dense upsampling.

    Args:
        num_classes: The background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__("fcn_resnet101", num_classes)
        for stage, dilations in zip(("layer3", "layer4"), DILATIONS, strict=True):
            for block, dilation in zip(self.backbone[stage], dilations, strict=True):
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        self.classifier = DenseUpsampling(2048, num_classes)


def _arch(name: str, paper: str, build: type[nn.Module], side: int) -> Arch:
    return Arch(
        name=name,
        paper=paper,
        source="own",
        num_classes=21,
        preprocess=Preprocess((side, side), side, IMAGENET_PREPROCESS.mean, IMAGENET_PREPROCESS.std, fit="pad"),
        build=build,
        labels=voc_labels,
        task="segmentation",
        training_only=(f"{AUXILIARY}.",),
        auxiliaries=Auxiliaries({AUXILIARY: Head("backbone.layer3", auxiliary_head)}, AUXILIARY_WEIGHT),
    )


# 473 pixels are the paper's: they give a map of 60x60, which all bins divide.
register("pspnet_resnet50")(partial(_arch, "pspnet_resnet50", PSP_PAPER, PSPNet, 473))
register("hdc_resnet101")(partial(_arch, "hdc_resnet101", HDC_PAPER, HybridDilated, 512))
